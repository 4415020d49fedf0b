"""The weights that several ranks of a TP group hold, all of them as a rule: that they stay the same there.

Their gradients are equal on the ranks, or parts that are summed. A fault there doesn't show in the loss for long: each
rank goes on with weights of its own.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter

from tp2d_helpers.model.mpu import ModelParallelUnit

SUMS = 64  # of a weight: enough that differences of both signs don't cancel
SHARE = 0.1  # of how far a weight has moved; on CPUs and on 2 H200, compiled or not, the ranks are equal bit for bit
ROUNDING = 1e-9  # of a weight's size


class WholeWeights:
    """Compares `SUMS` interleaved sums of each weight over the TP group: of its fp32 masters, where ZeRO keeps some."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, mpu: ModelParallelUnit) -> None:
        """Note where the weights begin. Collective over the world.

        Raises:
            RuntimeError: if they differ already.
        """
        self.mpu = mpu
        # How many ranks of a TP group hold a weight: consecutive ones.
        self.copies = {n: _copies(p, mpu.tp_size) for n, p in engine.module.named_parameters() if p.requires_grad}
        self.weights = {n: engine.module.get_parameter(n) for n, copies in self.copies.items() if copies > 1}
        self.start = self._sums()
        self.compare("they were not loaded, or drawn, alike")

    def compare(self, why: str = "a gradient was not summed over the group. No checkpoint of this is kept") -> None:
        """Compare the weights, of which each rank sends `SUMS` numbers. Collective over the world.

        Raises:
            RuntimeError: on all ranks, with the names of those that differ in any TP group.
        """
        if not self.weights:
            return
        mine = self._sums()
        sums = [torch.empty_like(mine) for _ in range(self.mpu.tp_size)]
        dist.all_gather(sums, mine, group=self.mpu.tp_group)
        different = torch.zeros(len(self.weights), dtype=torch.int32, device=mine.device)
        for index, name in enumerate(self.weights):
            first = self.mpu.tp_rank // self.copies[name] * self.copies[name]
            ranks = torch.stack([one[index] for one in sums[first : first + self.copies[name]]])
            mean = ranks.mean(0)
            apart, moved = (ranks - mean).norm(dim=-1).max(), (mean - self.start[index]).norm()
            different[index] = apart > SHARE * moved + ROUNDING * mean.norm()
        dist.all_reduce(different, dist.ReduceOp.MAX)
        if names := [name for name, found in zip(self.weights, different.tolist(), strict=True) if found]:
            more = f" and {len(names) - 3} more" * (len(names) > 3)
            raise RuntimeError(
                f"the ranks of a TP group differ in {', '.join(names[:3])}{more}, which several of them hold: {why}"
            )

    @torch.no_grad()
    def _sums(self) -> torch.Tensor | None:
        """fp64 [weights, SUMS]. Where ZeRO divides a weight over the replicas, each adds those of its part."""
        if not self.weights:
            return None
        sums = torch.stack([_interleaved(*_held(weight)) for weight in self.weights.values()])
        dist.all_reduce(sums, group=self.mpu.dp_group)
        return sums


def _copies(weight: torch.nn.Parameter, tp_size: int) -> int:
    """How many ranks of a TP group hold this rank's shard."""
    return getattr(weight, "tp_copies", 1 if is_model_parallel_parameter(weight) else tp_size)


def _held(weight: torch.nn.Parameter) -> tuple[torch.Tensor, int]:
    """(what this rank keeps of a weight, or of its masters, flat; where in the weight that begins)."""
    if hasattr(weight, "ds_tensor"):  # of equal size on all DP ranks: the last ones are padded
        part, dp_rank = weight.ds_tensor.flatten(), dist.get_rank(weight.ds_process_group)
        return part[: max(weight.ds_numel - dp_rank * len(part), 0)], dp_rank * len(part)
    if not hasattr(weight, "_hp_mapping"):
        return weight.detach().flatten(), 0
    masters = weight._hp_mapping  # None if other DP ranks keep them all
    if masters is None:
        return weight.new_empty(0), 0
    return masters.get_hp_fragment().flatten(), masters.lp_fragment_address.start


def _interleaved(flat: torch.Tensor, begin: int) -> torch.Tensor:
    """fp64 [SUMS]: sums of every `SUMS`-th element of a weight, of the part of it that begins at `begin`."""
    end = len(flat) - len(flat) % SUMS
    sums = flat[:end].view(-1, SUMS).sum(0, dtype=torch.float64)
    sums[: len(flat) - end] += flat[end:]
    return sums.roll(begin % SUMS)
