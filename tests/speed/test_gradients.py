"""Gradients in bf16 are summed in fp32, over 64 micro-batches and the replicas, at ZeRO 1 and 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grid import Run, assert_equal_runs, run_grid

from tp2d_helpers.config import make_config
from tp2d_helpers.model.engine import gradient_dtype
from tp2d_helpers.speed import gradients
from tp2d_helpers.speed.gradients import SummingZeroOptimizer

EXACT: dict[int, torch.Tensor] = {}  # by the parameter's id: this rank's sum over the micro-batches, in fp64
ERRORS: list[float] = []  # of each tensor of a step: the largest difference, as a share of the largest gradient


def _add_up(names: dict[str, Any]) -> None:
    process, step, gradients.BUCKET = SummingZeroOptimizer.process_gradients, SummingZeroOptimizer.step, 10_000

    def processing(self: SummingZeroOptimizer, param: torch.nn.Parameter, i: int) -> None:
        EXACT[id(param)] = EXACT.get(id(param), 0) + param.grad.double()
        process(self, param, i)

    def compared(self: SummingZeroOptimizer, *args: Any) -> None:
        for i, group in enumerate(self.bit16_groups):
            flat = torch.zeros(len(self.bit16_groups_flat[i]), dtype=torch.float64)
            for param in group:
                place = gradients.places(self, i)[id(param)]
                flat[place.start : place.stop] = EXACT[id(param)].view(-1)
            dist.all_reduce(flat, group=self.dp_process_group)
            replicas = dist.get_world_size(self.dp_process_group)
            mine = (flat / replicas).chunk(replicas)[dist.get_rank(self.dp_process_group)]
            sizes = [part.numel() for part in self.averaged_gradients[i]]
            for part, exact in zip(self.averaged_gradients[i], mine.split(sizes), strict=True):
                ERRORS.append(((part.view(-1).double() - exact).abs().max() / exact.abs().max().clamp(1e-30)).item())
        EXACT.clear()
        step(self, *args)

    SummingZeroOptimizer.process_gradients, SummingZeroOptimizer.step = processing, compared


def _errors(engine: Any, tp_group: Any, dp_group: Any) -> list[float]:
    assert type(engine.optimizer).__mro__.count(SummingZeroOptimizer)
    return ERRORS


@pytest.fixture
def error(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., float]:
    """error(**settings): the largest error of a sum in two steps of 64 micro-batches in bf16, of all ranks."""

    def largest(**settings: Any) -> float:
        grid = dict(tp_size=1, dp_size=1, batch_size_per_gpu=1, gradient_accumulation_steps=64) | settings
        config = make_config(model_name=str(tiny_model("qwen2-tied")), dataset_name="demo", use_gpu=False,
                             seq_length=16, debug_steps=2, storage_path=str(tmp_path), **grid)  # fmt: skip
        # DeepSpeed's own step takes the same sums, and is a method that a test can wrap.
        settings = config.model_dump() | dict(precision="bf16", optimizations="block_all_reduce,fused_loss")
        return max(max(errors) for errors in run_grid(settings, after=_errors, patch=_add_up))

    return largest


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("grid", [
    dict(), dict(dp_size=2), dict(dp_size=4, gradient_accumulation_steps=4),
    dict(tp_size=2, dp_size=2, gradient_accumulation_steps=8),
])  # fmt: skip
def test_sums_in_fp32(stage: int, grid: dict[str, int], error: Callable[..., float]) -> None:
    assert error(zero_stage=stage, **grid) < 1e-6


def test_sums_in_bf16_lose_the_last_micro_batches(error: Callable[..., float]) -> None:
    """What `gradient_dtype = "bf16"` costs, and what the test above would see."""
    assert 2e-3 < error(gradient_dtype="bf16") < 0.1


@pytest.mark.parametrize("stage", [1, 2])
def test_uneven_shards_over_four_replicas(train: Callable[..., Run], family: Callable[..., Path], stage: int) -> None:
    """What both ranks of a TP group hold lies at another place on each, and reductions add in another order there."""
    model, short = family("starcoder2", intermediate_size=177), dict(debug_steps=6, warmup_steps=0)
    run = train(model, tp_size=2, dp_size=4, zero_stage=stage, **short)
    assert_equal_runs(run, train(model, **short))


@pytest.mark.parametrize("settings", [
    dict(lora_rank=1, optimizations="none"), dict(lora_rank=4, dp_size=2, gradient_accumulation_steps=2),
], ids=str)  # fmt: skip
def test_steps_of_uneven_shards(train: Callable[..., Run], family: Callable[..., Path], settings: dict) -> None:
    """An MLP of 176 over three ranks: what all of them hold ends the partition of one, and not of another."""
    model = family("mistral", hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    short = dict(debug_steps=4, warmup_steps=0)
    run = train(model, tp_size=3, **short, **settings)
    assert_equal_runs(run, train(model, lora_rank=settings["lora_rank"], **short))


@pytest.mark.parametrize("settings, expected", [
    (dict(), torch.float32), (dict(master_weights="bf16"), torch.bfloat16),
    (dict(gradient_dtype="bf16"), torch.bfloat16), (dict(gradient_dtype="fp32", zero_stage=3), torch.float32),
])  # fmt: skip
def test_dtype_of_the_sums(settings: dict[str, Any], expected: torch.dtype) -> None:
    assert gradient_dtype(make_config(**settings).model_dump(), torch.bfloat16) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton kernel needs a GPU")
@pytest.mark.parametrize("size", [1, 1000, 4096, 100_003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("offset", [0, 3])
def test_kernel_adds(size: int, dtype: torch.dtype, offset: int) -> None:
    sums = torch.full((size + offset,), torch.nan, device="cuda")[offset:]
    parts = [torch.randn(size, device="cuda").to(dtype) for _ in range(3)]
    for i, part in enumerate(parts):
        gradients.add_to(sums, part, first=i == 0)
    assert torch.equal(sums, parts[0].float() + parts[1].float() + parts[2].float())
