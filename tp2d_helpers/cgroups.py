"""What the container, or the job's control group, allows this process and has done to it. Other systems have none."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _folders(controller: str) -> Iterator[Path]:
    """Of the groups that this process is in, one in another, as far as they can be seen: version 2's, or 1's own."""
    with contextlib.suppress(OSError, ValueError):  # a line of another form
        for line in OWN.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                root = ROOT / controller if controllers else ROOT
                below = root / path.lstrip("/")
                yield from {root, below, *(parent for parent in below.parents if parent.is_relative_to(root))}


def _numbers(file: Path, pattern: str) -> list[int]:
    """In the first place where the pattern fits a file's text; none without one."""
    with contextlib.suppress(OSError):
        if found := re.search(pattern, file.read_text(encoding="utf-8")):
            return [int(number) for number in found.groups()]
    return []


def out_of_memory_kills() -> int:
    """Processes of this one's container that the kernel killed as memory was full, so far; 0 where nothing says so.

    A group counts those below it, in version 1 only its own: so all levels that can be seen are added up.
    """
    files = [folder / name for folder in _folders("memory") for name in ("memory.events", "memory.oom_control")]
    return sum(sum(_numbers(file, r"(?m)^oom_kill (\d+)")) for file in files)


def cores() -> int:
    """Those that this process may use: by its affinity, and by the share of time that its groups have."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _folders("cpu"):
        time = _numbers(folder / "cpu.max", r"^(\d+) (\d+)")  # microseconds of a core, in how many
        time = time or [n for name in ("quota", "period") for n in _numbers(folder / f"cpu.cfs_{name}_us", r"^(\d+)")]
        if len(time) == 2:
            count = min(count, max(1, math.ceil(time[0] / time[1])))
    return count
