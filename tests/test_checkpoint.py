"""A run continues from its files as if nothing had happened: at the same grid bit for bit, at another one in its numbers.

What becomes of checkpoints that were damaged, or that come from elsewhere. Ray's part is in `test_faults.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import Run, final_weights, run_grid

from tp2d_helpers.checkpoint import CheckpointWriter, host_copy
from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.export import checkpoint_tag
from tp2d_helpers.metrics import keep_until, read_metrics
from tp2d_helpers.resize import convert
from tp2d_helpers.run_folder import mend_ray_snapshot, newest_checkpoint, problem_of, record_run

Train = Callable[..., Run]
EXACT = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
# Two epochs of 6 steps of 4 samples; checkpoints at the steps 4, 6, 8, 12, evaluations there and at 3 and 9.
LIFE = dict(num_epochs=2, debug_steps=6, checkpoint_interval=4, eval_samples=5, eval_interval=3)


def copy_until(run: Run, folder: Path, step: int, logged: int) -> Config:
    """A copy of a run's folder as it was after `logged` steps, with its checkpoints up to `step`."""
    config = Config(**run.config)
    shutil.copytree(config.run_dir, folder / "copy", ignore=shutil.ignore_patterns("logs", "heartbeats"))
    for path in (folder / "copy").glob("checkpoint_*"):
        if int(path.name.partition("_")[2]) > step:
            shutil.rmtree(path)
    keep_until(folder / "copy" / "metrics.jsonl", logged)
    return config.change(storage_path=str(folder), experiment_name="copy")


def assert_continues(config: Config, whole: Run, weights: dict[str, torch.Tensor], exact: bool = True) -> None:
    """Assert that a run which was continued is the whole run: bit for bit, or within 1e-5."""
    records = read_metrics(config.run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [record["step"] for record in whole.records]
    for record, expected in zip(records, whole.records, strict=True):
        for name in EXACT:
            wanted = expected[name] if exact or expected[name] is None else pytest.approx(expected[name], rel=1e-5)
            assert record[name] == wanted, f"step {record['step']}: {name}"
    if exact:
        assert all(torch.equal(weights[name], weight) for name, weight in whole.weights.items())


@pytest.mark.parametrize(
    "model, zero_stage, tp_size, dp_size, settings",
    [
        ("qwen2-untied", 1, 2, 2, {}),
        ("llama", 2, 2, 2, dict(async_checkpoint=False)),
        ("qwen3", 3, 2, 2, {}),
        ("mistral", 0, 2, 1, {}),
        ("qwen2-dropout", 1, 2, 2, {}),
        ("qwen2-tied", 1, 1, 2, dict(precision="fp16")),
    ],
)
def test_resume_in_mid_epoch(
    train: Train, tmp_path: Path, model: str, zero_stage: int, tp_size: int, dp_size: int, settings: dict
) -> None:
    """From step 4 of an epoch of 6, after 5 were logged."""
    whole = train(model, **LIFE, zero_stage=zero_stage, tp_size=tp_size, dp_size=dp_size, **settings)
    config = copy_until(whole, tmp_path, step=4, logged=5)
    weights = run_grid(config.model_dump(), after=final_weights)[0][0]
    assert_continues(config, whole, weights)
