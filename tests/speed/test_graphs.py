"""Training by passes that replay equals training as usual: every loss, every gradient norm, the final weights.

On CPU a stand-in does what CUDA graphs do to their surroundings: inputs, loss and gradients lie in one place, which
each replay writes again, and the weights must be where they were.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grid import Run, assert_equal_runs, run_grid
from replay import Replay, wrong_gradients
from transformers import masking_utils

from tp2d_helpers.config import make_config
from tp2d_helpers.model.engine import load_model
from tp2d_helpers.speed import documents, float8, graphs, optimizations, reducers, reductions
from tp2d_helpers.speed.optimizations import chosen_optimizations

Train = Callable[..., Run]
SHAPE = (2, 64)


def _replay(names: dict[str, Any]) -> None:
    optimizations.chosen_optimizations = lambda *arguments: (chosen_optimizations(*arguments)[0] | {"cuda_graph"}, "")
    graphs._graphed, graphs._waits_for_host = Replay, lambda *_: True


def _move_the_weights(names: dict[str, Any]) -> None:
    _replay(names)
    load = names["load_checkpoint"]

    def moving(engine: Any, *arguments: Any) -> Any:
        for parameter in engine.module.parameters():
            parameter.data = parameter.data.clone()
        return load(engine, *arguments)

    names["load_checkpoint"] = moving


@pytest.mark.parametrize("settings", [
    dict(model="llama"),
    dict(model="qwen2-tied", gradient_accumulation_steps=2),
    dict(model="qwen2-tied", gradient_accumulation_steps=2, dp_size=2, zero_stage=2),
    dict(model="qwen3", gradient_accumulation_steps=2, tp_size=2, dp_size=2),
    dict(model="mistral", gradient_accumulation_steps=2),
    dict(model="qwen2-tied", dp_size=2, optimizations="none"),
], ids=lambda settings: " ".join(map(str, settings.values())))  # fmt: skip
def test_equals_passes_as_usual(train: Train, settings: dict[str, Any]) -> None:
    assert_equal_runs(train(**settings, patch=_replay), train(settings["model"]))


def _no_capture_on_rank_1(names: dict[str, Any]) -> None:
    _replay(names)

    def graphed(*arguments: Any) -> Replay:
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\n…")
        return Replay(*arguments)

    graphs._graphed = graphed


@pytest.mark.parametrize("settings", [dict(dp_size=2), dict(dp_size=2, zero_stage=2)], ids=["ZeRO 1", "ZeRO 2"])
def test_no_rank_replays_what_another_could_not_capture(train: Train, settings: dict[str, Any]) -> None:
    """Gradients of a graph come in an order of its own: with those of another rank, buckets would hold a mixture."""
    assert_equal_runs(train("qwen3", patch=_no_capture_on_rank_1, **settings), train("qwen3"))


def test_out_of_memory_beside_waiting_ranks_is_an_error(train: Train) -> None:
    """In a TP group the other ranks wait in an all-reduce of the capture: to go on alone would hang."""
    with pytest.raises(RuntimeError, match=r"Tried to allocate 1 GiB"):
        train("qwen3", tp_size=2, patch=_no_capture_on_rank_1)


def test_evaluation_between_replays(train: Train) -> None:
    evaluated = dict(eval_samples=6, eval_interval=5, tp_size=2)
    run, reference = train("qwen2-tied", patch=_replay, **evaluated), train("qwen2-tied", **evaluated)
    assert_equal_runs(run, reference)
    losses = [[r["eval_loss"] for r in each.records if r["eval_loss"] is not None] for each in (run, reference)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_resumed_run(train: Train, tmp_path: Path) -> None:
    """A checkpoint is loaded after the capture: it must be written into the weights, and not put in their place."""
    name = dict(storage_path=str(tmp_path), experiment_name="resumed", debug_steps=5, tp_size=2)
    train("qwen2-tied", patch=_replay, num_epochs=1, **name)
    run = train("qwen2-tied", patch=_replay, num_epochs=2, **name)
    assert_equal_runs(run, train("qwen2-tied", num_epochs=2, debug_steps=5))


def _replays_left(*_: Any) -> tuple[int, int]:
    return Replay.made, sum(isinstance(found, Replay) for found in gc.get_objects())


def test_graphs_end_before_the_process_groups(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Else NCCL, whose collectives they hold, would wait for ever to destroy its communicators."""
    config = make_config(
        model_name=str(tiny_model("qwen2-tied")), dataset_name="demo", use_gpu=False, tp_size=2, dp_size=1,
        batch_size_per_gpu=2, seq_length=64, debug_steps=2, storage_path=str(tmp_path),
    )  # fmt: skip
    assert run_grid(config.model_dump(), after=_replays_left, patch=_replay) == [(1, 0), (1, 0)]


