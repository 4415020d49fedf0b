"""What nobody will use again goes away, by three rules."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from tp2d_helpers.cache.folders import host, lock_of, parts_of
from tp2d_helpers.cache.locks import alone
from tp2d_helpers.cache.space import cache_dir

DAY = 24 * 3600  # seconds
UNUSED_DAYS = 30  # after which tokens are removed; a later run makes them again
UNFINISHED_DAYS = 7  # after which the parts of a build that nobody went on with are removed


def clear_cache() -> list[str]:
    """Remove what nobody will use again, and return the names of what was removed. Other users' folders stay.

    - Temporary folders whose builder died. A builder holds the lock of what it builds for as long as it lives, so with
      the lock free the folder is nobody's. On a network file system locks may not reach across nodes, or there are
      none: a folder that another node made, or any without locks, must have been untouched for a day as well.
    - Parts of a folder that is complete, or that nobody has added any to for `UNFINISHED_DAYS` days.
    - Tokens (`tokens-*`), and the rows that they are made of (`rows-*`), that no run has used for `UNUSED_DAYS` days.
      Models are kept: there are few.
    """
    own = os.geteuid()
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=cache_dir()) as file:
        own = os.fstat(file.fileno()).st_uid  # a network file system may give files another owner
    return [name for lock in sorted(cache_dir().glob("*.lock")) for name in _clear(lock.with_suffix(""), own)]


def _clear(folder: Path, own: int) -> list[str]:
    """Remove a folder and those that belong to it, as `clear_cache` says, if they are of the user `own`."""
    found = {path: _is_abandoned(path, folder) for path in folder.parent.glob(f"{folder.name}.*") if path.is_dir()}
    if folder.name.startswith(("tokens-", "rows-")):
        found[folder] = min(_age(folder), _age(lock_of(folder))) > UNUSED_DAYS * DAY
    removed, ages = [], {path: _age(path) for path in found}
    with contextlib.suppress(OSError):  # another user's, another process removes it, or, a `Timeout`, builds it
        chosen = [path for path, goes in found.items() if goes and path.stat().st_uid == own]
        if chosen:
            with alone(lock_of(folder), seconds=0) as locked:
                for path in chosen:
                    if locked or ages[path] > DAY:
                        shutil.rmtree(path)
                        removed.append(path.name)
    return removed


def _is_abandoned(scratch: Path, folder: Path) -> bool:
    """Whether a temporary folder, or parts, of a folder whose lock is free belong to nobody."""
    if scratch.suffix == parts_of(folder).suffix:
        return folder.exists() or _age(scratch) > UNFINISHED_DAYS * DAY
    return f".{host()}." in scratch.name or _age(scratch) > DAY


def _age(path: Path) -> float:
    """Seconds since a folder, or a file in it, was changed; 0 if it isn't there, or not for this user."""
    with contextlib.suppress(OSError):
        return time.time() - max(each.stat().st_mtime for each in (path, *path.rglob("*")))
    return 0.0
