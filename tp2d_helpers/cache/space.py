"""Where the cache is, and what is said of one that is full, or not for this user."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tp2d_helpers.config import ConfigError, reason

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def cache_dir() -> Path:
    """Folder for what is built once per machine: `$TP2D_CACHE`, else `~/.cache/tp2d`."""
    return Path(os.environ.get("TP2D_CACHE", "~/.cache/tp2d")).expanduser()


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, is of a full disk or quota, in whichever library's words."""
    words, seen = ["Not enough disk space", *map(os.strerror, FULL)], []
    while error and error not in seen:  # nothing forbids a circle
        if getattr(error, "errno", None) in FULL or any(word in str(error) for word in words):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder, or of the nearest one above it that is there."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def size(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; 0 if it isn't there."""
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return 0


def check_space(folder: Path, needed: float, what: str) -> None:
    """See before something is made whether there is room for it.

    Args:
        needed: an estimate, bytes. It may be twice too large: half of it is asked for.

    Raises:
        ConfigError: if there is less.
    """
    if (free := free_bytes(folder)) < needed / 2:
        raise ConfigError(f"{_named(folder)}: {size(free)} free, and {what} need about {size(int(needed))}; {_cure()}")


@contextlib.contextmanager
def in_words(folder: Path, *written: Path) -> Iterator[None]:
    """Say of errors of the folder's disk, and of folders of other users, what can be done. All others pass.

    Args:
        written: folders that are made there.

    Raises:
        ConfigError: with the cache's folder.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # safetensors, for one, has an exception of its own
        if is_full(error):
            so_far = f" after {size(sum(map(size_of, written)))}" if written else ""
            raise ConfigError(
                f"{_named(folder)}: no room to make {folder.name}{so_far}, {size(free_bytes(folder.parent))} free "
                f"({reason(error)}); {_cure()}"
            ) from error
        name = str(getattr(error, "filename", None) or "")
        if getattr(error, "errno", None) in DENIED and name.startswith(str(folder.parent)):
            raise ConfigError(
                f"{_named(folder)}: {name} can't be read or written{_owner(Path(name))} ({error.strerror}); have its "
                "owner open it (chmod -R a+rX, and g+w to share what is made), or set TP2D_CACHE to another folder"
            ) from error
        raise


def _named(folder: Path) -> str:
    if folder.parent != cache_dir():
        return str(folder.parent)
    value = os.environ.get("TP2D_CACHE")
    return f"TP2D_CACHE = {value!r}" if value else f"TP2D_CACHE (not set: {cache_dir()})"


def _cure() -> str:
    return "make room, or set TP2D_CACHE to a folder on a larger disk"


def _owner(path: Path) -> str:
    with contextlib.suppress(OSError, KeyError):
        path = path if path.exists() else path.parent
        return f" by this user; it is {path.owner()}'s" if path.stat().st_uid != os.geteuid() else " by this user"
    return " by this user"
