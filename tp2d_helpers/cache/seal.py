"""Folders that are known to be whole: their files are listed as they are made, and compared with the list when used.

A disk that fills up, a power failure or a copy that broke off leave files cut short, or with blocks of zeros. Sizes are
compared at every use. Contents are read by one process of a node for all of its processes, and not again until the node
restarts, a file changes or a day has gone by. That takes as long as the disk does: xxHash makes 5 GB/s of a core.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import xxhash

from tp2d_helpers import heartbeat
from tp2d_helpers.cache.locks import alone

LIST = ".files.json"  # {name: [bytes, hash]}
BLOCK = 2**20  # bytes that are read at once
GOOD_SECONDS = 24 * 3600  # that a look at the contents counts for


def seal(folder: Path) -> None:
    """List the files of a folder, and wait until the disk has all of them.

    Whoever may read the folder may read its files: some libraries (safetensors, for one) write them for their owner
    alone.
    """
    opened, files = folder.stat().st_mode, sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {str(path.relative_to(folder)): [path.stat().st_size, _hash(path)] for path in files}
    (folder / LIST).write_text(json.dumps(listed))
    for path in [*files, folder / LIST]:
        _flush(path)
        if (mode := path.stat().st_mode) != (more := mode | opened & 0o666):
            with contextlib.suppress(OSError):  # a file system without modes
                path.chmod(more)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        with contextlib.suppress(OSError):  # some network file systems can't; their servers do it
            _flush(path)


def damage(folder: Path) -> str:
    """What is wrong with a sealed folder, in words; "" if nothing is.

    Raises:
        PermissionError: if its files are not for this user.
    """
    try:
        listed, found = json.loads((folder / LIST).read_text()), {}
        for name, (size, digest) in listed.items():
            status = (folder / name).stat()
            if status.st_size != size:
                return f"{name} has {status.st_size:,} bytes, not {size:,}"
            found[name] = [size, digest, status.st_mtime_ns, status.st_ctime_ns]
        return _changed(folder, found)
    except PermissionError:
        raise
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it can't be read: {error.strerror}"
    except (ValueError, TypeError, AttributeError):
        return f"{LIST} is no list of its files"


def _changed(folder: Path, found: dict[str, list[Any]]) -> str:
    """What is wrong with the contents of a folder's files: by a look at them, or as another process said.

    Args:
        found: by name, the size and hash that a file should have, and when it was changed.
    """
    name = hashlib.sha256(f"{_boot()} {folder.absolute()}".encode()).hexdigest()[:16]
    verdict = Path(tempfile.gettempdir(), f"tp2d-{os.getuid()}", name)  # of this node, whoever else has the cache
    try:
        verdict.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return _compare(folder, found)
    if (said := _said(verdict, found)) is None:
        with alone(verdict.with_suffix(".lock"), waiting=f"waiting for another process that reads {folder}"):
            if (said := _said(verdict, found)) is None:
                said = _compare(folder, found)
                with contextlib.suppress(OSError):
                    verdict.with_suffix(f".{os.getpid()}").write_text(json.dumps([found, said]))
                    verdict.with_suffix(f".{os.getpid()}").replace(verdict)
    return said


def _said(verdict: Path, found: dict[str, list[Any]]) -> str | None:
    """What a process of this node said of the same files; None if none did."""
    with contextlib.suppress(OSError, ValueError):
        of, said = json.loads(verdict.read_text())
        if of == found and time.time() - verdict.stat().st_mtime < GOOD_SECONDS:
            return said
    return None


def _compare(folder: Path, found: dict[str, list[Any]]) -> str:
    return next((f"{name} has other contents" for name, (_, digest, *_) in found.items()
                 if _hash(folder / name) != digest), "")  # fmt: skip


def _hash(path: Path) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            heartbeat.pulse()
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(handle)


def _boot() -> str:
    """What tells this machine since it started from any other, and from itself before."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    return socket.gethostname()
