"""AdamW's step on ZeRO's partition, with as little memory traffic as PyTorch's own kernels allow.

DeepSpeed's step of ZeRO stages 1 and 2 flattens the gradients, converts them to fp32, looks for infinities, takes the
norm and clips in a pass each, and asks the GPU for the outcome twice. Here the norm is one pass over the gradients as
they are, and clipping and the check for infinities are arguments of the fused AdamW kernel.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.utils import all_gather_dp_groups, is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch.optim.adamw import adamw

from tp2d_helpers.speed.agreement import everywhere
from tp2d_helpers.speed.gradients import SummingZeroOptimizer
from tp2d_helpers.speed.loss_scale import LossScale

try:
    from tp2d_helpers.speed.kernels import OnePassAdamW
except ImportError:  # Triton comes with PyTorch for GPUs only
    OnePassAdamW = None


LANES = 64  # numbers; a multiple of what a CPU's vectors have


class FusedZeroOptimizer(SummingZeroOptimizer):
    """ZeRO 1 or 2 with AdamW and fp32 masters, whose step has no host synchronisation. See `fuse_step`."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the partition and gather the weights; gradients that aren't finite leave all as it was."""
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        scale = self.settle()
        self.rate = self.optimizer.param_groups[0]["lr"]  # of this step; the schedule goes on after it
        norm = self._norm() / scale
        self._global_grad_norm, self.overflow = norm, False
        clip = ((norm + 1e-6) / self.clip_grad).clamp(min=1.0) if self.clip_grad else torch.ones_like(norm)
        clip = clip * scale
        infinite = (~torch.isfinite(norm)).float()  # the step is left out then
        scalars = self._count_step(clip, infinite)
        for i in range(len(self.bit16_groups)):
            self.free_grad_in_param_list(self.params_not_in_partition[i])
            self._step_group(i, clip, infinite, scalars)
            self.free_grad_in_param_list(self.params_in_partition[i])
            self.averaged_gradients[i] = None
        self._lazy_init_hp_params_optimizer_state()
        if dist.get_world_size(self.dp_process_group) > 1:
            all_gather_dp_groups(
                groups_flat=self.bit16_groups_flat,
                partitioned_param_groups=self.parallel_partitioned_bit16_groups,
                dp_process_group=self.real_dp_process_group,
                start_alignment_factor=self.nccl_start_alignment_factor,
                allgather_bucket_size=self.allgather_bucket_size,
            )
        if self.dynamic_loss_scale:
            self._loss_scale().move(infinite)

    def scale_if_loss(self, value: torch.Tensor) -> torch.Tensor:
        """The loss times fp16's loss scale."""
        return value * self._loss_scale().value if self.dynamic_loss_scale else value

    def settle(self) -> torch.Tensor | float:
        """The loss scale, and know on the host which steps before were left out."""
        if not self.dynamic_loss_scale:
            return 1.0
        self._loss_scale().settle()
        return self._loss_scale().value

    def _loss_scale(self) -> LossScale:
        if self.scale is None:  # made with the first loss, when loading is over
            self.scale = LossScale(self.loss_scaler, self.device, self.left_out)
        return self.scale

    def _norm(self) -> torch.Tensor:
        """L2 norm of the whole model's gradients, a 0-dim fp32 tensor. A weight that TP left whole counts once."""
        counted = []
        for i in range(len(self.bit16_groups)):
            gradients = [g for g in self.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
            pairs = zip(gradients, self.params_in_partition[i])  # noqa: B905 — a rank without weights has padding only
            counted += [g for g, p in pairs if is_model_parallel_parameter(p) or self.model_parallel_rank == 0]
        square = torch.zeros((), device=self.device)
        if counted:  # a rank's partition may have nothing but weights that another rank of its TP group counts
            square = torch.stack(torch._foreach_norm(counted, 2, dtype=torch.float32)).square().sum()
        dist.all_reduce(square, group=self.dp_process_group)
        self._model_parallel_all_reduce(square, deepspeed.comm.ReduceOp.SUM)
        return square.sqrt()

    def _count_step(self, clip: torch.Tensor, infinite: torch.Tensor) -> torch.Tensor:
        """Count the step, if it isn't left out; the scalars of `OnePassAdamW.step`, which are those of all groups."""
        taken, (state, *others) = 1 - infinite, [self._state(m) for m in self.single_partition_of_fp32_groups]
        state["step"] += taken
        for other in others:
            other["step"] = state["step"]  # one count, and one kernel, for all groups
        correction1, correction2 = 1 - self.betas ** state["step"]
        return torch.stack([1 / clip.double(), correction1, correction2.sqrt(), taken.double()]).float()

    def _step_group(self, i: int, clip: torch.Tensor, infinite: torch.Tensor, scalars: torch.Tensor) -> None:
        masters, settings = self.single_partition_of_fp32_groups[i], self.optimizer.param_groups[i]
        state, gradients = self._state(masters), self.averaged_gradients[i]
        weights = self.parallel_partitioned_bit16_groups[i][dist.get_rank(self.real_dp_process_group[i])]
        moments = state["exp_avg"], state["exp_avg_sq"]
        if self.one_pass is None or not masters.is_cuda:
            _adamw(gradients, masters, *moments, state["step"], clip, infinite, settings)
            weights.copy_(masters)
            return
        gradients = [gradient.contiguous() for gradient in gradients]
        if i not in self.one_pass:
            self.one_pass[i] = OnePassAdamW(gradients)
        self.one_pass[i].step(gradients, masters, *moments, weights, scalars, settings)

    def _state(self, masters: torch.Tensor) -> dict[str, Any]:
        state = self.optimizer.state[masters]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=masters.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(masters), torch.zeros_like(masters)
        return state


def _adamw(
    gradients: list[torch.Tensor], masters: torch.Tensor, means: torch.Tensor, squares: torch.Tensor,
    step: torch.Tensor, clip: torch.Tensor, infinite: torch.Tensor, settings: dict[str, Any],
) -> None:  # fmt: skip
    """PyTorch's kernel on the flat partition, a gradient at a time: where there is no Triton.

    On a CPU it rounds the last numbers of a tensor in another way: there the last ones don't count.
    """
    beta1, beta2 = settings["betas"]
    sizes = [gradient.numel() for gradient in gradients]
    parts = [tensor.split(sizes) for tensor in (masters, means, squares)]
    for gradient, *places in zip(gradients, *parts, strict=True):
        before, more = step - 1 + infinite, -gradient.numel() % LANES  # counted already; the function counts, too
        padded = places if masters.is_cuda or not more else [F.pad(place, (0, more)) for place in places]
        (master, mean, square), gradient = padded, gradient.flatten().float()
        gradient = gradient if padded is places else F.pad(gradient, (0, more))
        adamw(
            [master], [gradient], [mean], [square], [], [before], fused=True, grad_scale=clip, found_inf=infinite,
            lr=settings["lr"], beta1=beta1, beta2=beta2, weight_decay=settings["weight_decay"], eps=settings["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip
        if padded is not places:
            for place, now in zip(places, padded, strict=True):
                place.copy_(now[: len(place)])


def fuse_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let `engine.step()` take the short way where it can: ZeRO 1 or 2, AdamW, fp32 masters."""
    optimizer = engine.optimizer
    if type(optimizer) is not SummingZeroOptimizer or not isinstance(optimizer.optimizer, torch.optim.AdamW):
        return
    if optimizer.single_partition_of_fp32_groups[0].dtype == torch.float32:
        # The kernels round differently: with both in a TP group, weights that all ranks hold would drift apart.
        triton = all(everywhere(OnePassAdamW is not None))
        optimizer.__class__, optimizer.one_pass = FusedZeroOptimizer, {} if triton else None
        optimizer.scale, optimizer.left_out = None, functools.partial(_take_back, engine)
        # The schedule misses the step of the optimizer inside, which is never called.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step")
        betas = optimizer.optimizer.param_groups[0]["betas"]
        optimizer.betas = torch.tensor(betas, dtype=torch.float64, device=optimizer.device)


def _take_back(engine: deepspeed.DeepSpeedEngine) -> None:
    """Count a step as skipped that the engine has taken for done: the schedule doesn't go on for it."""
    engine.skipped_steps += 1
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.last_epoch -= 2
        engine.lr_scheduler.step()


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float | torch.Tensor:
    """fp16's loss scale of the next step; on the device, where nothing has asked for it yet."""
    optimizer = engine.optimizer
    return optimizer.scale.value if isinstance(optimizer, FusedZeroOptimizer) else optimizer.cur_scale
