"""Which weights decay: those that are a matrix, an embedding or a kernel in some product with activations.

What scales or shifts doesn't: shrinking it regularises nothing. Neither a weight's shape nor its name tells which it
is. Cohere's norms of heads are [heads, head_dim], GPT-OSS's biases [experts, features], Mamba's rates [features,
states], all used element by element; and a linear layer may hang in something called norm. A pass of the model tells.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch

# The products of the graph, by the names of their nodes, and which of their inputs are the two factors.
FACTORS = {
    "MmBackward0": (0, 1),
    "BmmBackward0": (0, 1),
    "AddmmBackward0": (1, 2),
    "BaddbmmBackward0": (1, 2),
    "GroupedMmBackward0": (0, 1),
    "ConvolutionBackward0": (0, 1),
    "EmbeddingBackward0": (0,),
}
JOINS = ("CatBackward0", "StackBackward0")


def undecayed(model: torch.nn.Module, loss: torch.Tensor) -> set[str]:
    """The kinds of weights of two or more dimensions that don't decay. What has fewer never does.

    Args:
        loss: of a pass of the model; its graph is searched.
    """
    decayed, queue, seen = set(), [loss.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        inputs = [before for before, _ in node.next_functions]
        for factor in FACTORS.get(node.name(), ()):
            decayed |= _weights(inputs[factor])
        queue += inputs
    return {kind_of(name) for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in decayed}


def _weights(factor: Any) -> set[int]:
    """The ids of the weights that a factor of a product was made of, by views, casts and the like, or joined from."""
    if factor is None or factor.name() in FACTORS:
        return set()
    if hasattr(factor, "variable"):
        return {id(factor.variable)}
    inputs = [before for before, _ in factor.next_functions if before is not None]
    alone = len(inputs) == 1 or factor.name() in JOINS  # else it is a result of several: activations
    return set().union(*map(_weights, inputs)) if alone else set()


def kind_of(name: str) -> str:
    """A weight's name without the number of its layer."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def parameter_groups(model: torch.nn.Module, undecayed: Collection[str], decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups, of what is trained: what decays, what doesn't. None is empty: DeepSpeed can't have it.

    Args:
        undecayed: kinds of weights of two or more dimensions that don't. LoRA's are none.
    """
    groups: tuple[list, list] = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            groups[weight.ndim < 2 or kind_of(name) in undecayed].append(weight)
    return [dict(params=group, weight_decay=rate) for group, rate in zip(groups, (decay, 0.0), strict=True) if group]
