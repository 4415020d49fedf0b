"""A resumed run is on the curve of the settings it is resumed with, at its step, as if these had always been set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grid import Run, assert_equal_runs, run_grid
from plain import plain_run, rate_of
from test_continued import continue_to_the_end, copy_at

from tp2d_helpers.training.metrics import read_metrics

Train = Callable[..., Run]
LIFE = dict(num_epochs=2, debug_steps=6, checkpoint_interval=4)
RATE = 1e-3  # of all runs of `train`


def settings(schedule: str, **others: Any) -> dict[str, Any]:
    """Of a schedule that ends at a tenth of the rate, if it can."""
    return dict(learning_rate_schedule=schedule, min_learning_rate=0.0 if schedule == "constant" else 1e-4, **others)


def rates(records: list[dict[str, Any]]) -> list[float]:
    return [record["learning_rate"] for record in records]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "warmup-stable-decay"])
def test_resumed_in_mid_epoch(train: Train, tmp_path: Path, schedule: str) -> None:
    """As if it had not been interrupted; and with one more epoch as if it had been set so from the start."""
    whole = train("qwen2-tied", **LIFE, dp_size=2, **settings(schedule))
    config = copy_at(whole, tmp_path, step=4)
    run_grid(config.model_dump())
    records = read_metrics(config.run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(5, 13))
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [record[name] for record in records] == [record[name] for record in whole.records[4:]]
    config = config.change(num_epochs=3)
    run_grid(config.model_dump())
    records = read_metrics(config.run_dir / "metrics.jsonl")[8:]
    expected = [rate_of(config.model_dump(), done, 18) for done in range(12, 18)]
    assert rates(records) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("zero_stage, dp_size", [(1, 2), (2, 1), (3, 1)])
def test_resumed_with_another_schedule(train: Train, tmp_path: Path, zero_stage: int, dp_size: int) -> None:
    """And other betas and epsilon, against PyTorch alone with the same change in its loop."""
    now = settings("cosine", num_epochs=3, warmup_steps=0.3, adam_beta1=0.7, adam_beta2=0.9, adam_epsilon=1e-3)
    whole = train("qwen2-untied", **LIFE, zero_stage=zero_stage, dp_size=2 if zero_stage == 1 else 1)
    config = copy_at(whole, tmp_path, step=4).change(**now)
    run, groups, _ = continue_to_the_end(config)
    expected = plain_run({**whole.config, "num_epochs": 3}, later=now, after=4)
    expected.records = expected.records[4:]
    assert_equal_runs(run, expected)
    assert groups[0][0] == pytest.approx(1e-4), "the minimum, after the last step"


def scale_too_high(names: dict[str, Any]) -> None:
    """A patch for `run_grid`: fp16's loss scale begins so high that gradients overflow."""
    from tp2d_helpers.model import engine

    make = engine.deepspeed_config
    engine.deepspeed_config = lambda *args: make(*args) | {"fp16": {"enabled": True, "initial_scale_power": 24}}


def test_resumed_after_steps_that_loss_scaling_left_out(train: Train, tmp_path: Path) -> None:
    """fp16 finds its loss scale by steps that are not taken; the schedule counts those that are, resumed or not."""
    life = dict(num_epochs=2, debug_steps=12, checkpoint_interval=12, precision="fp16", warmup_steps=0)
    whole = train("mistral", patch=scale_too_high, **life, **settings("linear"))
    assert rates(whole.records)[:2] == [RATE, RATE], "no step was left out: this shows nothing"
    config = copy_at(whole, tmp_path, step=12)
    run_grid(config.model_dump())
    assert rates(read_metrics(config.run_dir / "metrics.jsonl")) == rates(whole.records)[12:]
