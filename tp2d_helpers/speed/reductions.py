"""Matmuls whose results are all-reduced over the TP group while the next matmul runs.

They are operators of their own, which a compiler takes as they are, so that what overlaps is written here and doesn't
depend on its order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from tp2d_helpers.speed.reducers import REDUCERS, Collectives

ROWS_TO_HALVE = 4096  # from so many on, half a matmul takes half its time


def register(group: dist.ProcessGroup) -> None:
    """Let the operators below reduce over the group, which they know by its name."""
    found = REDUCERS.get(group.group_name)
    if found is None or found.group is not group:
        REDUCERS[group.group_name] = Collectives(group)


def row_matmul(y: torch.Tensor, weight: torch.Tensor, group: str) -> torch.Tensor:
    """Z = Σ Y Wᵀ over the TP group. The first half travels while the second is computed.

    Args:
        y: [..., k/t], this rank's part of the features.
        weight: [n, k/t].
        group: name of the TP group.
    """
    z = y.new_empty(*y.shape[:-1], weight.shape[0])
    rows, results, reducer = y.flatten(0, -2), z.view(-1, weight.shape[0]), REDUCERS[group]
    halves = 2 if len(rows) >= ROWS_TO_HALVE else 1
    for part, result in zip(rows.chunk(halves), results.chunk(halves), strict=True):
        torch.mm(part, weight.T, out=result)
        reducer.begin(result)
    reducer.finish()
    return z


def column_gradients(
    x: torch.Tensor, gradients: list[torch.Tensor], weights: list[torch.Tensor], group: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(Σ over the TP group of Σ_i G_i W_i, [G_iᵀ X]): the first travels while the others are computed.

    Args:
        x: [rows, k].
        gradients: of the layers' outputs, [rows, n_i/t] each.
        weights: [n_i/t, k] each.
        group: name of the TP group.
    """
    dx, reducer = gradients[0] @ weights[0], REDUCERS[group]
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        dx.addmm_(gradient, weight)
    reducer.begin(dx)
    dw = [gradient.T @ x for gradient in gradients]
    reducer.finish()
    return dx, dw


def row_matmul8(
    y: torch.Tensor, weight: torch.Tensor, y_scale: torch.Tensor, scale: torch.Tensor, group: str
) -> torch.Tensor:
    """`row_matmul` of y [rows, k/t] and weight [n, k/t] in fp8 (`float8.py`): [rows, n] in bf16."""
    z, reducer = y.new_empty(len(y), len(weight), dtype=torch.bfloat16), REDUCERS[group]
    halves = 2 if len(y) >= ROWS_TO_HALVE else 1
    for part, result in zip(y.chunk(halves), z.chunk(halves), strict=True):
        torch._scaled_mm(part, weight.t(), y_scale, scale, out_dtype=z.dtype, use_fast_accum=True, out=result)
        reducer.begin(result)
    reducer.finish()
    return z


def column_gradients8(
    gradient: torch.Tensor, transposed: list[torch.Tensor], inputs: torch.Tensor, columns: torch.Tensor,
    gradient_scale: torch.Tensor, input_scale: torch.Tensor, scale: torch.Tensor, group: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """`column_gradients` in fp8: (Σ G W over the TP group, [G_iᵀ X]) in bf16.

    Args:
        gradient: G [rows, Σn/t]; transposed: G_iᵀ; inputs: Xᵀ [k, rows]; columns: Wᵀ [k, Σn/t].
    """
    how, reducer = dict(out_dtype=torch.bfloat16, use_fast_accum=True), REDUCERS[group]
    dx = torch._scaled_mm(gradient, columns.t(), gradient_scale, scale, **how)
    reducer.begin(dx)
    dw = [torch._scaled_mm(part, inputs.t(), gradient_scale, input_scale, **how) for part in transposed]
    reducer.finish()
    return dx, dw


def cat(parts: list[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` along the last dimension, of parts that a compiler has to compute before.

    Compiled, it would become one kernel that for each element computes what it would be in every part.
    """
    return torch.cat(parts, -1)


def all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of the ranks' x over the TP group, as a new tensor; the device waits for it."""
    result = x.clone(memory_format=torch.contiguous_format)
    REDUCERS[group].now(result)
    return result


_library = torch.library.Library("tp2d", "DEF")
_library.define("cat(Tensor[] parts) -> Tensor")
_library.define("all_reduce(Tensor x, str group) -> Tensor")
_library.define("row_matmul(Tensor y, Tensor weight, str group) -> Tensor")
_library.define("column_gradients(Tensor x, Tensor[] gradients, Tensor[] weights, str group) -> (Tensor, Tensor[])")
_library.define("row_matmul8(Tensor y, Tensor weight, Tensor y_scale, Tensor scale, str group) -> Tensor")
_library.define(
    "column_gradients8(Tensor gradient, Tensor[] transposed, Tensor inputs, Tensor columns, Tensor gradient_scale, "
    "Tensor input_scale, Tensor scale, str group) -> (Tensor, Tensor[])"
)
for _function in (cat, all_reduce, row_matmul, column_gradients, row_matmul8, column_gradients8):
    _library.impl(_function.__name__, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("tp2d::cat", lib=_library)
def _(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0].new_empty(*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))


@torch.library.register_fake("tp2d::all_reduce", lib=_library)
def _(x: torch.Tensor, group: str) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("tp2d::row_matmul", lib=_library)
def _(y: torch.Tensor, weight: torch.Tensor, group: str) -> torch.Tensor:
    return y.new_empty(*y.shape[:-1], weight.shape[0])


@torch.library.register_fake("tp2d::column_gradients", lib=_library)
def _(
    x: torch.Tensor, gradients: list[torch.Tensor], weights: list[torch.Tensor], group: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return x.new_empty(x.shape), [weight.new_empty(weight.shape) for weight in weights]


@torch.library.register_fake("tp2d::row_matmul8", lib=_library)
def _(y: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return y.new_empty(len(y), len(weight), dtype=torch.bfloat16)


@torch.library.register_fake("tp2d::column_gradients8", lib=_library)
def _(
    gradient: torch.Tensor, transposed: list[torch.Tensor], inputs: torch.Tensor, columns: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    like = functools.partial(gradient.new_empty, dtype=torch.bfloat16)
    return like(len(gradient), len(columns)), [like(len(part), len(inputs)) for part in transposed]
