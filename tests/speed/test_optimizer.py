"""AdamW's step on a flat partition, by PyTorch's kernel and by the Triton kernel, against `torch.optim.AdamW`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tp2d_helpers.speed.optimizer import OnePassAdamW, _adamw

SETTINGS = dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
SHAPES = {"aligned": [(64, 128), (1024,), (24, 8)], "unaligned": [(7, 3), (513,), (100, 77)]}
LIMIT = 0.5  # of the gradients' norm

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton kernel needs a GPU")


def gradients_of(step: int, shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def reference(shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype, steps: int) -> list[torch.Tensor]:
    """[masters, first moments, second moments] after clipped steps of PyTorch's own optimizer, flat."""
    parameters = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
    optimizer = torch.optim.AdamW(parameters, **SETTINGS)
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients_of(step, shapes, device, dtype), strict=True):
            parameter.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(parameters, LIMIT)
        optimizer.step()
    states = [optimizer.state[parameter] for parameter in parameters]
    moments = [torch.cat([state[name].flatten() for state in states]) for name in ("exp_avg", "exp_avg_sq")]
    return [torch.cat([parameter.detach().flatten() for parameter in parameters]), *moments]


def run(kernel: str, shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype, steps: int) -> list[torch.Tensor]:
    """The same by our step, with one more that is left out because its gradients are infinite; the weights last."""
    size, one_pass = sum(math.prod(shape) for shape in shapes), None
    flat = [torch.ones(size, device=device), torch.zeros(size, device=device), torch.zeros(size, device=device)]
    weights = torch.zeros(size, device=device, dtype=dtype)
    step = torch.zeros((), device=device)
    for number in range(steps + 1):
        gradients = gradients_of(number, shapes, device, dtype)
        if number == steps:
            gradients = [gradient * math.inf for gradient in gradients]
        norm = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).norm()
        clip, infinite = (norm / LIMIT).clamp(min=1.0), (~torch.isfinite(norm)).float()
        step += 1 - infinite
        if kernel == "torch":
            _adamw(gradients, *flat, step, clip, infinite, SETTINGS)
            weights.copy_(flat[0])
            continue
        beta1, beta2 = SETTINGS["betas"]
        corrections = [1 - beta1 ** step.double(), (1 - beta2 ** step.double()).sqrt()]
        scalars = torch.stack([1 / clip.double(), *corrections, 1 - infinite.double()]).float()
        one_pass = one_pass or OnePassAdamW(gradients)
        one_pass.step(gradients, *flat, weights, scalars, SETTINGS)
    return [*flat, weights]


@pytest.mark.parametrize("kernel, device", [("torch", "cpu"), pytest.param("triton", "cuda", marks=on_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_equals_pytorch(kernel: str, device: str, dtype: torch.dtype, shapes: Any) -> None:
    *found, weights = run(kernel, shapes, device, dtype, steps=3)
    for ours, theirs in zip(found, reference(shapes, device, dtype, steps=3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert torch.equal(weights, found[0].to(dtype))
