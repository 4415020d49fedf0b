"""The cross-entropy with the vocabulary divided over the TP group: of logits, or of hidden states in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.module_inject.layers import VocabParallelLinear

from tp2d_helpers.data.dataset import IGNORED
from tp2d_helpers.speed import reducers, reductions
from tp2d_helpers.speed.logits import Operation, replay

# Positions whose logits are there at once. The more, the less often the gradient of the head's weight is read and
# written to be added to; the fewer, the less memory: 4,096 have 0.6 GiB of logits, if a rank has 76,032 of each.
ROWS = 4096
FP16_FACTOR = 2.0**8  # of gradients in fp16 until the backward pass, which multiplies them by the loss scale

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Vocabulary:
    """The part of the vocabulary that this rank has the logits of.

    Attributes:
        group: the TP group that it is divided over; None if it isn't.
        first: this rank's first token id.
    """

    group: dist.ProcessGroup | None = None
    first: int = 0

    @classmethod
    def of(cls, head: torch.nn.Module | None) -> Vocabulary:
        """That of a head, whose TP group the operators of `reductions` know from now on."""
        if not isinstance(head, VocabParallelLinear):
            return cls()
        reductions.register(head.mp_group)
        return cls(head.mp_group, head.vocab_start_index)

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(−log softmax(logits)[target], log Σ exp(logits)) of each position over the whole vocabulary, in fp32.

        What travels is two numbers per position and rank, in one all-reduce.

        Args:
            logits: [positions, V/t].
            targets: [positions], token ids; the loss is 0 where there is none.
        """
        scores, local = logits.float(), targets - self.first
        mine = (local >= 0) & (local < logits.shape[-1])
        picked = scores.gather(-1, torch.where(mine, local, 0).unsqueeze(-1)).squeeze(-1)
        picked, normaliser = torch.where(mine, picked, 0.0), torch.logsumexp(scores, -1)
        if self.group is not None:
            parts = normaliser.new_zeros(self.group.size(), 2, len(targets))
            parts[self.group.rank()] = torch.stack([normaliser, picked])
            normalisers, picks = torch.ops.tp2d.all_reduce(parts, self.group.group_name).unbind(1)
            normaliser, picked = torch.logsumexp(normalisers, 0), picks.sum(0)
        return torch.where(targets != IGNORED, normaliser - picked, 0.0), normaliser

    def gradient(
        self, logits: torch.Tensor, targets: torch.Tensor, normaliser: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """(softmax − onehot) · factor, [positions, V/t] in the dtype of the logits; factor is 0-dim or [positions]."""
        target = torch.arange(logits.shape[-1], device=logits.device) == (targets - self.first).unsqueeze(-1)
        weight = torch.where(targets != IGNORED, factor, 0.0).unsqueeze(-1)
        softmax = torch.exp(logits.float() - normaliser.unsqueeze(-1))
        return (torch.where(target, softmax - 1, softmax) * weight).to(logits.dtype)


class CrossEntropy(torch.autograd.Function):
    """−log softmax(logits)[target] of each position.

    The gradient is computed from the logits again, so that nothing in fp32 is kept between the passes.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
        """fp32 [positions], 0 where there is no target, from the rank's logits [positions, V/t]."""
        losses, normaliser = vocabulary.losses(logits, targets)
        ctx.save_for_backward(logits, targets, normaliser)
        ctx.vocabulary = vocabulary
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """[positions, V/t] in the dtype of the logits."""
        return ctx.vocabulary.gradient(*ctx.saved_tensors, gradient), None, None


def worth_chunks(positions: int, hidden: int, trained: bool) -> bool:
    """Whether `HeadLoss` takes less memory than `CrossEntropy`, in bf16.

    Per token id, it has 4 bytes of a logit and its gradient for each of `ROWS` positions and not of all. It adds, for a
    head that is trained, 4 bytes for each of `hidden` numbers of the weight's gradient.
    """
    return positions > ROWS + hidden * trained


class HeadLoss(torch.autograd.Function):
    """The cross-entropy of hidden states under a head. Of logits and their gradient there is a chunk at a time.

    All gradients are made in the forward pass, while a chunk's logits are there; the backward pass multiplies them by
    the loss's. That of the hidden states is summed over the TP group while the weight's is computed. DeepSpeed's
    `vocab_parallel_linear_cross_entropy` computes the logits a second time and asks the device whether targets are
    valid; that of PyTorch 2.13, `linear_cross_entropy`, takes no divided vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        count: torch.Tensor, step: Step, group: str | None,
    ) -> torch.Tensor:  # fmt: skip
        """Σ losses / count: 0-dim, in fp32.

        Args:
            hidden: [positions, h].
            weight: [V/t, h].
            bias: [V/t].
            targets: [positions], token ids.
            count: 0-dim, in fp32.
            step: see `chunk_step`.
            group: name of the TP group that the vocabulary is divided over.
        """
        half = hidden.dtype == torch.float16  # 1 / count may be too small for it
        factor, ctx.rest = (torch.full_like(count, FP16_FACTOR), 1 / (FP16_FACTOR * count)) if half else (1 / count, 1)
        dw, db = (
            torch.empty_like(part, dtype=torch.float32) if needed else None
            for part, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        total, dx = torch.zeros_like(count), torch.empty_like(hidden)
        reducer = None if group is None else reducers.REDUCERS[group]
        parts = (tensor.tensor_split(-(-len(targets) // ROWS)) for tensor in (hidden, targets, dx))
        for i, (x, target, part) in enumerate(zip(*parts, strict=True)):
            logits = F.linear(x, weight, bias)
            total += step(logits, target, factor)  # from here on they are the gradient
            torch.mm(logits, weight, out=part)
            if reducer:
                reducer.begin(part)
            if dw is not None:
                _add_product(dw, logits, x, first=i == 0)
            if db is not None:
                summed = logits.sum(0, dtype=torch.float32)
                db = summed if i == 0 else db + summed
            del logits  # or there would be two chunks, as the next one's are computed
        if reducer:
            reducer.finish()
        ctx.save_for_backward(dx, dw, db)
        ctx.dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of what `forward` takes first: hidden states, weight and bias."""
        scale = gradient * ctx.rest
        return *(_times(part, scale, ctx.dtype) for part in ctx.saved_tensors), None, None, None, None


def chunk_step(vocabulary: Vocabulary, operations: tuple[Operation, ...]) -> Step:
    """step(logits, targets, factor): the sum of a chunk's losses; writes `factor` times its gradient over the logits.

    Args:
        operations: what a class does to the logits of its head before it takes the loss.
    """

    def step(logits: torch.Tensor, targets: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """0-dim, in fp32, from logits [positions, V/t] and targets [positions]."""
        scores, back = torch.func.vjp(lambda logits: replay(operations, logits), logits)
        losses, normaliser = vocabulary.losses(scores, targets)
        logits.copy_(back(vocabulary.gradient(scores, targets, normaliser, factor))[0])
        return losses.sum()

    return step


def _add_product(total: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor, first: bool) -> None:
    """total += gradientᵀ x, or = if it is the first: total [n, k] in fp32, gradient [rows, n], x [rows, k]."""
    wide = total.is_cuda and x.dtype != torch.float32
    if wide and first:
        torch.mm(gradient.T, x, out_dtype=torch.float32, out=total)
    elif wide:
        torch.addmm(total, gradient.T, x, out_dtype=torch.float32, out=total)
    else:  # what CPUs have no matmul for; in fp16 the product alone may be too large
        torch.addmm(total, gradient.T.float(), x.float(), beta=0 if first else 1, out=total)


def _times(part: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    return None if part is None else torch.mul(part, scale, out=torch.empty_like(part, dtype=dtype))
