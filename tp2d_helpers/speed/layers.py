"""What makes the sharded layers fast: fewer all-reduces, compiled layers, activation checkpointing.

AutoTP puts a collective into every layer that it shards, as a call that breaks a compiler's graph. Here a matmul
and its all-reduce over the TP group are one operator of `reductions.py`, so that a decoder layer becomes one graph, and
the all-reduce runs while another matmul is computed.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, VocabParallelLinear
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tp2d_helpers.cache import cache_dir
from tp2d_helpers.config import ConfigError
from tp2d_helpers.speed import reductions


class ColumnMatmuls(torch.autograd.Function):
    """Y_i = X A_iᵀ + b_i for all column-wise layers that share the input X: q, k and v, or gate and up.

    The gradient of X is summed over the TP group once, for all of them: f in Megatron-LM (Shoeybi et al. 2019, section
    3). Layers of unequal width are computed as one matmul: those of few key-value heads alone can't fill a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """[..., n_i/t] for each layer, from x [..., k] and the weights [n_i/t, k], followed by the biases or None."""
        weights, biases = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.group, ctx.sizes, ctx.biased = group, [len(weight) for weight in weights], [b is not None for b in biases]
        ctx.merged = len(set(ctx.sizes)) > 1
        ctx.save_for_backward(x, *weights)
        if not ctx.merged:
            return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
        if any(ctx.biased):
            pairs = zip(weights, biases, strict=True)
            bias = torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs])
        merged = F.linear(x, torch.cat(weights), bias if any(ctx.biased) else None)
        return torch.unsafe_split_with_sizes(merged, ctx.sizes, -1)  # OLMo clips them in place, which views forbid

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of what `forward` takes; that of x is the sum over the TP group."""
        x, *weights = ctx.saved_tensors
        parts = [gradient.flatten(0, -2) for gradient in gradients]
        if ctx.merged:
            parts, weights = [torch.ops.tp2d.cat(parts)], [torch.cat(weights)]
        dx, dw = torch.ops.tp2d.column_gradients(x.flatten(0, -2), parts, weights, ctx.group)
        db = [part.sum(0) for part in parts] if any(ctx.biased) else [None] * len(ctx.sizes)
        if ctx.merged:
            dw = dw[0].split(ctx.sizes)
            db = db[0].split(ctx.sizes) if any(ctx.biased) else db
        return dx.view_as(x), None, *dw, *(b if biased else None for b, biased in zip(db, ctx.biased, strict=True))


class RowMatmul(torch.autograd.Function):
    """Z = Σ Y Aᵀ over the TP group; each part's gradient is Z's: g in Megatron-LM."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, weight: torch.Tensor, group: str) -> torch.Tensor:
        """[..., n] from y [..., k/t] and the weight [n, k/t]."""
        ctx.save_for_backward(y, weight)
        return torch.ops.tp2d.row_matmul(y, weight, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Gradients of y and of the weight, from that of z [..., n]: nothing travels."""
        y, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).T @ y.flatten(0, -2), None


class ColumnLinear(LinearLayer):
    """Hands out its part of its block's `ColumnMatmuls`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n/t]; x [..., k] has been multiplied as its block was entered."""
        part, self.part = self.part, None
        return part


class RowLinear(LinearAllreduce):
    """AutoTP's row-wise layer, its matmul and its all-reduce as one operator."""

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """[..., n], the same on all ranks, from y [..., k/t]."""
        z = RowMatmul.apply(y, self.weight, self.mp_group.group_name)
        return z if self.bias is None else z + self.bias


class VocabLinear(VocabParallelLinear):
    """The head, whose input's gradient travels while its weight's is computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., V/t], from x [..., h]."""
        return ColumnMatmuls.apply(x, self.mp_group.group_name, self.weight, self.bias)[0]


FASTER = {LinearAllreduce: RowLinear, VocabParallelLinear: VocabLinear}


def reduce_once_per_block(model: torch.nn.Module, blocks: Collection[str]) -> None:
    """Let each attention and MLP block reduce its input's gradient once, not once per column-wise layer.

    Two all-reduces per layer in the backward pass instead of five. The layers keep weights, names and checkpoints.

    Args:
        blocks: names of the modules whose column-wise layers all take the module's own input.
    """
    for name, block in list(model.named_modules()):
        children = [child for child in block.children() if getattr(child, "is_tp_parallel", False)]
        columns = column_layers(block) if name in blocks else []
        for child in children:
            reductions.register(child.mp_group)
            child.__class__ = FASTER.get(type(child), type(child))
        for column in columns:
            column.__class__, column.part = ColumnLinear, None
        if columns:
            block.register_forward_pre_hook(partial(_enter_block, columns), with_kwargs=True)


def column_layers(block: torch.nn.Module) -> list[LinearLayer]:
    """The column-wise layers that AutoTP made of a module's own children."""
    return [child for child in block.children() if type(child) is LinearLayer and not child.gather_output]


def block_input(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The hidden states that a block is called with: its first argument, or the one of that name."""
    return args[0] if args else kwargs.get("hidden_states")


def _enter_block(columns: list[ColumnLinear], block: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    x, group = block_input(args, kwargs), columns[0].mp_group.group_name
    weights, biases = [column.weight for column in columns], [column.bias for column in columns]
    matmuls, cast = ColumnMatmuls, ()
    if hasattr(block, "float8"):
        matmuls, cast = block.float8.matmuls, block.float8.tensors
    for column, part in zip(columns, matmuls.apply(x, group, *cast, *weights, *biases), strict=True):
        column.part = part


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers, at whatever depth they hang: of the class whose activations `transformers` checkpoints.

    Of a model that came with code of its own, and has none of that class, those of the longest list.

    Raises:
        ConfigError: if there are none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or not list(decoder.children()):  # not every class says where its decoder is
        decoder = model.base_model
    lists = map(list, _outermost(decoder, torch.nn.ModuleList))
    found = _outermost(decoder, GradientCheckpointingLayer) or max(lists, key=len, default=[])
    if not found:
        raise ConfigError(f"model_name: {type(model).__name__} has no list of decoder layers")
    return found


def _outermost(module: torch.nn.Module, kind: type) -> list[Any]:
    children = [[child] if isinstance(child, kind) else _outermost(child, kind) for child in module.children()]
    return [found for part in children for found in part]


def layer_parameters(model: torch.nn.Module) -> int:
    """How many parameters this rank has of a decoder layer."""
    return sum(parameter.numel() for parameter in decoder_layers(model)[0].parameters())


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Compile each decoder layer by itself: the layers are alike, so the compiler's work is that of one.

    Every rank gets the same kernels. Left to itself, the compiler times several and keeps the fastest, not the same one
    on each rank; they add in different orders, and the replicated weights of a TP group drift apart.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / f"compiled-{os.getuid()}"))  # kept for later
    # Norms' outputs and the MLP's product are made again from what is kept anyway, even where a matmul reads them: a
    # seventh of a 7B model's memory, for 1 % of its time at the same micro-batch (ci/benchmark/README.md).
    functorch_config.ban_recompute_materialized_backward = False
    options = {"deterministic": True} if backend == "inductor" else None
    for layer in decoder_layers(model):
        layer.compile(backend=backend, dynamic=False, options=options)


def checkpoint_layers(model: torch.nn.Module) -> None:
    """Keep only the inputs of each decoder layer; its backward pass computes the rest again.

    The results of matmuls can't be kept beside them: AutoTP's all-reduce and ZeRO 3's bias are added in place to what
    was kept, and would be once more as the layer is computed again.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
