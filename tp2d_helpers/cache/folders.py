"""Folders that are built once, and appear in the cache at once, when they are complete.

Beside one, a long build may keep parts of what it makes (`parts_of`), which outlive it: the next builder of the same
folder goes on with them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

from tp2d_helpers.cache.locks import alone
from tp2d_helpers.cache.seal import damage, seal
from tp2d_helpers.cache.space import in_words, is_full

ABSENT = "not there"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, filled by `build` if it isn't there yet, or is damaged. This use of it is noted.

    Safe when many processes call it at once: one builds into a temporary folder beside it, which then takes the name
    in one step, and the others wait, as long as it lives. Its parts are removed then. Where there are no locks, or they
    don't reach across nodes, two may build at once and share parts: the first one's folder is taken. A part must be the
    same whoever makes it, must appear in one step, and may vanish when the other one is done.

    Raises:
        ConfigError: if the disk is full, or the folder is another user's and not to be read.
    """
    with in_words(folder):
        if _look(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with alone(lock_of(folder), waiting=f"waiting for another process that makes {folder}"):
                if wrong := _look(folder):
                    if wrong != ABSENT:
                        print(f"{folder} is damaged ({wrong}): it is made anew", flush=True)
                    _build(folder, build)
    for mark in (folder, lock_of(folder)):  # the second of another user's folder
        with contextlib.suppress(OSError):  # a cache that is only read
            os.utime(mark)
            break
    return folder


def parts_of(folder: Path) -> Path:
    """Where a builder of `folder` may keep parts. They stay if it dies, and are removed once the folder is complete.

    Each user has a folder of their own.
    """
    return folder.with_name(f"{folder.name}.{os.getuid()}.parts")


def lock_of(folder: Path) -> Path:
    """The file that whoever builds a folder holds; changed when another user's folder is used."""
    return folder.with_name(folder.name + ".lock")


def host() -> str:
    """This machine, as temporary folders are called by it."""
    return socket.gethostname().replace(".", "-")


def _look(folder: Path) -> str:
    return damage(folder) if folder.exists() else ABSENT


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    scratch, parts = folder.with_name(f"{folder.name}.{host()}.{uuid.uuid4().hex[:8]}"), parts_of(folder)
    keep = True
    try:
        with in_words(folder, scratch, parts):
            scratch.mkdir()  # as the umask has it, where `mkdtemp` would make it this user's alone
            build(scratch)
            seal(scratch)
            _publish(scratch, folder)
            keep = False
    except Exception as error:
        keep = not is_full(error)  # others want to write to that disk, too
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if not keep:
            shutil.rmtree(parts, ignore_errors=True)


def _publish(scratch: Path, folder: Path) -> None:
    """Give a folder its name. One that has the name already gives way if it is damaged, or is taken."""
    old = scratch.with_name(f"{scratch.name}.old")
    while True:
        try:
            scratch.rename(folder)
            break
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not folder.exists():
                raise
        if not damage(folder):  # another one was faster: its folder is as good
            break
        with contextlib.suppress(FileNotFoundError):  # another one moved it
            folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)
