"""fp16's loss scale on the device is DeepSpeed's on the host, and steps that it leaves out are left out alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from grid import Run

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


def _high_scale(names: dict[str, Any]) -> None:
    from tp2d_helpers.model import engine

    make, fp16 = engine.deepspeed_config, {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 4}
    engine.deepspeed_config = lambda *args: make(*args) | {"fp16": fp16}


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
