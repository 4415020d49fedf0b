"""Where the time between `fit()` and the first finished step goes.

`mark` notes on a worker that a phase has ended. With the first step, rank 0 writes all of them into the run's
folder, and the driver prints them in a line.
"""

from __future__ import annotations

import time
from typing import Any

from tp2d_helpers import IMPORTED, heartbeat

_ends: list[tuple[str, float]] = []
_finished = False


def mark(phase: str) -> None:
    """A phase of this worker's start has ended now."""
    if not _finished:
        _ends.append((phase, time.time()))
        if heartbeat.here().starting:
            heartbeat.mark(f"the start, after {phase!r}", starting=True)


def finished() -> bool:
    """Whether this worker's start is over."""
    return _finished


def finish() -> dict[str, Any]:
    """The start is over: what `describe` makes a line of."""
    global _finished
    _finished = True
    return {"began": IMPORTED, "ends": _ends}


def describe(start: dict[str, Any], launched: float) -> str | None:
    """The parts of a launch's start in a line, without those under 0.05 s; None if its first step isn't done yet.

    Args:
        start: what `finish` returned on rank 0; empty if there is none yet.
        launched: `time.time()` on the driver, as it called `fit()`.
    """
    if not start or start["ends"][-1][1] < launched:  # an earlier launch's
        return None
    parts, before = [], launched
    for phase, end in [("Ray", start["began"]), *start["ends"]]:
        parts += [f"{phase} {end - before:.1f}"] if end - before >= 0.05 else []
        before = max(end, before)
    return f"first step after {before - launched:.1f} s: " + ", ".join(parts)
