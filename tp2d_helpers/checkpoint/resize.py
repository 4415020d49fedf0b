"""Another grid for a run: the same global batch on other ranks, and a checkpoint cut anew.

DeepSpeed's files hold the shards of one grid. Its universal checkpoint holds every weight, master and moment whole, so
that each rank of any other grid takes its own part (Lian et al. 2024, Universal Checkpointing).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from torch.utils.serialization import config as serialization

from tp2d_helpers.checkpoint.run_folder import checkpoint_tag, fit_global_batch
from tp2d_helpers.checkpoint.shards import SAFE
from tp2d_helpers.config import make_config

UNIVERSAL = "universal"


def fit_to_world(config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The settings for the workers there are: dp_size from their number, accumulation so that the global batch stays.

    Raises:
        ConfigError: if they don't make whole TP groups, or the global batch can't be divided so.
    """
    planned = make_config(**config)
    if world_size == planned.num_workers:
        return config
    if world_size % planned.tp_size:
        raise ValueError(f"{world_size} workers don't make whole TP groups of {planned.tp_size}")
    config = planned.change(dp_size=world_size // planned.tp_size)
    return fit_global_batch(config, planned.global_batch_size).model_dump()


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """Within it, `torch.load` executes nothing from a file but the classes in `SAFE`, whatever its caller asks for."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(SAFE):
            yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def universal_checkpoint(checkpoint: str | Path) -> str:
    """Convert a checkpoint for other grids, beside its files, unless that was done before; return the tag to load.

    In a process of its own: it reads the files as mapped memory, which DeepSpeed offers no other way to ask for.
    """
    if not Path(checkpoint, UNIVERSAL).exists():
        command = [sys.executable, "-m", "tp2d_helpers.checkpoint.resize", str(checkpoint)]
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]  # it may be Ray that brought it
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{checkpoint} can't be converted: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return UNIVERSAL


def convert(checkpoint: Path, workers: int = 1) -> Path:
    """Write a checkpoint's universal form into its folder `universal`, which appears when it is complete."""
    universal, scratch = checkpoint / UNIVERSAL, checkpoint / f"{UNIVERSAL}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    # Without AutoTP (tp_size 1) DeepSpeed does not say how parameters are cut: "missing state" stands for: not at all.
    arguments = argparse.Namespace(
        input_folder=str(checkpoint_tag(checkpoint)), output_folder=str(scratch),
        num_extract_workers=workers, num_merge_workers=workers,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with safe_loading(), serialization.patch(**{"load.mmap": True}), contextlib.redirect_stdout(sys.stderr):
        ds_to_universal.main(arguments)
    scratch.rename(universal)
    (checkpoint / "latest_universal").unlink()  # names the scratch folder
    return universal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a checkpoint so that it loads on any grid.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    options = parser.parse_args()
    print(convert(options.checkpoint, options.workers))
