"""For the experiments of the lesson: a function run on a few ranks of its own, without a training run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import ray
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tp2d_helpers.launchers import be_rank

Result = TypeVar("Result")
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def on_ranks(function: Callable[[int], Result], world_size: int = 2) -> list[Result]:
    """Call function(rank) in `world_size` processes on this machine's CPU, joined by a gloo process group.

    Ray must be connected. The processes are new and end with the call.

    Returns:
        What each rank returned, by rank.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

    @ray.remote(num_cpus=0, max_calls=1, max_retries=0, scheduling_strategy=here, runtime_env={"env_vars": CPU_ONLY})
    def run(rank: int, meeting_place: str) -> Result:
        """One rank: join the group, call, leave."""
        be_rank(rank, world_size)
        dist.init_process_group("gloo", f"file://{meeting_place}", rank=rank, world_size=world_size)
        try:
            return function(rank)
        finally:
            dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        return ray.get([run.remote(rank, str(Path(folder, "store"))) for rank in range(world_size)])
