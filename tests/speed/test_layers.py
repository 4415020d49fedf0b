"""The column-wise layers of a block as one product: values and gradients, whichever of them have a bias."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tp2d_helpers.model.engine import load_model
from tp2d_helpers.speed import reducers
from tp2d_helpers.speed.layers import ColumnMatmuls, compile_layers


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


def test_every_rank_gets_the_same_kernels(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]) -> None:
    """The compiler is told not to choose by what it times. `test_two_gpus.py` sees what comes of that."""
    compiled: list[Any] = []

    def compile_fx(graph: torch.fx.GraphModule, inputs: Any, config_patches: dict | None = None, **_: Any) -> Any:
        compiled.append(config_patches)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model, ids = load_model(str(tiny_model("llama")), torch.float32), torch.ones(1, 8, dtype=torch.long)
    compile_layers(model)
    model(ids, use_cache=False)
    assert compiled and all(options["deterministic"] is True for options in compiled)
