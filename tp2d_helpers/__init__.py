"""Helpers of the tutorial `tp_autotp.ipynb`: 2D-parallel training with DeepSpeed AutoTP, ZeRO and Ray Train.

A folder per section of the notebook. Each stands only on those named after it (checked by import-linter):

    launch       from a plan to a finished run: Ray Train, progress, errors in words
    preflight    can this cluster run these settings?
    train        the loop that every worker runs
    planning     bytes held, bytes sent and seconds, predicted from the settings
    training     metrics, schedules, samples, trackers, the watchdog, nodes that go and come
    checkpoint   the run's folder: save, load, resize, export
    model        the grid of ranks, the sharding plan, the engine
    speed        what makes a step faster without changing its result
    data         text and chats → tokens → the batches of one DP rank; evaluation
    display      what the reader sees; `lesson`: ranks for its experiments
    config, cache, demo, startup, heartbeat, launchers, cgroups

The names in `PUBLIC` can be imported from here. Nothing is loaded before it is asked for.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMPORTED = time.time()  # as a worker's imports began: this package is the first of the large ones

if not any(path for pattern in ("nvidia*", "nvhost*", "dxg", "kfd") for path in Path("/dev").glob(pattern)):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no GPU; DeepSpeed reads it as it is imported, or guesses aloud


def lazy(package: str, names: dict[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562) that imports `names`, {name: module in the package}, as they are asked for."""

    def load(name: str) -> Any:
        """The object of that name."""
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{names[name]}"), name)

    load.names = names
    return load


PUBLIC = {
    "create_dataloader": "data.dataloader",
    "ModelParallelUnit": "model.mpu",
    "get_mixed_precision_dtype": "model.engine",
    "setup_model_with_autotp": "model.engine",
    "save_checkpoint": "checkpoint.save_load",
    "load_checkpoint": "checkpoint.save_load",
}
__all__ = list(PUBLIC)
__getattr__ = lazy(__name__, PUBLIC)

if sys.flags.optimize:  # before any library is imported: some of them can't be without docstrings
    from tp2d_helpers.config import ConfigError

    raise ConfigError(
        f"PYTHONOPTIMIZE = {sys.flags.optimize}, or python -O: leaves out the assertions by which DeepSpeed and the "
        "notebook check what they compute; unset it, and start Python again"
    )
