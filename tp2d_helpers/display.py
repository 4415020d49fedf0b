"""What the reader sees: sources, tables, the progress of a run, curves. Nothing here computes or decides."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def log_to_file(config: dict[str, Any], rank: int) -> None:
    """Send all that this worker prints, its libraries and their C++ parts included, to `<run>/logs/rank_<rank>.log`."""
    folder = Path(config["storage_path"]) / config["experiment_name"] / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
