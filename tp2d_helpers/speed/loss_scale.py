"""fp16's dynamic loss scale, moved on the device: nothing waits to hear whether a step's gradients overflowed.

DeepSpeed's own steps keep theirs on the host, and use the next step's too early: see `change_scale_after_step`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler


class LossScale:
    """The scale, by the rules of DeepSpeed's `DynamicLossScaler` (hysteresis, and a doubling after a calm window).

    That one, which checkpoints hold, follows a step later: whether a step was left out is known when the next one is
    launched, without anything having waited for it.
    """

    def __init__(self, scaler: DynamicLossScaler, device: torch.device, left_out: Callable[[], None]) -> None:
        """Begin where the scaler is; call `left_out` on the host for each step that turns out to have been left out."""
        self.scaler, self.left_out = scaler, left_out
        self.unknown: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
        calm = scaler.cur_iter - scaler.last_overflow_iter - 1
        state = (scaler.cur_scale, scaler.cur_hysteresis, calm)
        self.value, self.hysteresis, self.calm = (torch.tensor(float(part), device=device) for part in state)

    def move(self, infinite: torch.Tensor) -> None:
        """After a step: move the scale by whether its gradients overflowed, 0-dim, 1 or 0."""
        overflow, rules = infinite.bool(), self.scaler
        lowers = overflow & (self.hysteresis <= 1)
        grows = ~overflow & (self.calm > 0) & (self.calm % rules.scale_window == 0)
        refills = ~overflow if rules.consecutive_hysteresis else grows
        lower = (self.value / rules.scale_factor).clamp(min=rules.min_scale)
        self.value = torch.where(lowers, lower, torch.where(grows, self.value * rules.scale_factor, self.value))
        fewer = torch.where(overflow & ~lowers, self.hysteresis - 1, self.hysteresis)
        self.hysteresis = torch.where(refills, float(rules.delayed_shift), fewer)
        self.calm = torch.where(overflow, 0.0, self.calm + 1)
        self.unknown.append(_sent_to_host(overflow))

    def settle(self) -> None:
        """Let the scaler on the host follow, through all steps launched so far.

        Raises:
            Exception: DeepSpeed's, if gradients overflow at the lowest scale.
        """
        while self.unknown:
            overflow, arrived = self.unknown.pop(0)
            if arrived is not None:
                arrived.synchronize()
            self.scaler.update_scale(bool(overflow))
            if overflow:
                self.left_out()


def change_scale_after_step(optimizer: Any) -> None:
    """Let a step of DeepSpeed's own divide its gradients by the loss scale that they were computed with.

    ZeRO's optimizers move the scale as soon as they know of no overflow, and unscale after that: in a step in which it
    doubles, they would use half of each gradient (DeepSpeed 0.19.8, stages 1, 2 and 3).
    """
    if not optimizer.dynamic_loss_scale:
        return
    step = optimizer.step

    @functools.wraps(step)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        """The step; the scale moves at its end."""
        scaler, overflows = optimizer.loss_scaler, []
        scaler.update_scale = overflows.append
        try:
            result = step(*args, **kwargs)
        finally:
            del scaler.update_scale
        for overflow in overflows:
            scaler.update_scale(overflow)
        return result

    optimizer.step = stepping


def _sent_to_host(flag: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy in host memory, and when it is there."""
    if not flag.is_cuda:
        return flag, None
    copy = torch.empty((), dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event
