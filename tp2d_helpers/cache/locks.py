"""Locks where there are some; without them, work goes on."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

SILENT_SECONDS = 10  # of waiting for another process
# What a file system without locks answers, and one that is only read, or has another user's file.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def alone(path: Path, seconds: float = -1, waiting: str = "") -> Iterator[bool]:
    """Hold a lock. The body gets False where there can be none: it must be safe, if not cheap, for many at once.

    The lock ends with the process, however that ends. Whoever may write to the folder may take it.

    Args:
        seconds: how long to wait for another process; -1 for as long as it lives.
        waiting: what to print if that takes a while.

    Raises:
        Timeout: after `seconds`.
    """
    # Not a soft lock, where the file system has no real ones: that would outlive a process that was killed.
    lock = FileLock(path, mode=0o666 & path.parent.stat().st_mode, fallback_to_soft=False)
    held = True
    try:
        try:
            lock.acquire(SILENT_SECONDS if waiting else seconds)
        except Timeout:
            if not waiting:
                raise
            print(waiting, flush=True)
            lock.acquire(seconds)
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
            raise
        held = False
    try:
        yield held
    finally:
        if held:
            lock.release()
