"""Divided layers whose weights are not trained: no gradient of a weight is computed, and an adapter may add its part.

The two collectives of a block stand as Megatron-LM has them: f where activations become divided, g where they are
whole again (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

from tp2d_helpers.speed import reductions
from tp2d_helpers.speed.layers import block_input


class Enter(torch.autograd.Function):
    """f: x itself; its gradient is the sum over the TP group."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        """x, of any shape; `group` is the TP group's name."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The sum of the ranks' gradients."""
        return torch.ops.tp2d.all_reduce(gradient, ctx.group), None


class Leave(torch.autograd.Function):
    """g: the sum over the TP group; each part's gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        """The sum of the ranks' x, of any shape."""
        return torch.ops.tp2d.all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient as it is."""
        return gradient, None


class Both(torch.autograd.Function):
    """The sum over the TP group of what each rank has a part of, and uses on its own part: so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        """The sum of the ranks' x, of any shape."""
        ctx.group = group
        return torch.ops.tp2d.all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The sum of the ranks' gradients."""
        return torch.ops.tp2d.all_reduce(gradient, ctx.group), None


class FrozenColumn(LinearLayer):
    """AutoTP's column-wise layer, and its adapter's part."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n/t], from x [..., k]."""
        return self.part_of(Enter.apply(x, self.mp_group.group_name))

    def part_of(self, x: torch.Tensor) -> torch.Tensor:
        """The same, of an x that has passed f."""
        y = F.linear(x, self.weight, self.bias)
        return y + self.adapter[0](x) if self.adapter else y


class EnteredColumn(FrozenColumn):
    """A column-wise layer whose block passes its input through f once for all of its layers."""

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """[..., n/t], of what the block was entered with."""
        x, self.entered = self.entered, None
        return self.part_of(x)


class FrozenRow(LinearAllreduce):
    """AutoTP's row-wise layer; its adapter's part goes with the layer's own through one all-reduce."""

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """[..., n], the same on all ranks, from y [..., k/t]."""
        z = F.linear(y, self.weight)
        if self.adapter:
            z = z + self.adapter[0](y)
        z = Leave.apply(z, self.mp_group.group_name)
        return z if self.bias is None else z + self.bias


FROZEN = {LinearLayer: FrozenColumn, LinearAllreduce: FrozenRow}


def freeze(model: torch.nn.Module) -> None:
    """Take AutoTP's layers for these, without adapters yet."""
    for layer in model.modules():
        if type(layer) in FROZEN and not getattr(layer, "gather_output", False):
            reductions.register(layer.mp_group)
            layer.__class__, layer.adapter = FROZEN[type(layer)], ()


def enter_once_per_block(model: torch.nn.Module, blocks: Collection[str]) -> None:
    """Let each attention and MLP block reduce its input's gradient once, not once per column-wise layer.

    Args:
        blocks: names of the modules whose column-wise layers all take the module's own input.
    """
    for block in map(model.get_submodule, blocks):
        columns = [child for child in block.children() if type(child) is FrozenColumn]
        for column in columns:
            column.__class__ = EnteredColumn
        if columns:
            block.register_forward_pre_hook(partial(_enter_block, columns), with_kwargs=True)


def _enter_block(columns: list[EnteredColumn], _: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    x = Enter.apply(block_input(args, kwargs), columns[0].mp_group.group_name)
    for column in columns:
        column.entered = x
