"""fp16's loss scale on the device is DeepSpeed's on the host, and steps that it leaves out are left out alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from grid import Run

from tp2d_helpers.model.engine import load_model
from tp2d_helpers.speed.loss_scale import LossScale


@pytest.mark.parametrize("consecutive", [False, True])
@pytest.mark.parametrize("hysteresis", [1, 2, 3])
def test_follows_the_rules_of_deepspeed(hysteresis: int, consecutive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)  # it prints on rank 0

    def scaler() -> DynamicLossScaler:
        return DynamicLossScaler(2.0**16, scale_window=3, min_scale=1.0, delayed_shift=hysteresis,
                                 consecutive_hysteresis=consecutive, raise_error_at_min_scale=False)  # fmt: skip

    draw, theirs, left_out = random.Random(hysteresis), scaler(), []
    ours = LossScale(scaler(), torch.device("cpu"), lambda: left_out.append(True))
    seen = set()
    for step in range(300):
        overflow = draw.random() < (0.5 if step % 100 < 30 else 0.05)
        theirs.update_scale(overflow)
        ours.move(torch.tensor(float(overflow)))
        assert ours.value.item() == theirs.cur_scale
        seen.add(theirs.cur_scale)
        if step % 7 == 0:
            ours.settle()
            assert vars(ours.scaler) == vars(theirs)
    assert len(seen) > 5 and len(left_out) > 30
    ours.settle()
    again = LossScale(ours.scaler, torch.device("cpu"), lambda: None)  # as after a resume
    assert (again.value, again.hysteresis, again.calm) == (ours.value, ours.hysteresis, ours.calm)


def _scale_of(names: dict[str, Any], fp16: dict[str, int]) -> None:
    from tp2d_helpers.model import engine

    make = engine.deepspeed_config
    engine.deepspeed_config = lambda *args: make(*args) | {"fp16": {"enabled": True, **fp16}}


def _high_scale(names: dict[str, Any]) -> None:
    _scale_of(names, {"initial_scale_power": 24, "loss_scale_window": 4})


def _doubling(names: dict[str, Any]) -> None:
    """From 2¹⁰ on, every second step."""
    _scale_of(names, {"initial_scale_power": 10, "loss_scale_window": 2})


def _constant(names: dict[str, Any]) -> None:
    _scale_of(names, {"initial_scale_power": 10, "loss_scale_window": 1000})


@pytest.mark.parametrize("zero_stage, optimizations, max_grad_norm", [
    (1, "none", 0.0), (3, "auto", 0.0), (2, "auto", 0.5),
])  # fmt: skip
def test_a_step_that_doubles_the_scale(
    train: Callable[..., Run], tiny_model: Callable[[str], Path], zero_stage: int, optimizations: str,
    max_grad_norm: float,
) -> None:  # fmt: skip
    """It takes the gradients as they are: a power of two changes nothing but what is too small for fp16.

    AdamW's steps are as long as the gradients are large here, for an epsilon above them.
    """
    settings = dict(precision="fp16", zero_stage=zero_stage, dp_size=2, optimizations=optimizations, debug_steps=8,
                    warmup_steps=0, weight_decay=0.0, adam_epsilon=0.5, learning_rate=0.1,
                    max_grad_norm=max_grad_norm)  # fmt: skip
    run, same = (train("mistral", patch=patch, **settings) for patch in (_doubling, _constant))
    assert run.records[-1]["loss_scale"] >= 2**12 and same.records[-1]["loss_scale"] == 2**10
    norms = [[record["grad_norm"] for record in each.records] for each in (run, same)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    start = load_model(str(tiny_model("mistral")), torch.float32)
    for name, weight in same.weights.items():
        moved = (weight - start.get_parameter(name).detach()).norm()
        assert (run.weights[name] - weight).norm() < 0.03 * moved, name


@pytest.mark.parametrize("grid", [dict(dp_size=2), dict(tp_size=2, zero_stage=2, gradient_accumulation_steps=2)])
def test_a_run_is_that_of_deepspeeds_step(train: Callable[..., Run], grid: dict[str, int]) -> None:
    """The same steps are left out, the scale and the learning rate are the same, and the losses are fp16's."""
    ours, theirs = (
        train("mistral", precision="fp16", learning_rate_schedule="linear", patch=_high_scale,
              optimizations=optimizations, **grid)
        for optimizations in ("block_all_reduce,fused_loss,fused_step", "block_all_reduce,fused_loss")
    )  # fmt: skip
    for name in ("loss_scale", "learning_rate"):
        assert [record[name] for record in ours.records] == [record[name] for record in theirs.records], name
    left_out = [record["grad_norm"] is None for record in ours.records]
    assert 2 < sum(left_out) < 15 and len({record["loss_scale"] for record in ours.records}) > 3
    for name, tolerance in (("loss", 2e-3), ("grad_norm", 3e-2)):
        pairs = [(now[name], then[name]) for now, then in zip(ours.records, theirs.records, strict=True)]
        pairs = [pair for pair in pairs if None not in pair and pair[1] > 0]  # DeepSpeed's norm of such a step is -1
        assert [now for now, _ in pairs] == pytest.approx([then for _, then in pairs], rel=tolerance)
