"""What becomes of each weight under tensor parallelism: what AutoTP is told, and what its result is held against.

Where a layer is cut comes from the class's own plan in `transformers` (`base_model_tp_plan`), completed here where it
has none, or gathers what need not be gathered. How a weight is cut there comes from the model: a fused matrix part by
part, key-value heads shared where there are fewer than ranks, each expert as the MLP that it is. That it is right is
not taken on trust: `rehearsal.py` finds which gradients must be summed, and `proof.py` computes.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from tp2d_helpers.config import ConfigError
from tp2d_helpers.model.cuts import Cut
from tp2d_helpers.model.heads import Heads
from tp2d_helpers.model.styles import COLUMN, EXPERTS, GATHERED, HEADS, IGNORED, NORM, PARTS, ROW, styles_of
from tp2d_helpers.speed.layers import decoder_layers

WHOLE_GROUPS = ("query_key_value.weight", "query_key_value.bias")  # queries stand among their keys and values
ALIGNED = 8  # 16 bytes in bf16
LARGEST_WHOLE = 0.1  # of a decoder layer: matrices that every rank keeps whole, such as routers


@dataclass(frozen=True)
class Plan:
    """Of one model at one tp_size.

    Attributes:
        cuts: of each weight that is divided, by its name in `named_parameters()`.
        styles: of each module that is treated, by its name.
        head: name of the output head, which is cut by vocabulary.
        own: modules that this package divides, since AutoTP has no form for their layout.
        attention: (heads, key-value heads) on a rank, of each attention module.
    """

    tp_size: int
    cuts: dict[str, Cut] = field(default_factory=dict)
    styles: dict[str, str] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    head: str = ""
    attention: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: torch.nn.Module, tp_size: int) -> Plan:
        """Of a model, which may be one without storage.

        Raises:
            ConfigError: if the model has no plan, tp_size doesn't fit its heads or widths, or much would stay whole.
        """
        return _Planner(model, tp_size).plan if tp_size > 1 else cls(1)

    @property
    def uneven(self) -> bool:
        """Whether the ranks have shards of different sizes."""
        return any(len(set(map(cut.width, range(self.tp_size)))) > 1 for cut in self.cuts.values())

    def shape(self, name: str, whole: torch.Size, rank: int = 0) -> torch.Size:
        """The shape of a rank's shard. Rank 0 has the largest, where they differ."""
        return self.cuts[name].shape(whole, rank) if name in self.cuts else whole

    def shapes(self, model: torch.nn.Module, rank: int = 0) -> dict[str, torch.Size]:
        """The shapes of all of a rank's weights, by name."""
        return {name: self.shape(name, weight.shape, rank) for name, weight in model.named_parameters()}

    def partition_config(self, summed: Iterable[str] = ()) -> dict[str, Any]:
        """What AutoTP is told: which layers it cuts how, and whose gradients it sums: whole weights, by their names."""
        said = {name: style for name, style in self.styles.items() if style in (COLUMN, ROW, GATHERED)}
        said = {f"{name}.weight": style for name, style in said.items() if name not in self.own}
        specs = [
            {"patterns": _patterns(name for name in said if said[name] == style), **how}
            for style, how in (
                (COLUMN, {"partition_type": "column"}),
                (GATHERED, {"partition_type": "column", "gather_output": True}),
                (ROW, {"partition_type": "row"}),
            )
            if style in said.values()
        ]
        if summed := _patterns(summed):
            specs.append({"patterns": summed, "partition_type": "skip", "grad_allreduce": True})
        return {"use_default_specs": False, "layer_specs": specs, "lm_head_patterns": [self.head.rpartition(".")[2]]}


def _patterns(names: Iterable[str]) -> list[str]:
    """Regular expressions that match the names, one for all layers of a kind."""
    return list(dict.fromkeys("^" + re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) + "$" for name in names))


