"""LoRA: a low-rank adapter beside each frozen matrix (Hu et al. 2021), divided as AutoTP divides that matrix.

y = W x + s · B A x, with A [r, in] drawn at random, B [out, r] zero at the start, W [out, in] frozen, and s the setting
`lora_alpha` divided by r.

| layer | W | A | B | summed over the TP group |
|---|---|---|---|---|
| column-wise | its outputs divided | whole | divided, as W | the gradient of A |
| row-wise | its inputs divided | divided, as W | whole | the gradient of B |

A divided layer's adapter adds to that rank's part of the output, before the all-reduce of a row-wise layer, so no
activation travels that wouldn't without it. The whole one of the two matrices meets activations of which each rank has
a part: its gradient is a part, too (the rule of peft #3079).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from transformers.pytorch_utils import Conv1D

from tp2d_helpers.config import ConfigError
from tp2d_helpers.model.cuts import Cut
from tp2d_helpers.model.divide import mark, sum_copies, sum_over
from tp2d_helpers.model.mpu import ModelParallelUnit
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.styles import ROW
from tp2d_helpers.speed.frozen import freeze
from tp2d_helpers.speed.layers import decoder_layers
from tp2d_helpers.speed.mixtures import blocks_of_experts, routers

LINEAR = (torch.nn.Linear, Conv1D)
ALL = "all-linear"  # of `lora_targets`
SUFFIX = "_lora"  # a layer's adapter hangs beside it, under its name and this


class Adapter(torch.nn.Module):
    """s · B A x of one layer, on one rank of a TP group. `A` is [r, in], or [r, in/t]; `B` [out, r], or [out/t, r].

    Dropout, of x, draws for the whole width on each rank and takes its own part, so that a run is the same at every
    tp_size as long as the ranks of a TP group draw alike.
    """

    def __init__(
        self, size: tuple[int, int], config: dict[str, Any], draw: torch.Generator, cut: Cut | None, mpu: Any
    ) -> None:
        """An adapter of a layer of (in, out) features; `cut` is that of B, in dimension 0, or of A, in dimension 1."""
        super().__init__()
        (self.inputs, outputs), rank = size, config["lora_rank"]
        self.scale, self.dropout, self.cut = config["lora_alpha"] / rank, config["lora_dropout"], cut
        self.rank = mpu.tp_rank if cut else 0
        A, B = torch.empty(rank, self.inputs), torch.zeros(outputs, rank)
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=draw)  # as nn.Linear and peft do
        self.size = A.numel() + B.numel()  # of the whole
        self.wholes = (A.shape, B.shape)
        # Copies, as AdamW's fused kernel takes a view with gaps for one without.
        self.row = cut is not None and cut.dim == 1
        self.A = torch.nn.Parameter(cut.take(A, self.rank).contiguous() if self.row else A)
        self.B = torch.nn.Parameter(cut.take(B, self.rank).clone() if cut and not self.row else B)
        if cut:
            (self.B if self.row else self.A).register_hook(partial(sum_over, mpu.tp_group))
            self._mark_uc_metadata()
            if cut.copies > 1:
                self.B.register_hook(partial(sum_copies, mpu.tp_group, cut, B.shape, self.rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out or out/t], from x [..., in or in/t]: what is added to the layer's output on this rank."""
        if self.training and self.dropout:
            kept = F.dropout(x.new_ones(*x.shape[:-1], self.inputs), self.dropout)
            x = x * (Cut(-1, self.cut.ranges).take(kept, self.rank) if self.row else kept)
        return self.scale * F.linear(F.linear(x, self.A), self.B)

    def _mark_uc_metadata(self) -> None:
        """Note how the divided one is cut, for a checkpoint that loads on other grids; called by DeepSpeed, too."""
        if self.cut:
            divided, whole = (self.A, self.wholes[0]) if self.row else (self.B, self.wholes[1])
            mark(divided, self.cut, whole, self.rank)


