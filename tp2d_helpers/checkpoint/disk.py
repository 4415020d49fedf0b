"""Files that reach the disk in chunks, so that a slow write is told from one that hangs."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tp2d_helpers import heartbeat
from tp2d_helpers.config import ConfigError

CHUNK = 64 * 2**20  # bytes that reach the disk before the next ones are written


def free_bytes(folder: Path) -> float:
    """What the file system of a folder, or of the first one above it that exists, has room for; inf if it won't say."""
    found = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists()))
    return found.free if found.total else math.inf


def check_space(folder: Path, needed: float, what: str, setting: str = "") -> None:
    """See that there is room before anything is written.

    Args:
        needed: bytes.
        what: takes them.
        setting: begins the error.

    Raises:
        ConfigError: with both numbers.
    """
    if (free := free_bytes(folder)) < needed:
        raise ConfigError(
            f"{setting}{what} needs {size(needed)}, and the disk of {folder} has {size(free)} free; make room there"
        )


def size(count: float) -> str:
    """Bytes in words."""
    if math.isinf(count):
        return "an unknown number of bytes"
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


class Disk:
    """Writes one set of files at a time, by the thread that trains or by one in the background.

    The watchdog is told of each chunk: at once, or, of what is written in the background, as soon as and as long as
    the thread that trains waits for it.
    """

    def __init__(self) -> None:
        self.chunks, self.background, self.idle = 0, False, threading.Event()
        self.idle.set()

    def wait(self) -> None:
        """Return when the set before is written, however long that takes."""
        heartbeat.mark("the write of the checkpoint before")
        seen = self.chunks
        while not self.idle.wait(1):
            if self.chunks != seen:
                heartbeat.pulse()
            seen = self.chunks
        heartbeat.mark("the next checkpoint")

    def begin(self, name: str, background: bool) -> None:
        """A set of files will be written."""
        heartbeat.mark(name)
        self.background = background
        self.idle.clear()

    def end(self) -> None:
        """The set is written."""
        self.idle.set()

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[File]:
        """A new file, which the disk has when the body ends."""
        with open(path, "wb") as file:
            chunks = File(file, self)
            yield chunks
            chunks.reach_disk()

    def progress(self) -> None:
        """A chunk has reached the disk."""
        self.chunks += 1
        if not self.background:
            heartbeat.pulse()


class File:
    """What `torch.save` writes to."""

    def __init__(self, file: BinaryIO, disk: Disk) -> None:
        self.file, self.disk, self.fresh = file, disk, 0

    def write(self, data: Any) -> int:
        """Write a buffer whole."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            self.fresh += self.file.write(view[start : start + CHUNK])
            if self.fresh >= CHUNK:
                self.reach_disk()
        return len(view)

    def flush(self) -> None:
        """`torch.save` asks for it at its end, where `reach_disk` follows."""

    def tell(self) -> int:
        """Bytes so far."""
        return self.file.tell()

    def reach_disk(self) -> None:
        """See that the disk has all that was written."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.fresh = 0
        self.disk.progress()