class _Planner:
    """Makes a `Plan`, module by module."""

    def __init__(self, model: torch.nn.Module, tp_size: int) -> None:
        self.model, self.tp_size, head = model, tp_size, model.get_output_embeddings()
        self.plan = Plan(tp_size, head=next((name for name, module in model.named_modules() if module is head), ""))
        self.text = model.config.get_text_config()
        self.kind = f"model_name: {model.config.model_type!r} can't be sharded by AutoTP: "
        self.heads = Heads.of(self.text)
        self.styles = styles_of(model)
        self.heads.check(tp_size)
        for name, module in model.named_modules():
            if style := self._style(name):
                self._linear(name, module, style)
            elif _is_experts(module):
                self._experts(name, module)
        for name in self.plan.attention:
            self._beside_heads(name, model.get_submodule(name))
        self._vocabulary()
        self._check_whole()
        if shared := next((name for name, cut in self.plan.cuts.items() if cut.partly_shared), ""):
            raise ConfigError(
                f"tp_size = {tp_size}: {shared} holds several matrices in one, and the {self._heads(shared)[1]} "
                f"key-value heads in it can't be shared by {tp_size} ranks; take a tp_size that divides them"
            )

    def _heads(self, name: str) -> tuple[int, int]:
        """(heads, key-value heads) of the layer that a module or weight belongs to."""
        return self.heads.in_layer(next((int(part) for part in name.split(".") if part.isdigit()), 0))

    def _style(self, name: str) -> str:
        """The style of a linear layer; "" for other modules."""
        module, prefix = self.model.get_submodule(name), self.model.base_model_prefix + "."
        if not isinstance(module, torch.nn.Linear | Conv1D):
            return ""
        found = (style for pattern, style in self.styles.items() if fnmatch.fnmatch(name.removeprefix(prefix), pattern))
        return next((style for style in found if style not in IGNORED), "")

    def _linear(self, name: str, module: torch.nn.Module, style: str) -> None:
        parent, turned = name.rpartition(".")[0], isinstance(module, Conv1D)
        heads, kv_heads = self._heads(name)
        self.plan.styles[name] = COLUMN if style == PARTS else style
        attention = style != GATHERED and self._head_dim(parent) is not None
        if style == ROW:
            dim = 0 if turned else 1
            self._add(f"{name}.weight", dim, [(module.weight.shape[dim], 1)], turned, not attention)
        else:
            dim = 1 if turned else 0
            parts = self._parts(name, module.weight.shape[dim], style)
            self._add(f"{name}.weight", dim, parts, turned, not attention)
            if module.bias is not None:
                self._add(f"{name}.bias", 0, parts, uneven=not attention)
        if attention:
            self.plan.attention[parent] = heads // self.tp_size, max(1, kv_heads // self.tp_size)
        cut = self.plan.cuts[f"{name}.weight"]
        # Where AutoTP, which knows one number for all layers, would leave ranks without heads.
        fewer = attention and any(number % self.tp_size for number in self.heads.key_values)
        if turned or fewer or not cut.plain or cut.width(0) != cut.width(self.tp_size - 1):
            self.plan.own.add(name)

    def _head_dim(self, name: str) -> int | None:
        """The width of a head, of an attention module."""
        module = self.model.get_submodule(name)
        return next((getattr(module, known) for known in ("head_dim", "head_size") if hasattr(module, known)), None)

    def _parts(self, name: str, size: int, style: str) -> list[tuple[int, int]]:
        """(size, unit that must not be cut) of each matrix in a column-wise layer of so many outputs."""
        parent, _, last = name.rpartition(".")
        heads, kv_heads = self._heads(name)
        head = self._head_dim(parent) if style != GATHERED else None
        if last == "gate_up_proj":
            return [(size // 2, 1)] * 2
        if style == PARTS and last == "c_attn":
            return [(size // 3, head)] * 3
        if last == "query_key_value":
            module = self.model.get_submodule(parent)
            if getattr(module, "multi_query", False) and not getattr(module, "new_decoder_architecture", False):
                return [(heads * head, head), (head, head), (head, head)]
            groups = kv_heads if getattr(module, "new_decoder_architecture", False) else heads
            return [(size, size // groups)]
        if style == PARTS:
            return [(heads * head, head), (kv_heads * head, head), (kv_heads * head, head)]
        return [(size, head if head and size % head == 0 else 1)]

    def _add(
        self, name: str, dim: int, parts: list[tuple[int, int]], turned: bool = False, uneven: bool = False
    ) -> None:
        """Cut each of a weight's parts, given as (size, unit that must not be cut).

        Args:
            uneven: of what can't be divided, the first ranks may get one more.
        """
        ranges: list[list[tuple[int, int]]] = [[] for _ in range(self.tp_size)]
        begin = 0
        for size, unit in parts:
            number = size // unit
            shared = number == self._heads(name)[1] and not self.tp_size % number and not name.endswith(WHOLE_GROUPS)
            if number % self.tp_size and not shared and not uneven:
                raise ConfigError(
                    f"tp_size = {self.tp_size}: does not divide {name} {list(self.model.get_parameter(name).shape)} in "
                    f"dimension {dim}" + f", where it has {number} heads or groups of {unit}" * (unit > 1)
                )
            # Key-value heads that are fewer than ranks are shared by ranks that follow one another.
            copies = self.tp_size // number if shared and number % self.tp_size else 1
            cut = Cut.even(0, number, self.tp_size // copies).ranges
            for rank, found in enumerate(ranges):
                ((first, last),) = cut[rank // copies]
                found.append((begin + first * unit, begin + last * unit))
            begin += size
        self.plan.cuts[name] = Cut(dim, tuple(map(tuple, ranges)), turned)

    def _experts(self, name: str, module: torch.nn.Module) -> None:
        """Each expert's MLP by columns and rows, in tensors [experts, out, in], or [experts, in, out]."""
        turned = getattr(module, "is_transposed", False)
        if others := [n for n, p in module.named_parameters(recurse=False) if p.ndim != 3]:
            raise ConfigError(f"{self.kind}{name}.{others[0]} is among its experts: no rule. Take tp_size 1")
        for own, weight in module.named_parameters(recurse=False):
            dim = (1 if turned else 2) if own == "down_proj" else 2 if turned else 1
            size = weight.shape[dim]
            each = size // (1 + (own == "gate_up_proj")) / self.tp_size
            if each % ALIGNED:
                raise ConfigError(
                    f"tp_size = {self.tp_size}: leaves each rank {each:g} of an expert's features; it must be a "
                    f"multiple of {ALIGNED}, which the grouped matmul of experts needs"
                )
            self._add(f"{name}.{own}", dim, [(size // 2, 1)] * 2 if own == "gate_up_proj" else [(size, 1)])
        self.plan.styles[name] = EXPERTS

    def _beside_heads(self, name: str, attention: torch.nn.Module) -> None:
        """What else of an attention module has a part for each head: sinks, norms of all heads' features."""
        head, counts = self._head_dim(name), set(self._heads(name))
        for own, module in attention.named_modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) in counts:
                raise ConfigError(f"{self.kind}{name}.{own} has a module for each head: no rule. Take tp_size 1")
        for own, weight in attention.named_parameters():
            full, (module, _, _) = f"{name}.{own}", own.rpartition(".")
            if full in self.plan.cuts or f"{name}.{module}" in self.plan.styles:
                continue
            if weight.shape[0] in counts and (weight.ndim == 2 or not module):
                self._add(full, 0, [(weight.shape[0], 1)])
                self.plan.styles[f"{name}.{module}".rstrip(".")] = HEADS
            elif weight.ndim == 1 and weight.shape[0] in {count * head for count in counts} - {head}:
                self._add(full, 0, [(weight.shape[0], head)])
                self.plan.styles[f"{name}.{module}"] = NORM

    def _vocabulary(self) -> None:
        head = self.model.get_output_embeddings()
        if head is None:
            raise ConfigError(self.kind + "it has no output head; take tp_size 1")
        if head.weight.shape[0] < self.tp_size:
            raise ConfigError(f"tp_size = {self.tp_size}: more than the vocabulary of {head.weight.shape[0]} tokens")
        of_head = {id(parameter) for parameter in head.parameters()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in of_head:
                self.plan.cuts[name] = Cut.even(0, parameter.shape[0], self.tp_size)

    def _check_whole(self) -> None:
        """Refuse a plan that leaves much of a decoder layer whole."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for layer in decoder_layers(self.model):
            weights = {names[id(p)]: p for p in layer.parameters()}
            whole = {n: p.numel() for n, p in weights.items() if p.ndim > 1 and n not in self.plan.cuts}
            total = sum(p.numel() for p in weights.values())
            if sum(whole.values()) > LARGEST_WHOLE * total:
                name = max(whole, key=whole.__getitem__)
                raise ConfigError(
                    f"{self.kind}{name} {list(weights[name].shape)} is not covered by its plan, and {len(whole)} "
                    f"matrices, {sum(whole.values()) / total:.0%} of a layer, would stay whole. Take tp_size 1"
                )


def _is_experts(module: torch.nn.Module) -> bool:
    """Whether a module holds the MLPs of several experts in tensors [experts, …], as `transformers` packs them."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, torch.nn.Parameter) and down.ndim == 3
