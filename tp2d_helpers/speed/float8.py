"""The decoder's matmuls in fp8: e4m3 for activations, weights and gradients, each tensor with one scale.

e5m2, of one bit less, would round gradients twice as coarsely. A scale is the largest magnitude of the tensor at hand
(Micikevicius et al. 2022, FP8 formats for deep learning), so no state is kept and a step is a function of its inputs.
In a compiled layer the casts are part of what is computed before them. A weight is cast once per optimizer step, in
both layouts that its matmuls read; masters, sums over GPUs, head, router and embedding stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from tp2d_helpers.config import ConfigError
from tp2d_helpers.speed.layers import ColumnLinear, RowLinear, decoder_layers
from tp2d_helpers.speed.mixtures import routers

E4M3 = torch.float8_e4m3fn
TOP = torch.finfo(E4M3).max
GRANULE = 16  # what fp8 matmuls want their sides to be multiples of


def cast(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(each in fp8, and what to multiply them by): their largest magnitude becomes the largest that fp8 has."""
    largest = torch.stack([part.abs().amax() for part in parts]).amax().float().clamp(min=1e-12)
    return *[(part.float() * (TOP / largest)).to(E4M3) for part in parts], largest / TOP


def matmul(a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """a bᵀ in bf16, from a [m, k] and b [n, k]: both as fp8 matmuls read them, along k."""
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=True)


class Weights:
    """The weights of layers that share an input, cast: `rows` [Σn, k], `columns` [k, Σn], and their scale."""

    def __init__(self, layers: list[torch.nn.Module]) -> None:
        self.layers = layers
        n, k = sum(len(layer.weight) for layer in layers), layers[0].weight.shape[1]
        device = layers[0].weight.device
        self.rows, self.columns = (torch.zeros(shape, device=device, dtype=E4M3) for shape in ((n, k), (k, n)))
        self.scale = torch.ones((), device=device)
        self.matmuls, self.tensors = Columns, (self.rows, self.columns, self.scale)  # also for `layers._enter_block`

    def refresh(self, cast_weights: Callable[..., None]) -> None:
        """Cast the weights as they are now, by `cast_weights`, compiled or not."""
        cast_weights([layer.weight.detach() for layer in self.layers], *self.tensors)


def cast_weights(weights: list[torch.Tensor], rows: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor) -> None:
    """Cast weights [n_i, k] together, into `rows` [Σn, k] and `columns` [k, Σn]."""
    found, factor = cast(torch.cat(weights) if len(weights) > 1 else weights[0])
    rows.copy_(found)
    columns.copy_(found.t())
    scale.copy_(factor)


class Columns(torch.autograd.Function):
    """Y_i = X A_iᵀ + b_i for all column-wise layers that share the input X, as `layers.ColumnMatmuls` computes them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: str, rows: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """[..., n_i/t] for each layer, from x [..., k]; the weights [n_i/t, k], then the biases or None, are last."""
        weights, biases = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.group, ctx.sizes, ctx.biased = group, [len(weight) for weight in weights], [b is not None for b in biases]
        x8, x_scale = cast(x.flatten(0, -2))
        ctx.save_for_backward(x8, x_scale, columns, scale)
        ctx.shape = x.shape
        merged = matmul(x8, rows, x_scale, scale).view(*x.shape[:-1], -1)
        parts = torch.unsafe_split_with_sizes(merged, ctx.sizes, -1)  # see `layers.ColumnMatmuls`
        return tuple(part if bias is None else part + bias for part, bias in zip(parts, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, summed over the TP group, of the weights and the biases."""
        x8, x_scale, columns, scale = ctx.saved_tensors
        parts, merged = [gradient.flatten(0, -2) for gradient in gradients], len(set(ctx.sizes)) > 1
        if merged:
            parts = [torch.ops.tp2d.cat(parts)]
        *parts, g_scale = cast(*parts)
        together = torch.ops.tp2d.cat(parts) if len(parts) > 1 else parts[0]
        # Transposed here and not in the operator: the compiler does it ten times as fast as PyTorch's copy of bytes.
        transposed = [part.t().contiguous() for part in parts]
        arguments = together, transposed, x8.t().contiguous(), columns, g_scale, x_scale, scale
        dx, dw = torch.ops.tp2d.column_gradients8(*arguments, ctx.group) if ctx.group else _gradients(*arguments)
        db = [g.flatten(0, -2).sum(0) if biased else None for g, biased in zip(gradients, ctx.biased, strict=True)]
        dw = dw[0].split(ctx.sizes) if merged else dw
        return dx.view(ctx.shape), None, None, None, None, *dw, *db


