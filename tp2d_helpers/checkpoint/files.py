"""Small files that all processes see whole, and the locks that keep a second writer out of a run's folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tp2d_helpers import heartbeat
from tp2d_helpers.config import Config, ConfigError

_HELD = contextlib.ExitStack()  # until the process ends
WRITER = ".writer.json"
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # what a file system without locks answers
PLAIN = re.compile(r"[\w/.-]+", re.ASCII)
SIGN_SECONDS = 5  # between two signs of life of an owner
WATCH_SECONDS = 20  # without one, and it is dead; above the seconds that a node may see an old file for
DEAD_SECONDS = 3600  # an age that no difference between two nodes' clocks explains


def write_json(path: Path, value: dict[str, Any], durable: bool = True) -> None:
    """Write a small file that all see as a whole: the old one or the new one, after a power failure too.

    Args:
        durable: wait until the disk has it; not worth it for a file that is written again in a moment.
    """
    scratch = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())
    scratch.replace(path)
    if durable:
        flush_folder(path.parent)


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """A path to a folder in which no character means anything but itself: DeepSpeed makes globs and patterns of paths.

    That is the folder's own, or that of a link to it, which is gone afterwards.
    """
    if PLAIN.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="tp2d-") as scratch:
        link = Path(scratch, "folder")
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


def flush_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder. Some network file systems can't; their servers do it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """An object per line; none without the file. An incomplete last line, of a killed process, is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty if there is no such file, or it can't be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def machine() -> str:
    """What tells this machine, as long as it runs, from all others: the processes on it share one kernel's locks."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return socket.gethostname()


@contextlib.contextmanager
def lock_run(config: Config) -> Iterator[None]:
    """Hold the run's folder: a second launch into it would mix its checkpoints and records with the first one's.

    The lock is the kernel's (or, on a network file system, its server's), so it ends with the process, however that
    ends. But some network file systems have none, or one per node. So `.lock.json` says who holds the folder, and
    changes every `SIGN_SECONDS`; one that another machine wrote is watched for `WATCH_SECONDS`. Two machines whose
    launches find an abandoned one in the same second, without locks, are not told apart.

    Raises:
        ConfigError: if another launch holds it.
    """
    lock, record = _lock(config.run_dir / ".lock", 0), config.run_dir / ".lock.json"
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            locked = _acquire(lock)
            held.callback(lock.release)
            by = _other_owner(record, locked)
        except Timeout:
            by = read_json(record) or {"pid": "?"}
        if by:
            who = f" (started by pid {by['pid']} on {by['host']} at {by['started']})" if "host" in by else ""
            raise ConfigError(
                f"experiment_name = {config.experiment_name!r}: another run is writing to {config.run_dir}{who}; "
                "wait for it, or take another experiment_name"
            )
        held.callback(record.unlink, missing_ok=True)
        held.enter_context(_signing(record))
        yield


def claim_run(run_dir: str | Path, rank: int, seconds: float = 120) -> None:
    """Hold the run's folder as its writer: called by every worker, done by rank 0, until its process ends.

    `lock_run` ends with the driver, and the workers of a driver that was killed may outlive it by some seconds. The new
    ones wait for that. What an earlier attempt left behind of a hang gets another name: it is survived.

    Raises:
        RuntimeError: if the others are still there after `seconds`.
    """
    if rank != 0:
        return
    run_dir, end = Path(run_dir), time.monotonic() + seconds
    # Not a soft lock, where the file system has no real ones: that would outlive a process that was killed.
    lock, record = _lock(run_dir / ".writer.lock", 1), run_dir / WRITER
    locked = None
    while locked is None or _other_owner(record, locked):
        heartbeat.pulse()
        if time.monotonic() > end:
            raise RuntimeError(f"workers of an earlier launch still write to {run_dir} after {seconds:g} s")
        with contextlib.suppress(Timeout):
            locked = _acquire(lock) if locked is None else locked
    _HELD.enter_context(_signing(record))
    _HELD.callback(lock.release)
    if (stall := run_dir / "stalled.json").exists():
        stall.replace(run_dir / time.strftime("stalled_%Y%m%d_%H%M%S.json"))


def _lock(path: Path, seconds: float) -> FileLock:
    return FileLock(path, timeout=seconds, fallback_to_soft=False)


def _acquire(lock: FileLock) -> bool:
    """Take a lock; False if the file system has none. Raises `Timeout` if another process holds it."""
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _other_owner(record: Path, locked: bool) -> dict[str, Any]:
    """Who holds the folder by a record that still changes; empty if nobody does, and the record is there now.

    Args:
        locked: whether this process has the lock, so that no other of this machine can be the owner.
    """
    with contextlib.suppress(FileExistsError):
        record.touch(exist_ok=False)  # one process's, also where there are no locks
        return {}
    found = read_json(record)
    if locked and found.get("machine") == machine():
        return {}
    if time.time() - found.get("time", time.time()) > DEAD_SECONDS:
        return {}
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end and record.exists():
        time.sleep(0.1)
        if (now := read_json(record)) and now != found:
            return now
    return {}


@contextlib.contextmanager
def _signing(record: Path) -> Iterator[None]:
    """Within it, a record says that this process holds the folder, and changes every `SIGN_SECONDS`."""
    released, started = threading.Event(), time.strftime("%Y-%m-%d %H:%M:%S %Z")

    def sign() -> None:
        """Write the record anew."""
        with contextlib.suppress(OSError):  # a full disk is for the training to report
            who = dict(pid=os.getpid(), host=socket.gethostname(), machine=machine(), started=started)
            write_json(record, who | {"time": time.time()}, durable=False)

    def go_on() -> None:
        """Sign until the folder is released."""
        while not released.wait(SIGN_SECONDS):
            sign()

    sign()
    thread = threading.Thread(target=go_on, name=record.name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