def test_moved_weights_are_found(train: Train) -> None:
    with pytest.raises(RuntimeError, match="a weight was moved"):
        train("qwen2-tied", patch=_move_the_weights)


def test_a_model_that_asks_the_gpu(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]) -> None:
    """What can't be captured runs as before, and the reason is one line."""

    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be …")

    model = load_model(str(tiny_model("llama")), torch.float32)
    forward = model.forward
    monkeypatch.setattr(graphs, "_graphed", fail)
    monkeypatch.setattr(graphs, "_waits_for_host", lambda *_: True)
    assert graphs.replay_passes(model, SHAPE, alone=True) == "rank 0: operation not permitted when stream is capturing"
    assert model.forward == forward


def test_a_capture_that_fails_restarts_the_reductions(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    """One that was cut off on this rank, or on another one, has left them at another turn than the peer's."""
    model, restarts = load_model(str(tiny_model("llama")), torch.float32), []
    monkeypatch.setattr(graphs, "_captured", lambda *_: (None, "rank 1: it failed there"))
    assert graphs.replay_passes(model, SHAPE, True, lambda: restarts.append(True)) == "rank 1: it failed there"
    assert restarts == [True]


def test_peer_copies_restart_from_anywhere() -> None:
    barriers = []
    copies = object.__new__(reducers.PeerCopies)
    copies.works, copies.pending, copies.filled, copies.turn = [object()], [object()], 7, 1
    copies.handle = SimpleNamespace(barrier=lambda channel: barriers.append(channel))
    copies.restart()
    assert (copies.works, copies.pending, copies.filled, copies.turn, barriers) == ([], [], 0, 0, [0])


def _host_bound_on_rank_1(names: dict[str, Any]) -> None:
    _replay(names)
    graphs.may_be_host_bound = lambda *_: dist.get_rank() == 1
    graphs._graphed = _no_graph_here


def _no_graph_here(*_: Any) -> None:
    raise RuntimeError("no graph here")


def test_ranks_of_uneven_shards_ask_together(train: Train, family: Callable[..., Path]) -> None:
    """Whether a layer is small enough to try: an MLP of 177 is 89 on one rank and 88 on the other."""
    settings = dict(tp_size=2, debug_steps=2)
    run = train(family("ministral3", intermediate_size=177), patch=_host_bound_on_rank_1, **settings)
    assert len(run.records) == 2


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_wrong_replays_are_refused_in_every_precision(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path], precision: str, device: str
) -> None:
    """Before the first step, when an engine captures its passes: fp8's cast weights must be there by then."""
    model, graphed = load_model(str(tiny_model("qwen2-untied")), torch.bfloat16).to(device), graphs._graphed
    documents.skip_search_for_packed_samples(model)
    if precision == "fp8":
        float8.compute_in_fp8(SimpleNamespace(module=model, global_steps=0), compiled=False)
    monkeypatch.setattr(graphs, "_waits_for_host", lambda *_: True)
    right = graphed if device == "cuda" else Replay
    for made, said in ((lambda *arguments: wrong_gradients(right(*arguments)), "off by "), (right, "")):
        monkeypatch.setattr(graphs, "_graphed", made)
        assert said in (trouble := graphs.replay_passes(model, SHAPE, alone=True)) and bool(trouble) == bool(said)


def test_nothing_is_compared_with_zero(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]) -> None:
    model = load_model(str(tiny_model("qwen2-untied")), torch.float32)
    for weight in model.parameters():
        weight.data.zero_()
    monkeypatch.setattr(graphs, "_waits_for_host", lambda *_: True)
    monkeypatch.setattr(graphs, "_graphed", Replay)
    assert "gradients of its passes are zero" in graphs.replay_passes(model, SHAPE, alone=True)


class Stale(Replay):
    """A replay that reads what the first one was given."""

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        self.tokens = getattr(self, "tokens", [tensor.clone() for tensor in tensors[:2]])
        return super().__call__(*self.tokens, *tensors[2:])


