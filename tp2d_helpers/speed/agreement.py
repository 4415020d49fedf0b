"""Answers that depend on a machine (a compiler, free memory, the GPU), known to all ranks before any acts on its own.

Ranks that go on differently would fill DeepSpeed's buckets in different orders, or round differently: no error tells.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def everywhere(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Each rank's value, in the order of ranks. Collective over the group, or else the world (one, if alone)."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def first_trouble(trouble: str) -> str:
    """What stands in some rank's way, with the lowest such rank; "" if nothing anywhere. Collective over the world."""
    found = everywhere(trouble)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text), "")
