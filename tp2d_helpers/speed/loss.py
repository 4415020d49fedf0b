"""The cross-entropy of next-token prediction, with the vocabulary divided over the TP group."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.module_inject.layers import VocabParallelLinear
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from tp2d_helpers.data.dataset import IGNORED
from tp2d_helpers.speed import reductions


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup, operation: str = "sum") -> torch.Tensor:
    """The reduction over the group, as a new tensor; the device waits for it."""
    return torch.ops.tp2d.all_reduce(tensor, operation, group.group_name)


class CrossEntropy(torch.autograd.Function):
    """−log softmax(logits)[target] of each position, with the vocabulary divided over the TP group.

    Each rank has the logits of its tokens only: [positions, V/t]. What travels is three numbers per position. The
    gradient, softmax − onehot, is computed from the logits again, so that nothing in fp32 is kept between the passes.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup | None, first: int
    ) -> torch.Tensor:
        """fp32 [positions], 0 where there is no target; `first` is the token id of this rank's first logit."""
        scores, local = logits.float(), targets - first
        mine = (local >= 0) & (local < logits.shape[-1])
        picked = scores.gather(-1, torch.where(mine, local, 0).unsqueeze(-1)).squeeze(-1)
        picked, normaliser = torch.where(mine, picked, 0.0), torch.logsumexp(scores, -1)
        if group is not None:
            highest = all_reduce(normaliser, group, "max")
            total, picked = all_reduce(torch.stack([torch.exp(normaliser - highest), picked]), group).unbind()
            normaliser = highest + torch.log(total)
        ctx.save_for_backward(logits, targets, normaliser)
        ctx.first = first
        return torch.where(targets != IGNORED, normaliser - picked, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """[positions, V/t] in the dtype of the logits."""
        logits, targets, normaliser = ctx.saved_tensors
        target = torch.arange(logits.shape[-1], device=logits.device) == (targets - ctx.first).unsqueeze(-1)
        weight = torch.where(targets != IGNORED, gradient, 0.0).unsqueeze(-1)
        softmax = torch.exp(logits.float() - normaliser.unsqueeze(-1))
        return (torch.where(target, softmax - 1, softmax) * weight).to(logits.dtype), None, None, None


def causal_lm_loss(group: dist.ProcessGroup | None, first: int) -> Callable[..., torch.Tensor]:
    """The loss of next-token prediction, with the signature of `transformers`' loss functions.

    Args:
        group: the TP group that the vocabulary is divided over; None if it isn't.
        first: this rank's first token id.
    """

    def loss(
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int = 0,  # of the whole vocabulary; what counts here is the part that the logits have
        num_items_in_batch: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """The sum over the positions, divided by `num_items_in_batch`, or else by how many have a target."""
        targets = F.pad(labels[..., 1:], (0, 1), value=IGNORED)  # cheaper than to cut the logits, which copies them
        losses = CrossEntropy.apply(logits.flatten(0, -2), targets.flatten(), group, first)
        count = (targets != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / count

    return loss


def fuse_loss(model: torch.nn.Module, compiled: bool) -> None:
    """Replace the model's loss by `causal_lm_loss`."""
    head = model.get_output_embeddings()
    parallel = isinstance(head, VocabParallelLinear)
    if parallel:
        reductions.register(head.mp_group)
    loss = causal_lm_loss(head.mp_group if parallel else None, head.vocab_start_index if parallel else 0)
    model.loss_function = torch.compile(loss, dynamic=False) if compiled else loss


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
