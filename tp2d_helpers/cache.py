"""What is built once per machine and kept between runs: the demo's model, tokens, compiled kernels.

A folder appears in the cache at once, when it is complete. Beside it, a long build may keep parts of what it makes
(`parts_of`), which outlive it: the next builder of the same folder goes on with them. What nobody will use again goes
away by three rules, in `clear_cache`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

DAY = 24 * 3600  # seconds
SILENT_SECONDS = 10  # of waiting for another process
UNUSED_DAYS = 30  # after which tokens are removed; a later run makes them again
UNFINISHED_DAYS = 7  # after which the parts of a build that nobody went on with are removed


def cache_dir() -> Path:
    """Folder for what is built once per machine: `$TP2D_CACHE`, else `~/.cache/tp2d`."""
    return Path(os.environ.get("TP2D_CACHE", "~/.cache/tp2d")).expanduser()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, filled by `build` if it isn't there yet. Its time of last change becomes that of its last use.

    Safe when many processes call it at once: one builds into a temporary folder beside it, which then takes the name
    in one step, and the others wait, as long as it lives. Its parts are removed then. Where locks don't reach across
    nodes, two may build at once and share parts: a part must be the same whoever makes it, must appear in one step, and
    may vanish when the other one is done.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _wait_for_turn(folder):
            if not folder.exists():
                scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.{_host()}.", dir=folder.parent))
                try:
                    build(scratch)
                    _publish(scratch, folder)
                    shutil.rmtree(parts_of(folder), ignore_errors=True)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(OSError):  # a cache that is only read
        os.utime(folder)
    return folder


def parts_of(folder: Path) -> Path:
    """Where a builder of `folder` may keep parts. They stay if it dies, and are removed once the folder is complete."""
    return folder.with_name(f"{folder.name}.parts")


def clear_cache() -> list[str]:
    """Remove what nobody will use again, and return the names of what was removed.

    - Temporary folders whose builder died. A builder holds the lock of what it builds for as long as it lives, so with
      the lock free the folder is nobody's. On a network file system locks may not reach across nodes: a folder that
      another node made must have been untouched for a day as well.
    - Parts of a folder that is complete, or that nobody has added any to for `UNFINISHED_DAYS` days.
    - Tokens (`tokens-*`), and the rows that they are made of (`rows-*`), that no run has used for `UNUSED_DAYS` days.
      Models are kept: there are few.
    """
    removed = []
    for lock in sorted(cache_dir().glob("*.lock")):
        folder = lock.with_suffix("")
        found = [
            path for path in folder.parent.glob(f"{folder.name}.*") if path.is_dir() and _is_abandoned(path, folder)
        ]
        if folder.name.startswith(("tokens-", "rows-")) and _age(folder) > UNUSED_DAYS * DAY:
            found.append(folder)
        if found:
            with contextlib.suppress(Timeout, OSError), _lock(folder, timeout=0):
                for path in found:
                    shutil.rmtree(path)
                    removed.append(path.name)
    return removed


def _publish(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.exists():  # where locks don't reach across nodes, another one was faster: its folder is as good
            raise


def _lock(folder: Path, timeout: float) -> FileLock:
    return FileLock(folder.with_name(folder.name + ".lock"), timeout=timeout)


@contextlib.contextmanager
def _wait_for_turn(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; if that takes a while, say why."""
    lock = _lock(folder, timeout=SILENT_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        print(f"waiting for another process that makes {folder}", flush=True)
        lock.acquire(timeout=-1)
    try:
        yield
    finally:
        lock.release()


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _is_abandoned(scratch: Path, folder: Path) -> bool:
    """Whether a temporary folder, or parts, of a folder whose lock is free belong to nobody."""
    if scratch == parts_of(folder):
        return folder.exists() or _age(scratch) > UNFINISHED_DAYS * DAY
    return f".{_host()}." in scratch.name or _age(scratch) > DAY


def _age(folder: Path) -> float:
    """Seconds since a folder, or a file in it, was changed; 0 if it isn't there."""
    with contextlib.suppress(OSError):
        return time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    return 0.0
