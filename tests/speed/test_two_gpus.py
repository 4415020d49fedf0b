"""Whole runs on two GPUs: each grid and switch beside one GPU and none of them; fp8 and fp16 beside bf16."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grid import Run, assert_alike_on_all_ranks, assert_equal_runs
from replay import wrong_gradients

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


def _no_capture_on_rank_1(names: dict[str, Any]) -> None:
    """It ends in the midst of its capture: its copies are at another turn then than those of rank 0.

    The passes before it, which warm up, are real on both: they reduce over the ranks, and would wait for one that left.
    """
    _copies_in_graphs(names)
    graphed = graphs._graphed

    def failing(passes: Any, inputs: Any) -> Any:
        def cut_off(*tensors: Any) -> Any:
            loss = passes(*tensors)
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("no capture here")
            return loss

        return graphed(cut_off if dist.get_rank() == 1 else passes, inputs)

    graphs._graphed = failing


def _wrong_replays(names: dict[str, Any]) -> None:
    """Replays that give −3 times the gradients of the decoder layers' matrices: they must be found, and not be used."""
    _copies_in_graphs(names)
    graphed = graphs._graphed
    graphs._graphed = lambda *arguments: wrong_gradients(graphed(*arguments))


KINDS: dict[str, dict[str, Any]] = {  # of the sides that suit fp8
    "qwen2": dict(hidden_size=128, intermediate_size=256, head_dim=16),
    "qwen3_moe": dict(head_dim=16, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=48, norm_topk_prob=True),
    "gemma3_text": dict(head_dim=16, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"],
                        sliding_window=32),
}  # fmt: skip
EVALUATED = dict(eval_samples=6, eval_interval=5)
EQUAL: list[dict[str, Any]] = [
    dict(tp_size=2), dict(tp_size=2, optimizations=COPIES, patch=_copies), dict(tp_size=2, patch=_copies_in_graphs),
    dict(tp_size=2, gradient_accumulation_steps=2, **EVALUATED, patch=_copies_in_graphs),
    dict(tp_size=2, patch=_no_capture_on_rank_1),
    dict(dp_size=2), dict(dp_size=2, gradient_accumulation_steps=2), dict(dp_size=2, zero_stage=2),
    dict(dp_size=2, zero_stage=2, gradient_accumulation_steps=2), dict(dp_size=2, zero_stage=3),
    dict(tp_size=2, activation_checkpointing="full"), dict(tp_size=2, optimizations="none"),
    dict(kind="qwen3_moe", tp_size=2), dict(kind="gemma3_text", tp_size=2), dict(lora_rank=8, tp_size=2),
    *[dict(tp_size=2, optimizations=name) for name in OPTIMIZATIONS if name not in ("peer_copies", "cuda_graph")],
]  # fmt: skip
NEAR: list[dict[str, Any]] = [
    dict(precision=precision, **grid)
    for precision in ("fp8", "fp16")
    for grid in (dict(), dict(tp_size=2), dict(dp_size=2))
] + [dict(precision="bf16", tp_size=2), dict(precision="fp8", tp_size=2, patch=_wrong_replays)]
BF16 = dict(precision="bf16", optimizations="none")


def _name(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in settings.items())


def _reference(settings: dict[str, Any]) -> dict[str, Any]:
    """The same training, in fp32 on one GPU and by none of the optimizations."""
    same = ("kind", "lora_rank", *EVALUATED)
    return dict(optimizations="none") | {name: settings[name] for name in same if name in settings}


@pytest.fixture(scope="module")
def run_of(
    request: pytest.FixtureRequest, train: Callable[..., Run], family: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Run]]:  # fmt: skip
    """run_of(settings): a run of a small model. Those that the chosen tests need begin before they are asked for."""
    folders, threads = {kind: family(kind, **shape) for kind, shape in KINDS.items()}, ThreadPoolExecutor(AT_ONCE)
    tmp_path_factory.getbasetemp()  # two threads can't make it at once
    futures: dict[str, Future] = {}
    chosen = [item.callspec.params["settings"] for item in request.session.items if item.module is request.module]
    for settings in itertools.chain.from_iterable((given, _reference(given)) for given in [BF16, *chosen]):
        given = dict(kind="qwen2", use_gpu=True, precision="fp32") | settings
        if _name(settings) not in futures:
            futures[_name(settings)] = threads.submit(train, folders[given.pop("kind")], **given)
    yield lambda settings: futures[_name(settings)].result()
    threads.shutdown(cancel_futures=True)


@pytest.mark.parametrize("settings", EQUAL, ids=_name)
def test_equals_one_gpu(run_of: Callable[..., Run], settings: dict[str, Any]) -> None:
    run, reference = run_of(settings), run_of(_reference(settings))
    # Rounding may send a token to another expert: a step of its row is 0.02 of an embedding of 2,048.
    assert_equal_runs(run, reference, weight=0.05 if "moe" in settings.get("kind", "") else 0.01)
    losses = [[r["eval_loss"] for r in each.records if r["eval_loss"] is not None] for each in (run, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("settings", NEAR, ids=_name)
def test_losses_beside_bf16(run_of: Callable[..., Run], settings: dict[str, Any]) -> None:
    assert_alike_on_all_ranks(run_of(settings))
    rough, exact = run_of(settings).losses(), run_of(BF16).losses()
    assert rough != exact and rough == pytest.approx(exact, rel=0.01)
    assert exact[-1] < 0.95 * exact[0]
