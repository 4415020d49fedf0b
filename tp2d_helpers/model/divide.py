"""What AutoTP has no form for, divided before it sees the model; what it has one for is left to it.

Fused matrices, shared key-value heads and GPT-2's transposed ones become AutoTP's own layers, with shards that were cut
here. Experts, norms over all heads and whatever has a part for each head keep their class and its code.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
from deepspeed.module_inject.layers import (
    DS_TENSOR_MODEL_PARALLEL,
    LinearAllreduce,
    LinearLayer,
    TensorParallel_Layer,
    set_autotp_mode,
)

from tp2d_helpers.model.cuts import Cut
from tp2d_helpers.model.heads import answering_for_all
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.styles import COLUMN, EXPERTS, NORM
from tp2d_helpers.speed import reductions
from tp2d_helpers.speed.frozen import Both, Enter, Leave

# What a module calls the numbers that its code divides activations by.
QUERIES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEYS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = ("hidden_size", "embed_dim", "split_size")


def divide(model: torch.nn.Module, plan: Plan, group: dist.ProcessGroup | None, rank: int) -> None:
    """Divide what AutoTP can't, and tell attention how many heads it has; before AutoTP divides the rest.

    Args:
        group: the TP group; None on a model without storage, which communicates with nobody.
        rank: in the group.
    """
    if plan.tp_size == 1:
        return
    set_autotp_mode(training=True)  # as `deepspeed.initialize` does later: or its layers take no gradients
    if group is not None:
        reductions.register(group)
    model.config = answering_for_all(model.config)
    wholes = {name: weight.shape for name, weight in model.named_parameters()}
    for module in model.modules():
        if not isinstance(getattr(module, "weight", None), torch.Tensor) or module.weight.ndim != 2:
            module.replaced = True  # or AutoTP would guess what of its numbers to divide
    for name in plan.own:
        _replace(model, name, plan, group, rank)
    for name, style in plan.styles.items():
        module = model.get_submodule(name)
        cuts = {own: plan.cuts.get(f"{name}.{own}") for own, _ in module.named_parameters(recurse=False)}
        if isinstance(module, torch.nn.Linear) or name in plan.own:
            continue
        for own, cut in cuts.items():
            if cut:
                _cut(module.get_parameter(own), cut, group, rank)
        if style == EXPERTS:
            module.tp_region = True
            module.register_forward_pre_hook(partial(_enter, group), with_kwargs=True)
            module.register_forward_hook(partial(_leave, group))
        elif style == NORM:
            cut = cuts["weight"]
            width = wholes[f"{name}.weight"][0]
            module.register_forward_hook(partial(_norm_over_heads, group, width, cut.copies))
    for name, (heads, kv_heads) in plan.attention.items():
        _set_heads(model.get_submodule(name), heads, kv_heads)
    _name_embedding(model)


def _cut(weight: torch.nn.Parameter, cut: Cut, group: dist.ProcessGroup | None, rank: int) -> None:
    """Leave this rank its shard of a weight, as a tensor of its own."""
    whole = weight.shape
    weight.data = cut.take(weight.data, rank).clone(memory_format=torch.contiguous_format)
    mark(weight, cut, whole, rank)
    if cut.copies > 1 and group is not None and weight.requires_grad:
        weight.register_hook(partial(sum_copies, group, cut, whole, rank))


def mark(weight: torch.nn.Parameter, cut: Cut, whole: torch.Size, rank: int) -> None:
    """Tell DeepSpeed how a weight is divided: for gradient norms, and for checkpoints that load on other grids.

    Of ranks that share a part, the first counts it. The others' pass for whole weights, which only rank 0 counts.
    """
    setattr(weight, DS_TENSOR_MODEL_PARALLEL, cut.owns(rank))
    weight.tp_copies = cut.copies
    TensorParallel_Layer._set_param_uc_meta(
        SimpleNamespace(tp_world_size=len(cut.ranges)), weight, partition_type="column", partition_dim=cut.dim,
        logical_shape=tuple(whole), original_shape=tuple(whole), target_partition_shape=tuple(weight.shape),
        affine_map=cut.affine_map(whole),
    )  # fmt: skip


def _replace(model: torch.nn.Module, name: str, plan: Plan, group: dist.ProcessGroup | None, rank: int) -> None:
    """Put one of AutoTP's layers, whose shard is cut here, in a linear layer's place."""
    old, (parent, _, own) = model.get_submodule(name), name.rpartition(".")
    kinds = {kind: plan.cuts.get(f"{name}.{kind}") for kind, _ in old.named_parameters()}
    wholes = {kind: old.get_parameter(kind).shape for kind in kinds}
    for kind, cut in kinds.items():
        if cut:
            _cut(old.get_parameter(kind), cut, group, rank)
    if plan.styles[name] == COLUMN:
        layer = LinearLayer(old, None, skip_partition=True, name=name)
    else:
        layer = LinearAllreduce(old, None, name=name)
    layer.mp_group, layer.is_tp_parallel = group, True
    layer.tp_world_size, layer.tp_index = plan.tp_size, rank
    if layer.bias is not None and not kinds["bias"]:
        delattr(layer.bias, DS_AUTOTP_UC_META)  # of a layer without a group: that one rank has it
    described = [(layer.get_parameter(kind), cut, wholes[kind], rank) for kind, cut in kinds.items() if cut]
    layer._mark_uc_metadata = partial(_mark_all, described)  # DeepSpeed calls it once more
    layer._mark_uc_metadata()
    layer.replaced = True
    setattr(model.get_submodule(parent), own, layer)


def _mark_all(described: list[tuple[torch.nn.Parameter, Cut, torch.Size, int]]) -> None:
    for one in described:
        mark(*one)


def sum_copies(
    group: dist.ProcessGroup, cut: Cut, whole: torch.Size, rank: int, gradient: torch.Tensor
) -> torch.Tensor:
    """A hook of a weight that several ranks hold: the sum of their gradients. Few enough to go by the whole group."""
    total = gradient.new_zeros(whole)
    cut.put(total, gradient, rank)
    return cut.take(sum_over(group, total), rank).contiguous()


def sum_over(group: dist.ProcessGroup, gradient: torch.Tensor) -> torch.Tensor:
    """A hook of a weight: the sum of its gradients over the group, as a new tensor."""
    return torch.ops.tp2d.all_reduce(gradient.contiguous(), group.group_name)


def _enter(group: dist.ProcessGroup | None, _: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Experts get whole activations and weights of the router; the gradients of both are parts."""
    if group is None:
        return None
    enter = partial(_enter_one, group.group_name)
    return tuple(map(enter, args)), {name: enter(value) for name, value in kwargs.items()}


