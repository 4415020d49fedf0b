"""A run is continued with other settings: what is set now counts, from the step on that the checkpoint has reached."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grid import Run, assert_equal_runs, final_weights, run_grid
from plain import plain_run

from tp2d_helpers.checkpoint.run_folder import checkpoints
from tp2d_helpers.checkpoint.settings import record_run
from tp2d_helpers.config import Config
from tp2d_helpers.data.dataloader import create_dataloader, data_settings, global_batches
from tp2d_helpers.demo import build_model
from tp2d_helpers.training.metrics import read_metrics

Train = Callable[..., Run]
LIFE = dict(num_epochs=2, debug_steps=6, checkpoint_interval=4, eval_samples=5, eval_interval=3)  # as test_checkpoint's
NOW = dict(learning_rate=3e-4, warmup_steps=8, weight_decay=0.5, max_grad_norm=0.05)


def copy_at(run: Run, folder: Path, step: int) -> Config:
    """A copy of a run's folder with nothing in it but the checkpoint of a step."""
    config = Config(**run.config)
    found = next(path for path in checkpoints(config.run_dir) if path.name == f"checkpoint_{step:08d}")
    shutil.copytree(found, folder / "copy" / found.name)
    return config.change(storage_path=str(folder), experiment_name="copy")


def settings_and_weights(engine: Any, tp_group: dist.ProcessGroup, dp_group: dist.ProcessGroup) -> tuple:
    """For `run_grid(after=)`: of the optimizer's groups, the limit it clips to, and `final_weights`."""
    groups = [(group["lr"], group["weight_decay"]) for group in engine.optimizer.param_groups]
    clip = getattr(engine.optimizer, "clip_grad", engine.gradient_clipping())
    return groups, clip, final_weights(engine, tp_group, dp_group)


def continue_to_the_end(config: Config) -> tuple[Run, list[tuple], float]:
    """(the run from its checkpoint on, the settings of the optimizer's groups at its end, its clipping)."""
    answers = run_grid(config.model_dump(), after=settings_and_weights)
    groups, clip, (weights, *_) = answers[0]
    alike = [[answer[2][kind] for answer in answers] for kind in (1, 3)]
    replicated, copies = ({name: all(rank[name] for rank in ranks) for name in ranks[0]} for ranks in alike)
    records = read_metrics(config.run_dir / "metrics.jsonl")
    return Run(config.model_dump(), records, weights, replicated, {}, copies), groups, clip


@pytest.mark.parametrize("model, zero_stage, tp_size, dp_size, then, settings", [
    ("qwen2-untied", 1, 2, 2, {}, {}),
    ("qwen3", 3, 2, 2, {}, {}),
    ("mistral", 2, 2, 1, {}, {}),
    ("qwen2-untied", 1, 2, 2, {}, dict(tp_size=1, dp_size=1, batch_size_per_gpu=4, zero_stage=2)),  # converted
    ("qwen2-tied", 1, 1, 2, dict(optimizations="none"), {}),
], ids=str)  # fmt: skip
def test_what_is_set_now_counts(
    train: Train, tmp_path: Path, model: str, zero_stage: int, tp_size: int, dp_size: int, then: dict, settings: dict
) -> None:
    """Learning rate, warm-up, weight decay and clipping, against PyTorch alone with the same change in its loop."""
    whole = train(model, **LIFE, zero_stage=zero_stage, tp_size=tp_size, dp_size=dp_size, **then)
    config = copy_at(whole, tmp_path, step=4).change(**NOW, **settings)
    run, groups, clip = continue_to_the_end(config)
    expected = plain_run(whole.config, later=NOW, after=4)
    assert run.records[0]["step"] == 5 and run.records[0]["learning_rate"] == 3e-4 * 4 / 8
    assert (groups, clip) == ([(3e-4, 0.5), (3e-4, 0.0)], 0.05)
    expected.records = expected.records[4:]
    assert_equal_runs(run, expected)


