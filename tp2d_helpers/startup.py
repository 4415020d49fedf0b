"""Where the time between `fit()` and the first finished step goes.

`mark` notes on a worker that a phase has ended. With the first step, rank 0 writes all of them into `start.json`, and
the driver prints them in a line.
"""

from __future__ import annotations

import time
from pathlib import Path

from tp2d_helpers import IMPORTED
from tp2d_helpers.guard import read_json, write_json

_ends: list[tuple[str, float]] = []
_finished = False


def mark(phase: str) -> None:
    """A phase of this worker's start has ended now."""
    if not _finished:
        _ends.append((phase, time.time()))


def finished() -> bool:
    """Whether this worker's start is over."""
    return _finished


def finish(run_dir: Path | None) -> None:
    """Write what was marked, if this rank is the one that writes."""
    global _finished
    _finished = True
    if run_dir:
        write_json(run_dir / "start.json", {"began": IMPORTED, "ends": _ends})


def describe(run_dir: Path, launched: float) -> str | None:
    """The parts of a launch's start in a line; None if its first step isn't done yet.

    Args:
        launched: `time.time()` on the driver, as it called `fit()`.
    """
    start = read_json(run_dir / "start.json")
    if not start or start["ends"][-1][1] < launched:  # an earlier launch's
        return None
    parts, before = [], launched
    for phase, end in [("Ray", start["began"]), *start["ends"]]:
        parts.append(f"{phase} {max(end - before, 0):.1f}")
        before = max(end, before)
    return f"first step after {before - launched:.1f} s: " + ", ".join(parts)
