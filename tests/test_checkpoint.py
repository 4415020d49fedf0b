"""Checkpoints as files: a resumed run equals an uninterrupted one, and an export is the trained model, at every stage.

Ray's part, finding the newest checkpoint of a run, is in `test_ray_run.py`; here the checkpoint is named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from grid import Run, final_weights, run_grid
from transformers import AutoModelForCausalLM

from tp2d_helpers.config import Config
from tp2d_helpers.export import export_checkpoint, merge
from tp2d_helpers.metrics import keep_until, read_metrics

Train = Callable[..., Run]
RUNS = [("qwen2-tied", 1, 2, 2), ("llama", 2, 2, 2), ("llama", 3, 2, 2), ("qwen3", 1, 4, 1), ("mistral", 1, 2, 1)]
runs = pytest.mark.parametrize("model, zero_stage, tp_size, dp_size", RUNS, ids=lambda part: str(part))


def folder_of(run: Run, step: int) -> Path:
    """The run's checkpoint at a step."""
    return Path(run.config["storage_path"], run.config["experiment_name"], f"checkpoint_{step:08d}")


class ResumeFrom:
    """A patch for `run_grid`: Ray Train hands the workers this checkpoint. (A class, so that it can be pickled.)"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, names: dict[str, Any]) -> None:
        ray.train.get_checkpoint = lambda: ray.train.Checkpoint.from_directory(self.folder)


@pytest.mark.parametrize(
    "model, zero_stage, tp_size, dp_size",
    [("qwen2-untied", 1, 2, 2), ("llama", 2, 2, 2), ("qwen3", 3, 2, 2), ("mistral", 0, 2, 1)],
)
def test_resume_in_mid_epoch(train: Train, model: str, zero_stage: int, tp_size: int, dp_size: int) -> None:
    """From step 4 of an epoch of 6, after 5 were logged: bit for bit, and no step twice."""
    grid = dict(zero_stage=zero_stage, tp_size=tp_size, dp_size=dp_size)
    whole = train(model, num_epochs=2, debug_steps=6, checkpoint_interval=4, checkpoints_to_keep=9, **grid)
    config = Config(**whole.config)
    path = config.run_dir / "metrics.jsonl"
    before = read_metrics(path)
    keep_until(path, 5)
    weights = run_grid(whole.config, after=final_weights, patch=ResumeFrom(folder_of(whole, 4)))[0][0]
    records = read_metrics(path)
    for name in ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens"):
        assert [record[name] for record in records] == [record[name] for record in before], name
    assert all(torch.equal(weights[name], weight) for name, weight in whole.weights.items())


@runs
def test_export_is_the_trained_model(
    train: Train, tmp_path: Path, model: str, zero_stage: int, tp_size: int, dp_size: int
) -> None:
    run = train(model, zero_stage=zero_stage, tp_size=tp_size, dp_size=dp_size)
    folder = export_checkpoint(folder_of(run, 20), run.config["model_name"], tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(folder)
    weights = dict(exported.named_parameters(remove_duplicate=False))
    assert weights.keys() == run.weights.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, run.weights[name])] == []
    assert exported.dtype == torch.float32 and (folder / "generation_config.json").exists()
    untrained = AutoModelForCausalLM.from_pretrained(run.config["model_name"])
    assert not torch.equal(untrained.lm_head.weight, exported.lm_head.weight)


def test_export_of_bf16(train: Train, tmp_path: Path) -> None:
    run = train("qwen2-tied", tp_size=2, dp_size=2, precision="bf16")
    folder = export_checkpoint(folder_of(run, 20), run.config["model_name"], tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert exported.dtype == torch.bfloat16
    for name, weight in exported.named_parameters():
        assert torch.equal(weight, run.weights[name].bfloat16()), name


def test_export_replaces_an_older_one_at_once(train: Train, tmp_path: Path) -> None:
    run = train("qwen2-tied", tp_size=2, dp_size=2)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "stale.txt").write_text("")
    with pytest.raises(FileNotFoundError):
        export_checkpoint(tmp_path, run.config["model_name"], tmp_path / "export")
    assert (tmp_path / "export" / "stale.txt").exists(), "a failed export must leave the older one"
    export_checkpoint(folder_of(run, 20), run.config["model_name"], tmp_path / "export")
    assert not (tmp_path / "export" / "stale.txt").exists()


def test_shards_that_do_not_fit() -> None:
    whole = torch.Size([4, 6])
    assert merge("w", [torch.zeros(4, 3)] * 2, whole, torch.float32).shape == whole
    with pytest.raises(ValueError, match=r"w: shards \[\[4, 2\], \[4, 2\]\] don't make \[4, 6\]"):
        merge("w", [torch.zeros(4, 2)] * 2, whole, torch.float32)
