"""What one machine lacks, no rank uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from grid import Run, assert_equal_runs

from tp2d_helpers.model import engine
from tp2d_helpers.speed import layers, optimizations, optimizer


def _compiler_on_rank_0(names: dict[str, Any]) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("compiled, although rank 1 has no compiler")

    optimizations.compilers = lambda on_gpu: dist.get_rank() == 0
    layers.compile_layers = refuse


def _triton_on_rank_0(names: dict[str, Any]) -> None:
    fuse = optimizations.fuse_step

    def fuse_step(engine: Any) -> None:
        optimizer.OnePassAdamW = object if dist.get_rank() == 0 else None
        fuse(engine)
        assert engine.optimizer.one_pass is None

    optimizations.fuse_step = fuse_step


def _old_gpu_on_rank_1(names: dict[str, Any]) -> None:
    engine.get_mixed_precision_dtype = lambda: torch.float32 if dist.get_rank() == 1 else torch.bfloat16


def test_a_compiler_on_one_machine_only(train: Callable[..., Run]) -> None:
    run = train("qwen3", dp_size=2, optimizations="compile,block_all_reduce", patch=_compiler_on_rank_0)
    assert_equal_runs(run, train("qwen3"))


def test_precision_by_the_oldest_device(train: Callable[..., Run]) -> None:
    """ "auto" of each rank by itself would exchange bf16 gradients with fp32 ones."""
    assert_equal_runs(train("qwen3", dp_size=2, patch=_old_gpu_on_rank_1), train("qwen3"))


def test_triton_on_one_machine_only(train: Callable[..., Run]) -> None:
    """AdamW's kernels round differently: replicated weights would drift apart."""
    run = train("qwen3", tp_size=2, patch=_triton_on_rank_0)
    assert_equal_runs(run, train("qwen3"))
