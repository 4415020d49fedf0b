"""The (dp, tp) grid of ranks and the process groups along its two sides.

World rank r sits at row `r // tp_size` (its DP rank) and column `r % tp_size` (its TP rank). A row is a TP group: it
shares one batch and splits the weights. A column is a DP group: it shares one shard of the weights and splits the
samples. TP ranks are neighbours in the world, so a TP group stays in one node if tp_size divides the GPUs of a node.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


class ModelParallelUnit:
    """What DeepSpeed asks about the grid before AutoTP builds groups of its own on the same ranks.

    Without it DeepSpeed takes the world for the data-parallel group: it then derives a global batch that is tp_size
    times too large and rejects the right one.
    """

    def __init__(
        self,
        tp_group: dist.ProcessGroup,
        dp_group: dist.ProcessGroup,
        tp_size: int,
        dp_size: int,
        tp_rank: int,
        dp_rank: int,
    ) -> None:
        self.tp_group, self.dp_group = tp_group, dp_group
        self.tp_size, self.dp_size = tp_size, dp_size
        self.tp_rank, self.dp_rank = tp_rank, dp_rank

    @classmethod
    def from_grid(cls, tp_size: int, dp_size: int) -> ModelParallelUnit:
        """Build both groups of this rank. Collective: every rank of the world calls it.

        Raises:
            ValueError: if tp_size × dp_size is not the world size.
        """
        if tp_size * dp_size != dist.get_world_size():
            raise ValueError(f"tp_size {tp_size} × dp_size {dp_size} must be the world size, {dist.get_world_size()}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(device, (dp_size, tp_size), mesh_dim_names=("dp", "tp"))
        dp_rank, tp_rank = mesh.get_coordinate()
        return cls(mesh["tp"].get_group(), mesh["dp"].get_group(), tp_size, dp_size, tp_rank, dp_rank)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same shard and see different samples."""
        return self.dp_group

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that see the same samples and hold different shards."""
        return self.tp_group

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas of the model."""
        return self.dp_size

    def get_model_parallel_world_size(self) -> int:
        """Number of shards of the model."""
        return self.tp_size

    def get_data_parallel_rank(self) -> int:
        """Row of this rank in the grid."""
        return self.dp_rank

    def get_model_parallel_rank(self) -> int:
        """Column of this rank in the grid."""
        return self.tp_rank

    # The same under Megatron's names, by which ZeRO asks as it loads a universal checkpoint.
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
