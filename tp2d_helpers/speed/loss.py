"""The loss of next-token prediction: what the model's own loss function is replaced by."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from tp2d_helpers.data.dataset import IGNORED
from tp2d_helpers.speed.cross_entropy import CrossEntropy, HeadLoss, Vocabulary, chunk_step, worth_chunks
from tp2d_helpers.speed.logits import Logits, delay_logits


def causal_lm_loss(vocabulary: Vocabulary, compiled: bool) -> Callable[..., torch.Tensor]:
    """The loss of next-token prediction, with the signature of `transformers`' loss functions."""

    def whole(logits: torch.Tensor, targets: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """From all logits [positions, V/t]."""
        return CrossEntropy.apply(logits, targets, vocabulary).sum() / count

    compiles = functools.partial(torch.compile, dynamic=False) if compiled else lambda function: function
    whole = compiles(whole)
    steps = functools.cache(lambda operations: compiles(chunk_step(vocabulary, operations)))
    group = vocabulary.group and vocabulary.group.group_name

    def loss(
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int = 0,  # of the whole vocabulary; what counts here is the part that the logits have
        num_items_in_batch: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """The sum over the positions, divided by `num_items_in_batch`, or else by how many have a target."""
        # Cheaper than to cut the logits, which copies them.
        targets = F.pad(labels[..., 1:], (0, 1), value=IGNORED).flatten()
        count = (targets != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, dtype=torch.float32, device=targets.device)
        if isinstance(logits, Logits):
            head, hidden = logits.head.module, logits.hidden.flatten(0, -2)
            if logits.made is None and worth_chunks(*hidden.shape, head.weight.requires_grad):
                step = steps(logits.operations)
                return HeadLoss.apply(hidden, head.weight, head.bias, targets, count, step, group)
            logits = logits.whole("loss")
        return whole(logits.flatten(0, -2), targets, count)

    return loss


def fuse_loss(model: torch.nn.Module, compiled: bool, in_chunks: bool = True) -> None:
    """Replace the model's loss by `causal_lm_loss`.

    Args:
        in_chunks: whether to compute the logits of a large micro-batch in chunks. The head's weight must be there when
            the loss is computed, not only while the head is called.
    """
    head = model.get_output_embeddings()
    if in_chunks:
        delay_logits(head)
    model.loss_function = causal_lm_loss(Vocabulary.of(head), compiled)


def loss_from_logits(model: torch.nn.Module) -> None:
    """Compute the loss from the model's logits, as `transformers` does, and not by the model itself.

    For a class that came with code of its own and ignores `num_items_in_batch`: the sum of the losses over a step's
    micro-batches and ranks would be a mean of means.
    """
    model.loss_function = ForCausalLMLoss
    whole, parameters = model.forward, inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    @functools.wraps(whole)
    def forward(
        labels: torch.Tensor | None = None, num_items_in_batch: torch.Tensor | None = None, **batch: Any
    ) -> CausalLMOutput:
        """The model's logits, and their loss if there are labels; what the class doesn't know is not passed on."""
        output = whole(**{name: value for name, value in batch.items() if takes_all or name in parameters})
        logits = output[0] if isinstance(output, tuple) else output.logits
        loss = None
        if labels is not None:
            loss = model.loss_function(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)

    model.forward = forward
