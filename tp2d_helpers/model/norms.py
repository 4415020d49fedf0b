"""What the norms of a model's hidden states keep for the backward pass, counted on the model without storage."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from tp2d_helpers.model.rehearsal import SAMPLE, quiet
from tp2d_helpers.speed.layers import decoder_layers


class Norms(NamedTuple):
    """The norms of hidden states in a decoder layer.

    Attributes:
        count: how many there are.
        each: what one keeps in bf16, in tensors of its input's size; those in fp32 count twice. By default, as Llama's:
            the input in fp32, and the normalised input.
        outputs: of the norms, those whose input is what a block has made, before it is added to the hidden states.
    """

    count: float = 2
    each: float = 3
    outputs: float = 0

    @classmethod
    def of(cls, model: torch.nn.Module, hidden: int) -> Norms:
        """Of a model without storage, whose layers are taken to be like the first."""
        layer = decoder_layers(model)[0]
        norms = [module for name, module in layer.named_modules() if _is_norm(name, module, hidden)]
        sizes = {type(norm): _kept(norm, hidden) for norm in norms}
        if not norms:
            return cls()
        each = sum(sizes[type(norm)] for norm in norms) / len(norms)
        return cls(len(norms), each, _after_blocks(model, layer, norms))


def _is_norm(name: str, module: torch.nn.Module, hidden: int) -> bool:
    weight = getattr(module, "weight", None)
    sized = isinstance(weight, torch.Tensor) and weight.shape == (hidden,)
    return sized and "norm" in type(module).__name__.lower() and not name.endswith(("q_norm", "k_norm"))


def _kept(norm: torch.nn.Module, hidden: int) -> float:
    """`Norms.each`, of one: what a further token adds to its saved tensors."""
    norm, sizes = copy.deepcopy(norm).to(torch.bfloat16), []
    try:
        for tokens in (1, 2):
            x, saved = torch.empty(1, tokens, hidden, dtype=torch.bfloat16, device="meta", requires_grad=True), {}

            def keep(tensor: torch.Tensor, saved: dict = saved) -> torch.Tensor:
                storage = tensor.untyped_storage()
                saved[storage._cdata] = storage
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                norm(x)
            sizes.append(sum(storage.nbytes() for storage in saved.values()))
    except Exception:  # one that takes more than its input
        return Norms().each
    return int((sizes[1] - sizes[0]) / (2 * hidden))  # without the few numbers of each token


class _Seen(Exception):
    """The first layer is through."""


def _after_blocks(model: torch.nn.Module, layer: torch.nn.Module, norms: list[torch.nn.Module]) -> int:
    """`Norms.outputs`: how many of them take the very output of another module of the layer, and no sum."""
    made, found, handles = [], set(), []

    def note(module: torch.nn.Module, _: Any, output: Any) -> None:
        """What a module of the layer has made."""
        made.append(output[0] if isinstance(output, tuple) else output)

    def look(module: torch.nn.Module, arguments: tuple) -> None:
        """Whether a norm takes one of these."""
        if any(arguments and arguments[0] is output for output in made):
            found.add(module)

    def stop(*_: Any) -> None:
        """The other layers are left out."""
        raise _Seen

    for module in layer.modules():
        if any(module is norm for norm in norms):
            handles.append(module.register_forward_pre_hook(look))
        elif module is not layer:
            handles.append(module.register_forward_hook(note))
    handles.append(layer.register_forward_hook(stop))
    try:
        with quiet(), torch.no_grad():
            model(input_ids=torch.zeros(SAMPLE, dtype=torch.long, device="meta"), use_cache=False)
    except Exception:  # `_Seen`; or the class can't do without values, and what was found so far counts
        pass
    finally:
        for handle in handles:
            handle.remove()
    return len(found)