def targets(model: torch.nn.Module, lora_targets: str) -> dict[str, tuple[int, int]]:
    """The layers that get an adapter, by name, and their (in, out) features. A meta model will do.

    These are linear layers of the decoder: never the embedding or the head. A mixture's experts and most routers are
    none. "all-linear" leaves out the routers that are: whether they are is a whim of the class. peft's "all-linear"
    differs on mixtures: it takes routers and, in some types, experts instead of the dense layers that have their names.

    Args:
        lora_targets: "all-linear", or the last parts of their names, with commas between.

    Raises:
        ConfigError: for a name that none of them has, or of one that can't have an adapter.
    """
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    linear = {name: m for name, m in model.named_modules() if id(m) in inside and isinstance(m, LINEAR)}
    able = {name: m for name, m in linear.items() if _is_product(m)}
    if lora_targets == ALL:
        left_out = routers(model)
        found = {name: m for name, m in able.items() if m not in left_out}
        wanted = kinds(found)
    else:
        wanted = [name.strip() for name in lora_targets.split(",") if name.strip()]
        found = {name: m for name, m in able.items() if name.rpartition(".")[2] in wanted}
    unknown = [name for name in wanted if name not in kinds(found)]
    if unknown or not found:
        why = f"no linear layer of the decoder is called {', '.join(unknown) or 'so'}"
        why += " (a mixture's experts are none)" * bool(blocks_of_experts(model))
        if odd := [m for name, m in linear.items() if name not in able and name.rpartition(".")[2] in unknown]:
            why = f"no adapter can stand beside a {type(odd[0]).__name__}, which returns something else than a product"
        raise ConfigError(
            f"lora_targets = {lora_targets!r}: {why}; must be {ALL!r}, or some of "
            f"{', '.join(kinds(able)) or '(this model has none)'}"
        )
    return {name: tuple(m.weight.shape[:: 1 if isinstance(m, Conv1D) else -1]) for name, m in found.items()}


def _is_product(layer: torch.nn.Module) -> bool:
    """Whether a linear layer returns what it must: Falcon's own class does, the router of Phi-3.5-MoE a tuple."""
    if type(layer) in LINEAR:
        return True
    outputs, inputs = layer.weight.shape
    try:
        with torch.no_grad():
            y = layer(layer.weight.new_zeros(1, 2, inputs))
    except Exception:
        return False
    return isinstance(y, torch.Tensor) and y.shape == (1, 2, outputs)


def kinds(layers: Iterable[str]) -> list[str]:
    """The last parts of layers' names, each once: what `lora_targets` and peft know them by."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def adapter_cut(plan: Plan, layer: str) -> Cut | None:
    """How a layer's adapter is divided: a column-wise layer's in dimension 0 of B, a row-wise one's in 1 of A."""
    cut = plan.cuts.get(f"{layer}.weight")
    return cut and Cut(1 if plan.styles[layer] == ROW else 0, cut.ranges)


def adapter_parameters(model: torch.nn.Module, config: dict[str, Any]) -> int:
    """Parameters of all adapters of a run, whole: r · (in + out) of each target. 0 without LoRA."""
    if not config["lora_rank"]:
        return 0
    return config["lora_rank"] * sum(map(sum, targets(model, config["lora_targets"]).values()))


def add_adapters(
    model: torch.nn.Module, config: dict[str, Any], plan: Plan, mpu: ModelParallelUnit
) -> dict[str, Adapter]:
    """Freeze a loaded model and hang an adapter beside each target; before DeepSpeed divides it. See `join`.

    They are drawn from the run's seed alone: the same on all ranks, at every grid.

    Args:
        plan: of the model's own weights.

    Returns:
        the adapters, by the names of the layers.
    """
    for weight in model.requires_grad_(False).parameters():
        weight._ds_grad_allreduce_registered = True  # or AutoTP asks for a hook on the gradients of Qwen3's norms
    draw, adapters = torch.Generator().manual_seed(config["seed"]), {}
    for name, size in targets(model, config["lora_targets"]).items():
        adapters[name] = Adapter(size, config, draw, adapter_cut(plan, name), mpu).to(
            model.get_submodule(name).weight.dtype
        )
    for name, adapter in adapters.items():
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent).add_module(own + SUFFIX, adapter)
    model.register_state_dict_post_hook(_leave_out_frozen)
    return adapters


def join(model: torch.nn.Module, adapters: dict[str, Adapter]) -> None:
    """Let each layer, now that AutoTP has made it, add its adapter's output to its own."""
    freeze(model)
    for name, adapter in adapters.items():
        layer = model.get_submodule(name)
        if adapter.cut is None:
            layer.register_forward_hook(partial(_add, adapter))
        else:
            layer.adapter = (adapter,)  # in a tuple: it stays a part of the block alone


def _add(adapter: Adapter, _: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output + adapter(args[0])


def convert_what_is_trained(model: torch.nn.Module) -> None:
    """A universal checkpoint is made of what the optimizer has: DeepSpeed looks for each weight that is listed."""
    frozen = {rf"^{re.escape(name)}$" for name, weight in model.named_parameters() if not weight.requires_grad}
    lists = getattr(model, UNIVERSAL_CHECKPOINT_INFO, {})  # by kind, the patterns of names
    lists |= {kind: [p for p in names if p not in frozen] for kind, names in lists.items() if isinstance(names, list)}


def _leave_out_frozen(model: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A checkpoint has what is trained: the rest is what `model_name` has."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)
