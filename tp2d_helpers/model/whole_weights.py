"""The weights that every rank of a TP group holds whole: that they stay the same on all of them.

Their gradients are equal on the ranks, or parts that are summed. A fault there doesn't show in the loss for long: each
rank goes on with weights of its own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter

SUMS = 64  # of a weight: enough that differences of both signs don't cancel
SHARE = 0.1  # of how far a weight has moved; on CPUs and on 2 H100, compiled or not, the ranks are equal bit for bit
ROUNDING = 1e-9  # of a weight's size


class WholeWeights:
    """Compares `SUMS` interleaved sums of each weight over the TP group: of its fp32 masters, where ZeRO keeps some."""

    def __init__(self, model: torch.nn.Module, group: dist.ProcessGroup) -> None:
        """Note where the weights begin. Collective over the world.

        Raises:
            RuntimeError: if they differ already.
        """
        self.group, whole = group, []
        if group.size() > 1:
            trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
            whole = [(name, weight) for name, weight in trained if not is_model_parallel_parameter(weight)]
        self.weights = dict(whole)
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
        sums = [torch.empty_like(mine) for _ in range(self.group.size())]
        dist.all_gather(sums, mine, group=self.group)
        ranks = torch.stack(sums)
        mean = ranks.mean(0)
        apart, moved = (ranks - mean).norm(dim=-1).amax(0), (mean - self.start).norm(dim=-1)
        different = (apart > SHARE * moved + ROUNDING * mean.norm(dim=-1)).int()
        dist.all_reduce(different, dist.ReduceOp.MAX)
        if names := [name for name, found in zip(self.weights, different.tolist(), strict=True) if found]:
            more = f" and {len(names) - 3} more" * (len(names) > 3)
            raise RuntimeError(
                f"the ranks of a TP group differ in {', '.join(names[:3])}{more}, which each of them holds whole: {why}"
            )

    @torch.no_grad()
    def _sums(self) -> torch.Tensor:
        """fp64 [weights, SUMS]."""
        return torch.stack([_interleaved(_held(weight)) for weight in self.weights.values()]) if self.weights else None


def _held(weight: torch.nn.Parameter) -> torch.Tensor:
    """What this rank keeps of a weight, flat: at ZeRO 1 and 2 its part of the master weights, at 3 of the weights."""
    if hasattr(weight, "ds_tensor"):  # of equal size on all DP ranks: the last ones are padded
        part, dp_rank = weight.ds_tensor.flatten(), dist.get_rank(weight.ds_process_group)
        return part[: max(weight.ds_numel - dp_rank * len(part), 0)]
    if not hasattr(weight, "_hp_mapping"):
        return weight.detach().flatten()
    masters = weight._hp_mapping  # None if other DP ranks keep them all
    return weight.new_empty(0) if masters is None else masters.get_hp_fragment().flatten()


def _interleaved(flat: torch.Tensor) -> torch.Tensor:
    end = len(flat) - len(flat) % SUMS
    sums = flat[:end].view(-1, SUMS).sum(0, dtype=torch.float64)
    sums[: len(flat) - end] += flat[end:]
    return sums