class Row(torch.autograd.Function):
    """Z = Σ Y Aᵀ over the TP group, as `layers.RowMatmul` computes it."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, group: str, rows: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """[..., n] from y [..., k/t] and the weight [n, k/t]."""
        y8, y_scale = cast(y.flatten(0, -2))
        ctx.save_for_backward(y8, y_scale, columns, scale)
        ctx.shape = y.shape
        return torch.ops.tp2d.row_matmul8(y8, rows, y_scale, scale, group).view(*y.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of y and of the weight, from that of z [..., n]: nothing travels."""
        y8, y_scale, columns, scale = ctx.saved_tensors
        g8, g_scale = cast(gradient.flatten(0, -2))
        dy, (dw,) = _gradients(g8, [g8.t().contiguous()], y8.t().contiguous(), columns, g_scale, y_scale, scale)
        return dy.view(ctx.shape), None, None, None, None, dw


def _gradients(
    g: torch.Tensor, transposed: list[torch.Tensor], inputs: torch.Tensor, columns: torch.Tensor,
    g_scale: torch.Tensor, input_scale: torch.Tensor, scale: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """(G W, [G_iᵀ X]), from G [rows, Σn], G_iᵀ, Xᵀ [k, rows] and Wᵀ [k, Σn]."""
    return matmul(g, columns, g_scale, scale), [matmul(part, inputs, g_scale, input_scale) for part in transposed]


class Linear(torch.nn.Linear):
    """A linear layer of a model that isn't divided."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] from x [..., k]."""
        return Columns.apply(x, "", *self.float8.tensors, self.weight, self.bias)[0]


class RowLinear8(RowLinear):
    """A row-wise layer, its matmul and its all-reduce as one operator."""

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """[..., n], the same on all ranks, from y [..., k/t]."""
        z = Row.apply(y, self.mp_group.group_name, *self.float8.tensors, self.weight)
        return z if self.bias is None else z + self.bias


def compute_in_fp8(engine: deepspeed.DeepSpeedEngine, compiled: bool) -> None:
    """Let the matmuls of the engine's decoder layers run in fp8; those of sides that don't suit stay in bf16.

    Args:
        compiled: whether the casts of weights are compiled, as those in the layers are.

    Raises:
        ConfigError: if there is none, or the GPU lacks fp8.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        raise ConfigError(f"precision = 'fp8': {torch.cuda.get_device_name()} lacks it; take 'bf16'")
    model, found = engine.module, []
    kept = routers(model)
    for layer in decoder_layers(model):
        for module in layer.modules():
            columns = [child for child in module.children() if isinstance(child, ColumnLinear)]
            if columns and _suits(columns):
                module.float8 = Weights(columns)
                found.append(module.float8)
            replaced = {torch.nn.Linear: Linear, RowLinear: RowLinear8}.get(type(module))
            if replaced and module not in kept and _suits([module]):
                module.__class__, module.float8 = replaced, Weights([module])
                found.append(module.float8)
    if not found:
        raise ConfigError(f"precision = 'fp8': {type(model).__name__} has no matmul that suits it; take 'bf16'")
    caster = torch.compile(cast_weights, dynamic=False) if compiled else cast_weights
    cast_of: list[int] = []  # the optimizer step whose weights are cast

    def refresh(*_: Any) -> None:
        """Cast the weights if a step has changed them."""
        if cast_of != [engine.global_steps]:
            cast_of[:] = [engine.global_steps]
            for weights in found:
                weights.refresh(caster)

    refresh()  # graphs are captured, and compared with what they were made of, before the first step
    cast_of.clear()  # a checkpoint may be loaded meanwhile
    model.register_forward_pre_hook(refresh)


def _suits(layers: list[torch.nn.Module]) -> bool:
    return all(side % GRANULE == 0 for layer in layers for side in layer.weight.shape)
