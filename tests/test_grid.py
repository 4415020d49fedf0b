"""The grid of local processes that other tests train on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import grid
import torch.distributed as dist
from grid import run_grid

from tp2d_helpers.config import make_config
from tp2d_helpers.demo import demo_model

SECONDS = 3  # more than a rank needs to end, once it has left its last barrier


class SlowStore:
    """The ranks' store, for one that falls asleep between its arrival at a barrier and its look at the others'."""

    def __init__(self, store: dist.Store) -> None:
        self.store = store

    def add(self, name: str, amount: int) -> int:
        if not amount:
            time.sleep(SECONDS)
        return self.store.add(name, amount)


def slow_to_leave(names: dict[str, Any]) -> None:
    """Let rank 1 leave each barrier long after rank 0, in whose process the store is."""
    find = dist.distributed_c10d._get_default_store
    if os.environ["RANK"] == "1":
        grid.dist.distributed_c10d._get_default_store = lambda: SlowStore(find())


def test_rank_0_stays_for_those_who_ask_its_store(tmp_path: Path) -> None:
    config = make_config(
        model_name=str(demo_model()), dataset_name="demo", use_gpu=False, tp_size=2, dp_size=1, seq_length=64,
        batch_size_per_gpu=1, learning_rate=1e-3, debug_steps=1, storage_path=str(tmp_path), experiment_name="slow",
        async_checkpoint=False,  # the last thing that it does with the others is a barrier, after the checkpoint
    )  # fmt: skip
    assert run_grid(config.model_dump(), patch=slow_to_leave) == [None, None]
