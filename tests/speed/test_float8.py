"""fp8: the cast, the gradients beside bf16's, and whole runs on every kind of grid, beside bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import run_grid

from tp2d_helpers.config import make_config
from tp2d_helpers.speed import float8
from tp2d_helpers.training.metrics import read_metrics


@pytest.mark.parametrize("largest", [1e-6, 1.0, 3e4])
def test_cast(largest: float) -> None:
    """The largest magnitude stays, others are off by half a unit in the last place, 2⁻⁴."""
    x = torch.linspace(-1, 1, 1001).mul(largest).bfloat16()
    found, scale = float8.cast(x)
    back = found.float() * scale
    assert torch.isfinite(back).all() and back.abs().max().item() == pytest.approx(largest, rel=1e-2)
    large = x.abs() > largest / 100
    error = ((back - x.float()).abs() / x.float().abs())[large].max().item()
    assert error <= 2**-4 * 1.01
    assert float8.cast(torch.zeros(3))[0].float().tolist() == [0, 0, 0]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="fp8 on a GPU")


@pytest.mark.parametrize("device, compiled", [
    ("cpu", False), pytest.param("cuda", False, marks=on_gpu), pytest.param("cuda", True, marks=on_gpu),
])  # fmt: skip
def test_gradients_are_those_of_bf16(device: str, compiled: bool) -> None:
    """Of a layer of 64 × 48 by itself: output, and gradients of input, weight and bias, within 6 % in norm."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 48).to(device, torch.bfloat16)
    x = torch.randn(2, 32, 64).to(device, torch.bfloat16)
    gradient = torch.randn(2, 32, 48).to(device, torch.bfloat16)
    found = []
    for kind in (torch.nn.Linear, float8.Linear):
        plain.__class__, plain.float8 = kind, float8.Weights([plain])
        plain.float8.refresh(float8.cast_weights)
        given = x.clone().requires_grad_()
        plain.zero_grad()
        output = (torch.compile(plain, dynamic=False) if compiled else plain)(given)
        output.backward(gradient)
        found.append([output.detach(), given.grad, plain.weight.grad, plain.bias.grad])
    for exact, rough in zip(*found, strict=True):
        assert ((rough - exact).float().norm() / exact.float().norm()).item() < 0.06
    assert not torch.equal(found[0][0], found[1][0])


@pytest.fixture(scope="module")
def losses(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """losses(precision, **settings): of 20 steps of a tiny Qwen2."""

    def run(precision: str, **settings: Any) -> list[float]:
        grid = dict(tp_size=1, dp_size=1, batch_size_per_gpu=4) | settings
        config = make_config(
            model_name=str(tiny_model("qwen2-tied")), dataset_name="demo", use_gpu=False, seq_length=64, debug_steps=20,
            learning_rate=1e-3, storage_path=str(tmp_path_factory.mktemp("run")), **grid,
        )  # fmt: skip
        run_grid(config.model_dump() | dict(precision=precision))
        return [record["loss"] for record in read_metrics(config.run_dir / "metrics.jsonl")]

    return run


@pytest.mark.parametrize("grid", [
    dict(), dict(tp_size=2), dict(tp_size=2, dp_size=2, batch_size_per_gpu=1, gradient_accumulation_steps=2),
    dict(dp_size=2, batch_size_per_gpu=2, zero_stage=2, activation_checkpointing="full"),
])  # fmt: skip
def test_losses_beside_bf16(losses: Callable[..., list[float]], grid: dict[str, Any]) -> None:
    exact, rough = losses("bf16"), losses("fp8", **grid)
    assert rough != exact and rough == pytest.approx(exact, rel=0.01)
    assert exact[-1] < 0.95 * exact[0]
