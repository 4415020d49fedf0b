"""A slow and healthy run goes on: each part of its work takes less than the watchdog's patience, the whole more.

And no rank waits for another's work in a collective of torch's, which would fail after a time of its own.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from grid import run_grid

from tp2d_helpers.checkpoint.files import read_json
from tp2d_helpers.checkpoint.run_folder import checkpoints, problem_of
from tp2d_helpers.config import make_config
from tp2d_helpers.training.metrics import read_metrics

PATIENCE = 5  # seconds
NAP = 1.2


def slow(names: dict) -> None:
    """A patch for `run_grid`: naps in each micro-batch, in each read of a held-out sample, in rank 1's writes."""
    from tp2d_helpers.checkpoint import disk
    from tp2d_helpers.data import dataset

    read, load = dataset.TokenDataset.__getitem__, names["load_checkpoint"]
    reach_disk, disk.CHUNK = disk.File.reach_disk, 2**18

    def reading(self: object, index: int) -> dict:
        if index >= len(self) - 8:
            time.sleep(NAP)
        return read(self, index)

    def writing(self: object) -> None:
        time.sleep(NAP if os.environ["RANK"] == "1" else 0)
        reach_disk(self)

    def loading(engine: object, *args: object) -> object:
        for group in (dist.group.WORLD, engine.mpu.get_data_parallel_group(), engine.mpu.get_model_parallel_group()):
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=PATIENCE), group)
        engine.register_forward_pre_hook(lambda *_: time.sleep(NAP))
        return load(engine, *args)

    dataset.TokenDataset.__getitem__, disk.File.reach_disk = reading, writing
    names["load_checkpoint"] = loading


@pytest.mark.parametrize("background, steps", [(False, 1), (True, 2)])
def test_a_slow_run_is_left_alone(tiny_model: Callable, tmp_path: Path, background: bool, steps: int) -> None:
    config = make_config(
        model_name=str(tiny_model("qwen2-tied")), dataset_name="demo", use_gpu=False, tp_size=1, dp_size=2,
        batch_size_per_gpu=1, gradient_accumulation_steps=5, seq_length=64, debug_steps=steps, checkpoint_interval=1,
        eval_samples=0 if background else 8, async_checkpoint=background, hang_timeout_seconds=PATIENCE,
        storage_path=str(tmp_path), experiment_name="slow",
    )  # fmt: skip
    began = time.monotonic()
    run_grid(config.model_dump(), patch=slow)
    assert not read_json(config.run_dir / "stalled.json")
    assert [record["step"] for record in read_metrics(config.run_dir / "metrics.jsonl")] == [1, 2][:steps]
    found = checkpoints(config.run_dir)
    assert len(found) == steps and not any(map(problem_of, found))
    assert time.monotonic() - began > 3 * PATIENCE, "it was not slow at all"