def _enter_one(group: str, value: Any) -> Any:
    passes = isinstance(value, torch.Tensor) and value.is_floating_point()
    return Enter.apply(value, group) if passes else value


def _leave(group: dist.ProcessGroup | None, _: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """One all-reduce after the experts' outputs are combined."""
    return output if group is None else Leave.apply(output, group.group_name)


def _norm_over_heads(
    group: dist.ProcessGroup | None, width: int, copies: int, norm: torch.nn.Module, args: tuple, output: torch.Tensor
) -> torch.Tensor:
    """An RMS norm over the features of all heads, of which this rank has some: what its class computes, rescaled.

    One number per token travels, and its gradient does.
    """
    squares = args[0].float().pow(2).sum(-1, keepdim=True)
    everyone = squares if group is None else Both.apply(squares, group.group_name) / copies
    epsilon = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0)
    here = squares / args[0].shape[-1] + epsilon
    return (output * torch.sqrt(here / (everyone / width + epsilon))).to(output.dtype)


def _set_heads(attention: torch.nn.Module, heads: int, kv_heads: int) -> None:
    """The numbers that a class's code divides activations by: those of this rank."""
    head = next(getattr(attention, name) for name in ("head_dim", "head_size") if hasattr(attention, name))
    numbers = dict.fromkeys(QUERIES, heads) | dict.fromkeys(KEYS, kv_heads) | dict.fromkeys(WIDTHS, heads * head)
    for name, number in (numbers | {"num_key_value_groups": heads // kv_heads}).items():
        if hasattr(attention, name):
            setattr(attention, name, number)
    if "self.config.num_" in inspect.getsource(type(attention)).partition("def forward")[2]:  # Phi-3's
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads, attention.config.num_key_value_heads = heads, kv_heads


def _name_embedding(model: torch.nn.Module) -> None:
    """Gemma 1's and 2's scaled embedding by the name of Gemma 3's, which AutoTP knows: their code is the same."""
    embedding = model.get_input_embeddings()
    if type(embedding).forward is torch.nn.Embedding.forward:
        return
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding as Known

    if inspect.getsource(type(embedding).forward) == inspect.getsource(Known.forward):
        embedding.__class__ = Known
