"""Logits that are not computed before it is known what for: for the loss in chunks, for all else whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.module_inject.layers import VocabParallelLinear

# What a model's class may do to logits before its loss, and what can as well be done to a chunk of them.
ELEMENT_WISE = {"div", "true_divide", "mul", "tanh", "float", "to", "contiguous", "__truediv__", "__mul__", "__rmul__"}
KNOWN = {"shape", "dtype", "ndim", "grad_fn", "size", "dim", "numel", "is_contiguous", "is_floating_point"}

Operation = tuple[Callable[..., torch.Tensor], tuple[Any, ...], tuple[tuple[str, Any], ...]]  # with its other arguments


@dataclass(frozen=True)
class Head:
    """A head in training.

    Attributes:
        module: has the weight [V/t, h] and the bias.
        compute: its own forward, from hidden states [..., h] to logits [..., V/t].
        asked: names of the operations that have needed whole logits.
    """

    module: torch.nn.Module
    compute: Callable[[torch.Tensor], torch.Tensor]
    asked: set[str]


class Logits(torch.Tensor):
    """What a head returns in training: what it was given, and what has been done to its output since.

    Element-wise operations with numbers are noted. For anything else the whole logits are computed, once, and it is
    done to them: whoever reads them finds what the model's class would have made. A meta tensor with the shape and the
    dtype of the logits, so that nothing can take it for numbers.
    """

    head: Head
    hidden: torch.Tensor
    operations: tuple[Operation, ...]
    made: torch.Tensor | None  # the whole logits, once something has needed them

    @classmethod
    def of(cls, head: Head, hidden: torch.Tensor, operations: tuple[Operation, ...] = ()) -> Logits:
        """Those of hidden states [..., h], after the operations."""
        dtype = replay(operations, hidden.new_empty(0)).dtype
        shape = *hidden.shape[:-1], len(head.module.weight)
        logits = torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)
        logits.head, logits.hidden, logits.operations, logits.made = head, hidden, operations, None
        return logits

    def whole(self, why: str) -> torch.Tensor:
        """[..., V/t], with their place in autograd's graph. `why` names the operation that needs them."""
        if self.made is None:
            self.head.asked.add(why)
            self.made = replay(self.operations, self.head.compute(self.hidden))
        return self.made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """The operation, noted or done."""
        kwargs, name, first = kwargs or {}, getattr(function, "__name__", str(function)), args[0] if args else None
        if name == "__get__":  # of an attribute
            name = function.__self__.__name__
        if isinstance(first, Logits) and first.made is None:
            if name == "device":
                return first.hidden.device
            if name in KNOWN:
                return super().__torch_function__(function, types, args, kwargs)
            if name in ELEMENT_WISE and not any(isinstance(v, torch.Tensor) for v in (*args[1:], *kwargs.values())):
                operation = function, args[1:], tuple(kwargs.items())
                return cls.of(first.head, first.hidden, (*first.operations, operation))
        return function(*computed(args, name), **computed(kwargs, name))


def replay(operations: tuple[Operation, ...], logits: torch.Tensor) -> torch.Tensor:
    """What the operations make of logits, or of a chunk of them."""
    for function, more, named in operations:
        logits = function(logits, *more, **dict(named))
    return logits


def computed(value: Any, why: str) -> Any:
    """The value, or values, with whole logits in place of `Logits`."""
    if isinstance(value, Logits):
        return value.whole(why)
    if isinstance(value, dict):
        return {name: computed(part, why) for name, part in value.items()}
    return type(value)(computed(part, why) for part in value) if type(value) in (list, tuple) else value


def delay_logits(module: torch.nn.Module | None, asked: set[str] | None = None) -> str:
    """Let a model's head return `Logits` in training, where a gradient is wanted.

    Args:
        asked: for the names of the operations that need whole logits.

    Returns:
        why it can't; "" if it does.
    """
    if not (isinstance(module, VocabParallelLinear) or type(module) is torch.nn.Linear):
        return f"its head is a {type(module).__name__}"
    head = Head(module, module.forward, set() if asked is None else asked)

    @functools.wraps(module.forward)
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        """[..., V/t], from hidden [..., h]."""
        return Logits.of(head, hidden) if module.training and torch.is_grad_enabled() else head.compute(hidden)

    module.forward = forward
    return ""
