"""Where this process is, and when its work last went on: what the watchdog reads (`tp2d_helpers.training.watchdog`).

Any module may tell, at the cost of a microsecond and whether or not somebody watches. `mark` names a place that all
ranks reach in the same order: a batch, a step. `pulse` says that the rank's own work goes on between two of them: a
micro-batch, a part of a file. Only the thread that trains tells; what a thread in the background does hides no hang.
"""

from __future__ import annotations

import time
from typing import NamedTuple


class Place(NamedTuple):
    """One rank's place in its run."""

    marks: int = 0  # since the start: a rank that has fewer than another is behind it
    pulses: int = 0
    name: str = "the start"
    since: float = 0.0  # `time.monotonic()` of the newest mark or pulse
    starting: bool = True  # before the first batch: all is loading, which can't be told from within


_here = Place()  # replaced as a whole, so that another thread reads one place and not a mixture of two


def here() -> Place:
    """The newest mark, and when it or the newest pulse was."""
    return _here


def restart() -> None:
    """Count from here on."""
    global _here
    _here = Place(since=time.monotonic())


def mark(name: str, starting: bool = False) -> None:
    """Say where this rank is, as "step 12". Every rank must set the same marks in the same order."""
    global _here
    _here = Place(_here.marks + 1, _here.pulses, name, time.monotonic(), starting)


def pulse() -> None:
    """Say that this rank has done a part of its work."""
    global _here
    _here = _here._replace(pulses=_here.pulses + 1, since=time.monotonic())
