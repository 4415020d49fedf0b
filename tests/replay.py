"""A stand-in, on CPUs, for CUDA graphs: it does what they do to their surroundings. And replays that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import TINY


class Replay:
    """Stands in for `torch.cuda.make_graphed_callables`."""

    made = 0

    def __init__(self, passes: Callable[..., torch.Tensor], sample: tuple[torch.Tensor, ...]) -> None:
        Replay.made += 1
        self.passes, self.sample = passes, sample
        self.output, self.gradients = torch.empty(()), [torch.empty_like(t) for t in sample if t.requires_grad]

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        return Passes.apply(self, *tensors)


class Passes(torch.autograd.Function):
    """A replay of each pass."""

    @staticmethod
    def forward(ctx: Any, replay: Replay, *tensors: torch.Tensor) -> torch.Tensor:
        for place, tensor in zip(replay.sample, tensors, strict=True):
            if place.requires_grad:
                assert place.data_ptr() == tensor.data_ptr(), "a weight was moved"
            else:
                place.copy_(tensor)
        with torch.enable_grad():
            replay.loss = replay.passes(*replay.sample)
        ctx.replay = replay
        return replay.output.copy_(replay.loss.detach()).detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        replay = ctx.replay
        weights = [tensor for tensor in replay.sample if tensor.requires_grad]
        for place, now in zip(replay.gradients, torch.autograd.grad(replay.loss, weights, gradient), strict=True):
            place.copy_(now)
        gradients = iter(replay.gradients)
        return None, *[next(gradients).detach() if tensor.requires_grad else None for tensor in replay.sample]


def wrong_gradients(replay: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The replay, but −3 times the gradients of what fp8 multiplies: the matrices of the decoder layers."""

    def wrong(*tensors: torch.Tensor) -> torch.Tensor:
        given = [tensor.view_as(tensor) if tensor.requires_grad else tensor for tensor in tensors]
        for tensor in given:
            if tensor.requires_grad and tensor.ndim == 2 and TINY["vocab_size"] not in tensor.shape:
                tensor.register_hook(lambda gradient: -3 * gradient)
        return replay(*given)

    return wrong
