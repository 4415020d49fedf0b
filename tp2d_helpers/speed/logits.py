"""Logits that are not computed before it is known what for: the loss needs them in parts, all else as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.module_inject.layers import VocabParallelLinear

# What a class may do to logits before it hands them to the loss, and the loss can do to a part of them as well.
ELEMENT_WISE = {"div", "true_divide", "mul", "tanh", "float", "to", "contiguous"}
ELEMENT_WISE |= {"__truediv__", "__mul__", "__rmul__"}
KNOWN = {"shape", "dtype", "ndim", "grad_fn", "size", "dim", "numel", "is_contiguous", "is_floating_point"}
Operation = tuple[Callable[..., torch.Tensor], tuple[Any, ...], tuple[tuple[str, Any], ...]]  # after the logits


class Logits(torch.Tensor):
    """What a head returns in training: its input, and what has been done to its output since.

    Shape and dtype are those of the logits. Element-wise operations with numbers are noted. For anything else the whole
    logits are computed, once, and it is done to them: whoever reads them finds what the model's class would have made.
    """

    head: torch.nn.Module
    hidden: torch.Tensor  # [..., h], the head's input
    operations: tuple[Operation, ...]
    compute: Callable[[torch.Tensor], torch.Tensor]  # the head's own forward
    made: torch.Tensor | None  # the whole logits, once something asked for them
    why: str  # what did

    @classmethod
    def after(cls, head: Any, hidden: torch.Tensor, compute: Callable, operations: tuple[Operation, ...]) -> Logits:
        """The logits of `hidden` after `operations`. They take no memory, and nothing is computed."""
        dtype = replay(operations, hidden.new_empty(0)).dtype
        shape = *hidden.shape[:-1], len(head.weight)
        logits = torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)
        logits.head, logits.hidden, logits.compute, logits.operations = head, hidden, compute, operations
        logits.made, logits.why = None, ""
        return logits

    def whole(self, why: str) -> torch.Tensor:
        """[..., V/t], as the head and the operations make them, with their place in autograd's graph."""
        if self.made is None:
            self.made, self.why = replay(self.operations, self.compute(self.hidden)), why
        return self.made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """The operation, noted or done."""
        kwargs, name = kwargs or {}, getattr(function, "__name__", str(function))
        if name == "__get__":  # of an attribute
            name = function.__self__.__name__
            if name == "device":
                return args[0].hidden.device
        first, others = (args[0], [*args[1:], *kwargs.values()]) if args else (None, [])
        if isinstance(first, Logits) and first.made is None:
            if name in KNOWN:
                return super().__torch_function__(function, types, args, kwargs)
            if name in ELEMENT_WISE and not any(isinstance(other, torch.Tensor) for other in others):
                operation = function, args[1:], tuple(kwargs.items())
                return cls.after(first.head, first.hidden, first.compute, (*first.operations, operation))
        args, kwargs = _computed((args, kwargs), name)
        return function(*args, **kwargs)


def replay(operations: tuple[Operation, ...], logits: torch.Tensor) -> torch.Tensor:
    """What the operations make of logits, or of a part of them."""
    for function, more, named in operations:
        logits = function(logits, *more, **dict(named))
    return logits


def _computed(value: Any, why: str) -> Any:
    if isinstance(value, Logits):
        return value.whole(why)
    if isinstance(value, dict):
        return {name: _computed(part, why) for name, part in value.items()}
    return type(value)(_computed(part, why) for part in value) if type(value) in (list, tuple) else value


def delay_logits(head: torch.nn.Module) -> str:
    """Let a head return `Logits` in training, where a gradient is wanted.

    Returns:
        why it can't; "" if it does.
    """
    if not (isinstance(head, VocabParallelLinear) or type(head) is torch.nn.Linear):
        return f"its head is a {type(head).__name__}"
    compute = head.forward

    @functools.wraps(compute)
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        """[..., V/t], from hidden [..., h]."""
        later = head.training and torch.is_grad_enabled()
        return Logits.after(head, hidden, compute, ()) if later else compute(hidden)

    head.forward = forward
    return ""
