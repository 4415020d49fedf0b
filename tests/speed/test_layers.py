"""The column-wise layers of a block as one product: values and gradients, whichever of them have a bias."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from tp2d_helpers.speed import reducers
from tp2d_helpers.speed.layers import ColumnMatmuls


class Alone:
    """A group of one rank: its sums are its parts."""

    def begin(self, part: torch.Tensor) -> None:
        """Nothing travels."""

    def finish(self) -> None:
        """Nothing to wait for."""


@pytest.mark.parametrize("widths", [(6, 6, 6), (8, 4, 4)], ids=["apart", "merged"])
@pytest.mark.parametrize("biased", list(itertools.product([True, False], repeat=3)), ids=str)
def test_biases_of_some_of_the_layers(
    monkeypatch: pytest.MonkeyPatch, widths: tuple[int, ...], biased: tuple[bool, ...]
) -> None:
    monkeypatch.setitem(reducers.REDUCERS, "alone", Alone())
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(width, 5, dtype=torch.float64, requires_grad=True) for width in widths]
    biases = [
        torch.randn(width, dtype=torch.float64, requires_grad=True) if has else None
        for width, has in zip(widths, biased, strict=True)
    ]
    inputs = [tensor for tensor in (x, *weights, *biases) if tensor is not None]
    results = []
    for outputs in (
        ColumnMatmuls.apply(x, "alone", *weights, *biases),
        [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)],
    ):
        loss = sum((output**2).sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
