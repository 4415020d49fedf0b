"""The planner's formulas against hand-worked numbers, and against what training really sends and holds.

The collectives are counted on a grid of CPU processes, in fp32 (`width=4`). What DeepSpeed sends doesn't depend on the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grid import run_grid
from transformers import AutoModelForCausalLM

from tp2d_helpers.config import make_config
from tp2d_helpers.demo import SHAPES
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.planning.traffic import state_bytes, tp_bytes, zero_bytes

STEPS, ACCUMULATION, BATCH, SEQ_LENGTH = 2, 3, 2, 64
# Collective → how often a ring of n ranks sends (n−1)/n of the largest tensor in its arguments.
RINGS = {"all_reduce": 2, "reduce": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
SENT: list[tuple[str, list[int], list[int], float]] = []  # (collective, ranks, shape, bytes sent by each rank)


def test_parameter_count(tiny_model: Callable[[str], Path]) -> None:
    for name in ("qwen2-tied", "qwen2-untied", "qwen3"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model(name))
        assert ModelFacts.of(model.config).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape("qwen2.5-0.5b").parameters == 494_032_768  # as published
    assert shape("llama-3-8b").parameters == 8_030_261_248


def test_shard_parameters_by_hand() -> None:
    """Llama-3-8B at tp 4: the embedding and 65 norms stay whole."""
    whole = 128_256 * 4096 + 65 * 4096
    assert shape("llama-3-8b").shard(4).parameters == (8_030_261_248 - whole) // 4 + whole
    assert shape("llama-3-8b").shard(1).parameters == 8_030_261_248


@pytest.mark.parametrize("name, tp_size, expected", [
    ("llama-3-8b", 4, 2 * 3 / 4 * 2 * 10 * 4096 * (32 * 4 + 1)),  # untied: the head's input gradient
    ("demo", 2, 2 * 1 / 2 * 2 * 10 * 128 * (4 * 4 + 2)),  # tied: and the output of the embedding
    ("demo", 1, 0),
])  # fmt: skip
def test_tp_bytes_by_hand(name: str, tp_size: int, expected: float) -> None:
    """Two forward, two backward, whatever the number of column-wise layers."""
    assert tp_bytes(shape(name), tp_size, tokens=10) == expected


def test_tp_bytes_with_an_all_reduce_per_column_wise_layer() -> None:
    sent = tp_bytes(shape("llama-3-8b"), 4, tokens=10, block_all_reduce=False)
    assert sent == 2 * 3 / 4 * 2 * 10 * 4096 * (32 * 7 + 1)


@pytest.mark.parametrize("stage, accumulation, sent", [
    (1, 1, 4 + 2), (1, 5, 4 + 2), (2, 1, 4 + 2), (2, 5, 5 * 4 + 2), (3, 1, 4 + 2 * 2), (3, 5, 5 * 8),
])  # fmt: skip
def test_zero_bytes_by_hand(stage: int, accumulation: int, sent: int) -> None:
    """Weights in bf16, sums in fp32."""
    assert zero_bytes(1000, 4, stage, accumulation) == 3 / 4 * 1000 * sent
    assert zero_bytes(1000, 1, stage, accumulation) == 0


@pytest.mark.parametrize("stage, expected", [
    (0, (1000, 2000, 6000)), (1, (1000, 2000, 1500)), (2, (1000, 500, 1500)), (3, (250, 500, 1500)),
])  # fmt: skip
def test_state_bytes_by_hand(stage: int, expected: tuple[int, ...]) -> None:
    """A shard of 500 parameters at dp 4: 1000 bytes in bf16, 2000 in fp32; masters and moments are 6000."""
    assert tuple(state_bytes(500, 4, stage).values()) == expected


@pytest.mark.parametrize("model, stage, optimizations", [
    ("qwen2-tied", 1, "auto"), ("llama", 2, "auto"), ("qwen3", 1, "auto"), ("qwen3", 1, "none"),
])  # fmt: skip
def test_sent_and_held_on_2_by_2(
    model: str, stage: int, optimizations: str, train_counting: Callable[..., SimpleNamespace]
) -> None:
    """TP's activations exactly; ZeRO's flat buffers and the optimizer's state up to their padding."""
    run = train_counting(model, tp_size=2, dp_size=2, zero_stage=stage, optimizations=optimizations)
    in_tp_group, hidden = [call for call in run.sent if call[1] == [0, 1]], run.model.hidden
    shapes = [BATCH, SEQ_LENGTH, hidden], [BATCH * SEQ_LENGTH, hidden]
    activations = total(call for call in in_tp_group if call[2] in shapes)
    per_batch = tp_bytes(run.model, 2, BATCH * SEQ_LENGTH, width=4, block_all_reduce=optimizations == "auto")
    assert activations == STEPS * ACCUMULATION * per_batch
    # What tp_bytes leaves out: the loss's two numbers per token and rank, and Qwen3's q_norm and k_norm.
    assert total(in_tp_group) < 1.02 * activations

    shard = run.model.shard(2).parameters
    assert run.parameters == shard
    in_dp_group = (call for call in run.sent if call[1] == [0, 2])
    assert total(in_dp_group) == pytest.approx(STEPS * zero_bytes(shard, 2, stage, ACCUMULATION, width=4), rel=1e-3)
    held = state_bytes(shard, 2, stage, width=4)
    assert run.weights == held["weights"]
    assert run.optimizer == pytest.approx(held["masters and moments"], rel=1e-3)


