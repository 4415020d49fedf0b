"""Small files that all processes see whole, and the locks that keep a second writer out of a run's folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tp2d_helpers.config import Config, ConfigError

_HELD: list[FileLock] = []  # until the process ends
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # what a file system without locks answers


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a small file that all see as a whole: the old one or the new one."""
    scratch = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps(value, indent=2) + "\n")
    scratch.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty if there is no such file, or it can't be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def lock_run(config: Config) -> Iterator[None]:
    """Hold the run's folder: a second launch into it would mix its checkpoints and records with the first one's.

    The lock is the kernel's (or, on a network file system, its server's), so it ends with the process, however that
    ends. `.lock` stays in the folder and means nothing; `.lock.json` says who has it.

    Raises:
        ConfigError: if another launch holds it.
    """
    lock = FileLock(config.run_dir / ".lock", timeout=0, fallback_to_soft=False)
    owner = config.run_dir / ".lock.json"
    config.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        by = read_json(owner)
        who = f" (started by pid {by['pid']} on {by['host']} at {by['time']})" if by else ""
        raise ConfigError(
            f"experiment_name = {config.experiment_name!r}: another run is writing to {config.run_dir}{who}; "
            "wait for it, or take another experiment_name"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"{config.run_dir} is on a file system without locks: see that one run writes to it", stacklevel=3
        )
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        write_json(owner, dict(pid=os.getpid(), host=socket.gethostname(), time=started))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def claim_run(run_dir: str | Path, rank: int, seconds: float = 120) -> None:
    """Hold the run's folder as its writer: called by every worker, done by rank 0, until its process ends.

    `lock_run` ends with the driver, and the workers of a driver that was killed may outlive it by some seconds. The new
    ones wait for that.

    Raises:
        RuntimeError: if the others are still there after `seconds`.
    """
    if rank != 0:
        return
    # Not a soft lock, where the file system has no real ones: that would outlive a process that was killed.
    _HELD.append(FileLock(Path(run_dir) / ".writer.lock", timeout=seconds, fallback_to_soft=False))
    try:
        _HELD[-1].acquire()
    except Timeout:
        raise RuntimeError(f"workers of an earlier launch still write to {run_dir} after {seconds:g} s") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