def test_a_partition_of_padding_only(train: Train, tmp_path: Path) -> None:
    """One, four and again one replica, where the fourth of four has no norm or bias: DeepSpeed's loader trips there."""
    shape = dict(model_type="llama", hidden_size=2, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
                 num_key_value_heads=1, head_dim=2, vocab_size=2048, max_position_embeddings=256)  # fmt: skip
    build_model(shape, tmp_path / "narrow", dtype=torch.float32)
    whole = train(tmp_path / "narrow", num_epochs=3, debug_steps=2, warmup_steps=0, weight_decay=0.5)
    config = copy_at(whole, tmp_path, step=2)
    for epoch, dp_size in ((2, 4), (3, 1)):
        config = config.change(num_epochs=epoch, dp_size=dp_size, batch_size_per_gpu=4 // dp_size)
        run, _, _ = continue_to_the_end(config)
    whole.records = whole.records[2:]
    assert_equal_runs(run, whole)


@pytest.mark.parametrize("debug_steps", [3, 4])
def test_an_epoch_that_is_shorter_now(train: Train, tmp_path: Path, debug_steps: int) -> None:
    """Four of six steps were done: if it has no more than that, it is over. It used to begin again, for ever."""
    whole = train("qwen2-tied", **LIFE, tp_size=1, dp_size=2)
    config = copy_at(whole, tmp_path, step=4).change(debug_steps=debug_steps, num_epochs=1)
    run, _, _ = continue_to_the_end(config)
    assert run.records == []
    run, _, _ = continue_to_the_end(config.change(num_epochs=2))
    assert [(record["step"], record["epoch"]) for record in run.records] == [(5 + i, 1) for i in range(debug_steps)]
    if debug_steps == 4:  # as if it had always been so
        expected = plain_run(run.config)
        expected.records = expected.records[4:]
        assert_equal_runs(run, expected)


def _compute_in_bf16(names: dict[str, Any]) -> None:
    from tp2d_helpers.model import engine

    engine.get_mixed_precision_dtype = lambda: torch.bfloat16


@pytest.mark.parametrize("zero_stage, dp_size", [(1, 2), (1, 1), (2, 1)])
def test_another_precision_by_another_device(train: Train, tmp_path: Path, zero_stage: int, dp_size: int) -> None:
    """ "auto" was bf16 on a GPU and is fp32 here. Only the workers know, where Ray doesn't name the GPUs."""
    begun = train("qwen2-tied", debug_steps=1, zero_stage=zero_stage, patch=_compute_in_bf16)
    config = copy_at(begun, tmp_path, step=1).change(num_epochs=2, dp_size=dp_size, batch_size_per_gpu=4 // dp_size)
    with pytest.raises(
        RuntimeError, match=r"precision: .*checkpoint_00000001 was trained in bf16, .* computes in fp32"
    ):
        run_grid(config.model_dump())


def _tokenise_other_data(names: dict[str, Any]) -> None:
    from tp2d_helpers.data.dataset import TokenDataset

    if os.environ["RANK"] == "1":
        TokenDataset.identity = {"documents": 1, "tokens": 2, "sha256": "3"}


def test_a_node_with_other_data_is_found(train: Train, tmp_path: Path) -> None:
    """A file of the same name on its own disk, or one that was replaced between two attempts. All ranks stop."""
    message = "rank 1 has other data than the run .*'sha256': '3'.*; all nodes must see the same files"
    with pytest.raises(RuntimeError, match=message):
        train("qwen2-tied", dp_size=2, patch=_tokenise_other_data)
    config = Config(**train("qwen2-tied", **LIFE, tp_size=1, dp_size=2).config).change(storage_path=str(tmp_path))
    record_run(config, {"documents": 1, "tokens": 2, "sha256": "4"})
    with pytest.raises(RuntimeError, match=r"rank 0 has other data than the run .* not .*'sha256': '4'"):
        run_grid(config.model_dump())


def test_a_loop_over_an_epoch_without_steps_is_refused(train: Train) -> None:
    """For loops that don't ask where the run goes on."""
    settings = train("qwen2-tied", **LIFE, tp_size=1, dp_size=2).config
    loader = create_dataloader(dp_rank=0, **data_settings({**settings, "debug_steps": 2}))
    for done in (2, 3):
        loader.batch_sampler.set_epoch(0, start_step=done)
        with pytest.raises(ValueError, match=f"no step is left: {done} are done of an epoch of 2"):
            next(global_batches(loader))