def test_sent_by_a_mixture(family: Callable[..., Path], train_counting: Callable[..., SimpleNamespace]) -> None:
    """OLMoE's experts and its norms over all heads: hidden states, the router's weights, and sums of squares."""
    model = family("olmoe", num_experts=4, num_experts_per_tok=2, intermediate_size=64)
    run, tokens = train_counting(model, tp_size=2, dp_size=1), BATCH * SEQ_LENGTH
    sizes = {(*shape, last) for shape in ((BATCH, SEQ_LENGTH), (tokens,)) for last in (run.model.hidden, 2, 1)}
    activations = total(call for call in run.sent if tuple(call[2]) in sizes)
    assert activations == STEPS * ACCUMULATION * tp_bytes(run.model, 2, tokens, width=4)


def test_sent_by_stage_3(train_counting: Callable[..., SimpleNamespace]) -> None:
    """It gathers a small model once or a bit more per micro-batch, and never more than the formula's twice."""
    run = train_counting("qwen2-tied", tp_size=1, dp_size=2, zero_stage=3)
    expected = STEPS * zero_bytes(run.model.parameters, 2, 3, ACCUMULATION, width=4)
    gathered = total(call for call in run.sent if call[0] == "all_gather_into_tensor")
    assert 1 / 2 <= gathered / (expected * 2 / 3) <= 1
    assert total(run.sent) - gathered == pytest.approx(expected / 3, rel=1e-3)


def total(calls: Iterable[tuple]) -> float:
    return sum(sent for *_, sent in calls)


def shape(name: str) -> Any:
    return ModelFacts.of_shape(SHAPES[name])


@pytest.fixture
def train_counting(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """train_counting(model, **grid) trains `STEPS` steps; returns what rank 0 sent and holds."""

    def run(model: str | Path, **settings: Any) -> SimpleNamespace:
        folder = model if isinstance(model, Path) else tiny_model(model)
        config = make_config(
            model_name=str(folder), dataset_name="demo", use_gpu=False, seq_length=SEQ_LENGTH,
            batch_size_per_gpu=BATCH, gradient_accumulation_steps=ACCUMULATION, debug_steps=STEPS,
            storage_path=str(tmp_path), **settings,
        )  # fmt: skip
        answer = run_grid(config.model_dump(), after=measure, patch=count_traffic)[0]
        return SimpleNamespace(**answer, model=ModelFacts.read(config.model_name))

    return run


def count_traffic(names: dict[str, Any]) -> None:
    """Put counters around the collectives, from the end of the setup on: what it broadcasts is sent once per run."""
    for name, times in RINGS.items():
        setattr(dist, name, _counted(name, times, getattr(dist, name)))
    setup = names["setup_model_with_autotp"]

    def then_count(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        result[0].whole_weights.compare = lambda: None  # before a checkpoint, and not in each step
        SENT.clear()
        return result

    names["setup_model_with_autotp"] = then_count


def _counted(name: str, times: int, collective: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        groups = [value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup)]
        ranks = dist.get_process_group_ranks(groups[0] if groups else dist.group.WORLD)
        largest = max(tensors, key=torch.numel)
        sent = times * (len(ranks) - 1) / len(ranks) * largest.numel() * largest.element_size()
        SENT.append((name, ranks, list(largest.shape), sent))
        return collective(*args, **kwargs)

    return counting


def measure(engine: Any, tp_group: dist.ProcessGroup, dp_group: dist.ProcessGroup) -> dict[str, Any]:
    """What this rank sent and holds. The moments are as large as the masters."""
    parameters = list(engine.module.parameters())
    masters = getattr(engine.optimizer, "single_partition_of_fp32_groups", [])
    return {
        "sent": SENT,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "optimizer": sum(3 * master.numel() * master.element_size() for master in masters),
    }
