"""Whole runs on two GPUs: each grid and switch beside one GPU and none of them; fp8 and fp16 beside bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import Run, assert_equal_runs

from tp2d_helpers.config import OPTIMIZATIONS
from tp2d_helpers.speed import graphs, reducers, reductions

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
AT_ONCE = 6  # runs; many that share a GPU wait for each other's turns
COPIES = "compile,block_all_reduce,peer_copies,fused_loss,fused_step"


def _copies(names: dict[str, Any]) -> None:
    """However small it is, half of what is all-reduced travels by copy engine while the other half is computed."""
    reducers.BYTES_TO_COPY, reductions.ROWS_TO_HALVE = 0, 16


def _copies_in_graphs(names: dict[str, Any]) -> None:
    _copies(names)
    graphs._waits_for_host = lambda *_: True


EVALUATED = dict(eval_samples=6, eval_interval=5)
EQUAL: list[dict[str, Any]] = [
    dict(tp_size=2), dict(tp_size=2, optimizations=COPIES, patch=_copies), dict(tp_size=2, patch=_copies_in_graphs),
    dict(tp_size=2, gradient_accumulation_steps=2, **EVALUATED, patch=_copies_in_graphs),
    dict(dp_size=2), dict(dp_size=2, gradient_accumulation_steps=2), dict(dp_size=2, zero_stage=2),
    dict(dp_size=2, zero_stage=2, gradient_accumulation_steps=2), dict(dp_size=2, zero_stage=3),
    dict(tp_size=2, activation_checkpointing="selective"), dict(tp_size=2, optimizations="none"),
    *[dict(tp_size=2, optimizations=name) for name in OPTIMIZATIONS if name not in ("peer_copies", "cuda_graph")],
]  # fmt: skip
NEAR: list[dict[str, Any]] = [
    dict(precision=precision, **grid)
    for precision in ("fp8", "fp16")
    for grid in (dict(), dict(tp_size=2), dict(dp_size=2))
]
FP32, BF16 = dict(optimizations="none"), dict(precision="bf16", optimizations="none")
FP32_EVALUATED = FP32 | EVALUATED


def _name(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in settings.items())


@pytest.fixture(scope="module")
def run_of(
    request: pytest.FixtureRequest, train: Callable[..., Run], family: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Run]]:  # fmt: skip
    """run_of(settings): a run of a small Qwen2 whose sides suit fp8. All that the chosen tests need begin at once."""
    folder, threads = family("qwen2", hidden_size=128, intermediate_size=256, head_dim=16), ThreadPoolExecutor(AT_ONCE)
    tmp_path_factory.getbasetemp()  # two threads can't make it at once
    futures: dict[str, Future] = {}
    chosen = [item.callspec.params["settings"] for item in request.session.items if item.module is request.module]
    for settings in (FP32, FP32_EVALUATED, BF16, *chosen):
        given = dict(use_gpu=True, precision="fp32") | settings
        futures[_name(settings)] = threads.submit(train, folder, **given)
    yield lambda settings: futures[_name(settings)].result()
    threads.shutdown(cancel_futures=True)


@pytest.mark.parametrize("settings", EQUAL, ids=_name)
def test_equals_one_gpu(run_of: Callable[..., Run], settings: dict[str, Any]) -> None:
    run, reference = run_of(settings), run_of(FP32_EVALUATED if "eval_samples" in settings else FP32)
    assert_equal_runs(run, reference)
    losses = [[r["eval_loss"] for r in each.records if r["eval_loss"] is not None] for each in (run, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("settings", NEAR, ids=_name)
def test_losses_beside_bf16(run_of: Callable[..., Run], settings: dict[str, Any]) -> None:
    rough, exact = run_of(settings).losses(), run_of(BF16).losses()
    assert rough != exact and rough == pytest.approx(exact, rel=0.01)
    assert exact[-1] < 0.95 * exact[0]