def test_replays_are_compared_with_the_passes(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    model = load_model(str(tiny_model("llama")), torch.float32)
    forward = model.forward
    monkeypatch.setattr(graphs, "_waits_for_host", lambda *_: True)
    monkeypatch.setattr(graphs, "_graphed", Stale)
    trouble = graphs.replay_passes(model, SHAPE, alone=True)
    assert trouble.startswith("rank 0: the gradients of its replays are off by 1") and model.forward == forward
    monkeypatch.setattr(graphs, "_graphed", Replay)
    assert graphs.replay_passes(model, SHAPE, alone=True) == "" and model.forward != forward


def test_every_pass_restarts_the_reductions(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]) -> None:
    """Forward and backward of what is captured, and what runs as before."""
    model, restarts = load_model(str(tiny_model("llama")), torch.float32), []
    monkeypatch.setattr(graphs, "_waits_for_host", lambda *_: True)
    monkeypatch.setattr(graphs, "_graphed", Replay)
    assert graphs.replay_passes(model, SHAPE, True, lambda: restarts.append(len(restarts))) == ""
    ids, count = torch.ones(SHAPE, dtype=torch.long), torch.tensor(128.0)
    for samples, expected in ((SHAPE[0], 2), (1, 1)):  # a stand-in's passes, and a shape that isn't replayed
        restarts.clear()
        model(input_ids=ids[:samples], labels=ids[:samples], num_items_in_batch=count).loss.backward()
        assert len(restarts) == expected


def test_samples_are_one_sequence_unless_positions_are_given(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    """`transformers` packs several into a sample if its position ids start again."""
    model = load_model(str(tiny_model("llama")), torch.float32)
    ids, packed = torch.arange(2 * 32).view(2, 32), torch.arange(16).repeat(2, 2)
    expected = [model(input_ids=ids, **given).logits for given in ({}, {"position_ids": packed})]
    assert not torch.allclose(*expected)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", masking_utils.find_packed_sequence_indices)
    documents.skip_search_for_packed_samples(model)
    for _ in range(2):
        assert torch.equal(model(input_ids=ids).logits, expected[0])
        assert masking_utils.find_packed_sequence_indices(packed) is None  # nobody asks
        assert torch.equal(model(input_ids=ids, position_ids=packed).logits, expected[1])


def test_host_bound() -> None:
    """By 6 operations per token and weight: a layer of Qwen2.5-0.5B, and of Qwen2-7B halved."""
    assert graphs.host_bound(14.9e6, 8 * 1024) and not graphs.host_bound(14.9e6, 32 * 2048)
    assert graphs.host_bound(117e6, 1024) and not graphs.host_bound(117e6, 4 * 4096)


@pytest.mark.parametrize("settings, on_gpu, chosen", [
    (dict(), True, True),
    (dict(), False, False),
    (dict(tp_size=2), True, True),
    (dict(tp_size=2, optimizations="cuda_graph,block_all_reduce,peer_copies"), True, True),
    (dict(activation_checkpointing="full"), True, False),
    (dict(zero_stage=3), True, False),
    (dict(packing="documents"), True, False),
    (dict(packing="documents", optimizations="compile,cuda_graph"), True, False),
])  # fmt: skip
def test_when_graphs_are_chosen(settings: dict[str, Any], on_gpu: bool, chosen: bool) -> None:
    names, without = chosen_optimizations(settings, on_gpu)
    assert ("cuda_graph" in names) == chosen
    assert without.startswith("no cuda_graph: micro-batches hold") == ("packing" in settings)


@on_gpu
def test_replays_on_a_gpu(tiny_model: Callable[[str], Path]) -> None:
    """The passes of real graphs, between them one of another shape, which they leave alone."""
    found = []
    for replays in (False, True):
        model = load_model(str(tiny_model("llama")), torch.float32).cuda()
        documents.skip_search_for_packed_samples(model)
        if replays:
            assert graphs.replay_passes(model, SHAPE, alone=True) == ""
        optimizer, draw, losses = torch.optim.SGD(model.parameters(), lr=0.1), torch.Generator().manual_seed(0), []
        for samples in (2, 2, 1, 2, 2):
            ids = torch.randint(2048, (samples, SHAPE[1]), generator=draw).cuda()
            count = torch.tensor(float(samples * SHAPE[1] - 1), device="cuda")
            losses.append(model(input_ids=ids, labels=ids, num_items_in_batch=count).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.stack(losses))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


@on_gpu
def test_sums_in_a_graph(tmp_path: Path) -> None:
    """The products of `reductions.py`, with NCCL's sums over a group of one."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        name = dist.group.WORLD.group_name
        reductions.register(dist.group.WORLD)
        y, weight = torch.ones(8, 16, device="cuda"), torch.ones(4, 16, device="cuda")
        dist.all_reduce(y.clone())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = torch.ops.tp2d.row_matmul(y, weight, name)
            dx, _ = torch.ops.tp2d.column_gradients(y, [z], [weight], name)
        for factor in (2, 3):
            y.fill_(factor)
            graph.replay()
            assert z.tolist() == [[16 * factor] * 4] * 8 and dx.tolist() == [[64 * factor] * 16] * 8
    finally:
        dist.destroy_process_group()
