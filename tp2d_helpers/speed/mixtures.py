"""Mixtures of experts: which modules hold experts, and which linear layers weigh them."""

from __future__ import annotations

import torch
from torch.nn.modules.conv import _ConvNd

from tp2d_helpers.speed.layers import decoder_layers


def blocks_of_experts(model: torch.nn.Module) -> dict[torch.nn.Module, set[int]]:
    """The modules in the decoder's layers that have experts among their children, and how many these are."""
    found = {}
    for module in (module for layer in decoder_layers(model) for module in layer.modules()):
        if counts := {_experts(name, child) for name, child in module.named_children()} - {0}:
            found[module] = counts
    return found


def routers(model: torch.nn.Module) -> set[torch.nn.Module]:
    """The linear layers beside experts with an output for each, or with one alone, for the shared expert.

    They have few outputs, on which much depends. Most classes have no such layer: their routers hold bare matrices. A
    shared expert is no router, though Qwen3-Next's has as many features as there are experts: it has several layers.
    """
    found = set()
    for block, counts in blocks_of_experts(model).items():
        inside = [[m for m in child.modules() if isinstance(m, torch.nn.Linear)] for child in block.children()]
        found |= {one for one, *others in filter(None, inside) if not others and one.weight.shape[0] in counts | {1}}
    return found


def _experts(name: str, module: torch.nn.Module) -> int:
    """How many experts a module is: a stack of weights [experts, …], or a list of MLPs. 0 if it is none."""
    if isinstance(module, torch.nn.ModuleList):
        return len(module) * (name == "experts")
    own = list(module.parameters(recurse=False))
    stack = next((weight for weight in own if weight.ndim == 3), None)
    alone = len(own) == len(list(module.parameters())) and all(weight.ndim > 1 for weight in own)
    return len(stack) if stack is not None and alone and not isinstance(module, _ConvNd) else 0
