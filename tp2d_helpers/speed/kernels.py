"""Triton kernels: AdamW's step in one pass over memory, and the sum of gradients.

Per weight `OnePassAdamW` reads the gradient, the fp32 master and Adam's two moments, and writes the last three and the
weight that the model computes with: 28 bytes in bf16. PyTorch's fused AdamW needs the gradient in fp32 and leaves the
weight to a copy; with both passes it is 46 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048  # elements per program


@triton.jit
def _adamw(
    addresses, tensors, begins, sizes, offsets, masters, means, squares, weights, scalars,
    lr, beta1, beta2, eps, decay, ALIGNED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(scalars + 3) == 0:  # an infinite gradient: the step is left out
        return
    unscale, correction1, correction2 = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    tensor, begin = tl.load(tensors + tl.program_id(0)), tl.load(begins + tl.program_id(0))
    address, offset, size = tl.load(addresses + tensor), tl.load(offsets + tensor) + begin, tl.load(sizes + tensor)
    if ALIGNED:  # what the compiler can't know of numbers from memory; without it, it loads one element at a time
        address, offset = tl.multiple_of(address, 16), tl.multiple_of(offset, 8)
        begin, size = tl.multiple_of(begin, 8), tl.multiple_of(size, 8)
    lane = tl.arange(0, BLOCK)
    inside = begin + lane < size
    at = offset + lane
    gradient = tl.load(address.to(tl.pointer_type(GRADIENT)) + begin + lane, inside, other=0.0).to(tl.float32) * unscale
    mean = tl.load(means + at, inside, other=0.0)
    mean += (gradient - mean) * (1 - beta1)
    square = tl.load(squares + at, inside, other=0.0) * beta2 + (1 - beta2) * gradient * gradient
    master = tl.load(masters + at, inside, other=0.0) * (1 - lr * decay)
    master -= lr / correction1 * mean / (tl.sqrt(square) / correction2 + eps)
    tl.store(means + at, mean, inside)
    tl.store(squares + at, square, inside)
    tl.store(masters + at, master, inside)
    tl.store(weights + at, master.to(weights.dtype.element_ty), inside)


class OnePassAdamW:
    """AdamW on a flat partition whose gradients are in many tensors, in one launch."""

    def __init__(self, gradients: list[torch.Tensor]) -> None:
        """Lay out the launch for gradients of these sizes, one after the other in the partition."""
        device, sizes = gradients[0].device, torch.tensor([gradient.numel() for gradient in gradients])
        blocks = (sizes + BLOCK - 1) // BLOCK
        tensors = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
        first = torch.cumsum(blocks, 0) - blocks
        offsets = torch.cumsum(sizes, 0) - sizes
        self.aligned = bool((sizes % 8 == 0).all())
        self.tensors = tensors.to(torch.int32).to(device)
        self.begins = ((torch.arange(len(tensors)) - first[tensors]) * BLOCK).to(device)
        self.sizes, self.offsets = sizes.to(device), offsets.to(device)

    def step(
        self, gradients: list[torch.Tensor], masters: torch.Tensor, means: torch.Tensor, squares: torch.Tensor,
        weights: torch.Tensor, scalars: torch.Tensor, settings: dict,
    ) -> None:  # fmt: skip
        """Update in place.

        Args:
            gradients: contiguous, of the sizes given before.
            masters, means, squares: fp32 [partition].
            weights: [partition], what the model computes with.
            scalars: fp32 [4] on the device: factor of the gradients, 1 − β₁ᵗ, √(1 − β₂ᵗ), and 0 to leave the step out.
            settings: the optimizer's parameter group.
        """
        numbers = [gradient.data_ptr() for gradient in gradients]
        addresses = torch.tensor(numbers, pin_memory=True).to(masters.device, non_blocking=True)
        aligned = self.aligned and all(number % 16 == 0 for number in numbers)
        kind = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(gradients[0].dtype, tl.float32)
        _adamw[(len(self.tensors),)](
            addresses, self.tensors, self.begins, self.sizes, self.offsets, masters, means, squares, weights, scalars,
            settings["lr"], *settings["betas"], settings["eps"], settings["weight_decay"],
            ALIGNED=aligned, GRADIENT=kind, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


@triton.jit
def _add(sums, gradient, size, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    found = tl.load(gradient + at, inside, other=0.0).to(tl.float32)
    if not FIRST:
        found += tl.load(sums + at, inside, other=0.0)
    tl.store(sums + at, found, inside)


def add_to(sums: torch.Tensor, gradient: torch.Tensor, first: bool) -> None:
    """Add a gradient to its sum in fp32, both flat, or put it there if it is the first.

    PyTorch's own addition of two dtypes takes twice as long: it loads one element at a time.
    """
    _add[(triton.cdiv(sums.numel(), BLOCK),)](sums, gradient, sums.numel(), FIRST=first, BLOCK=BLOCK, num_warps=8)
