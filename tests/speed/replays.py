"""Replays that are wrong, for tests that expect them to be found."""

from __future__ import annotations

from collections.abc import Callable

import torch

VOCABULARY = 2048  # of `conftest.TINY`


def wrong_gradients(replay: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The replay, but −3 times the gradients of what fp8 multiplies: the matrices of the decoder layers."""

    def wrong(*tensors: torch.Tensor) -> torch.Tensor:
        given = [tensor.view_as(tensor) if tensor.requires_grad else tensor for tensor in tensors]
        for tensor in given:
            if tensor.requires_grad and tensor.ndim == 2 and VOCABULARY not in tensor.shape:
                tensor.register_hook(lambda gradient: -3 * gradient)
        return replay(*given)

    return wrong
