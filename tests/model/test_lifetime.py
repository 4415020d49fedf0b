"""What else a run does, on each kind of plan: other grids and ZeRO stages, recomputed activations, LoRA, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from families import TYPES
from grid import Run, assert_equal_runs, final_weights, run_grid
from transformers import AutoModelForCausalLM

from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.checkpoint.resize import convert
from tp2d_helpers.checkpoint.run_folder import newest_checkpoint
from tp2d_helpers.checkpoint.settings import record_run
from tp2d_helpers.config import Config
from tp2d_helpers.training.metrics import read_metrics

Train = Callable[..., Run]
USUAL = ["gpt2", "olmo2", "phi3", "qwen3_moe", "smollm3", "ernie4_5_moe"]
LIFE = [  # an epoch of 3 steps at each; at 8 × 1 two ranks share a key-value head
    dict(tp_size=2, dp_size=2, zero_stage=1),
    dict(tp_size=4, dp_size=1, zero_stage=3, activation_checkpointing="full"),
    dict(tp_size=1, dp_size=2, zero_stage=2, activation_checkpointing="full"),
    dict(tp_size=2, dp_size=1, zero_stage=1, optimizations="none"),
]
LAST = {"smollm3": dict(tp_size=8, dp_size=1)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`--all-types` takes all."""
    metafunc.parametrize("kind", TYPES if metafunc.config.getoption("--all-types") else USUAL)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_from_grid_to_grid(
    train: Train, family: Callable[..., Path], tmp_path: Path, kind: str, lora_rank: int
) -> None:
    """One run that changes its grid, ZeRO stage and optimizations is the run of one process; so is its export."""
    life = [*LIFE[:-1], LIFE[-1] | LAST.get(kind, {})]
    if lora_rank and "linear_attention" in TYPES[kind].get("layer_types", []):
        pytest.skip("LoRA is refused on layers whose outputs are gathered")
    short = dict(warmup_steps=2, lora_rank=lora_rank, debug_steps=3)
    model = family(kind, **TYPES[kind])
    whole = train(model, num_epochs=len(life), **short)
    config = Config(**whole.config).change(storage_path=str(tmp_path))
    for epoch, grid in enumerate(life):
        batch = dict(batch_size_per_gpu=4 // grid["dp_size"], num_epochs=epoch + 1)
        config = Config(**whole.config).change(storage_path=str(tmp_path), **batch, **grid)
        if epoch:
            convert(newest_checkpoint(config.run_dir)[0])
        weights, replicated, _, copies = run_grid(config.model_dump(), after=final_weights)[0]
    run = Run(config.model_dump(), read_metrics(config.run_dir / "metrics.jsonl"), weights, replicated, {}, copies)
    assert_equal_runs(run, whole)
    record_run(config)
    checkpoint, _ = newest_checkpoint(config.run_dir)
    assert_exported(run, export_checkpoint(checkpoint, str(model), tmp_path / "export"), tmp_path)


def assert_exported(run: Run, folder: Path, scratch: Path) -> None:
    """The files have the names that `save_pretrained` gives, and the trained model's weights and buffers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = {name for name in run.weights if "_lora." in name}
    for name, weight in run.weights.items():
        if not adapted:
            assert torch.equal(model.get_parameter(name), weight), name
    model.save_pretrained(scratch / "saved")
    saved, exported = (_files(path) for path in (scratch / "saved", folder))
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)
    assert adapted == set() or (folder / "adapter" / "adapter_model.safetensors").exists()


def _files(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(file).items()}
