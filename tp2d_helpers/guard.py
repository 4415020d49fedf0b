"""What keeps a run from harm: a watchdog that ends a hang and names its cause, a lock against a second writer."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tp2d_helpers.config import Config, ConfigError

MOST_NAMED = 8  # ranks, in one message
_HELD: list[FileLock] = []  # until the process ends
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # what a file system without locks answers


class Watchdog:
    """Ends this process if its rank makes no progress for `seconds`, and says which ranks are the cause.

    A rank that fails to arrive at a collective leaves all others waiting in it. So every rank tells by `mark` where it
    is, and a thread writes that to `<run_dir>/heartbeats/rank_<rank>.json`. A thread that runs out of patience reads
    all of these files. The cause is the ranks without a heartbeat, or else the ranks that have set fewer marks than
    others, or else nobody: then all wait in a collective that doesn't come back. It writes the finding to
    `<run_dir>/stalled.json` and to stderr and exits with 1, and Ray Train restarts the workers from the newest
    checkpoint. The ranks meet in files because torch's store lives in rank 0, which may be the one that hangs.

    Every rank must set the same marks in the same order.
    """

    def __init__(self, run_dir: str | Path, rank: int, world_size: int, seconds: float) -> None:
        """Start the thread.

        Args:
            run_dir: a folder that all ranks share.
            rank, world_size: of the whole world.
            seconds: the longest time that a healthy rank spends between two marks, and some more; 0 turns it off.
        """
        self.run_dir, self.rank, self.world_size, self.seconds = Path(run_dir), rank, world_size, seconds
        self.place = (0, "the start", time.monotonic())  # number of marks, the newest one, when: replaced as a whole
        self.thawed = time.monotonic()
        self.heartbeats: dict[int, dict[str, Any]] = {}
        self.changed: dict[int, float] = {}  # when this rank saw the heartbeat of another change, by its own clock
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self.thread.start()

    def mark(self, place: str) -> None:
        """Say where this rank is, as "step 12". It costs a microsecond."""
        self.place = (self.place[0] + 1, place, time.monotonic())

    def close(self) -> None:
        """Stop watching. The others learn that this rank has gone, and where it was."""
        self.closed.set()
        if self.thread.is_alive():
            self.thread.join()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.mark("the end")
        self.close()

    def _watch(self) -> None:
        interval = min(self.seconds / 10, 5)
        self._beat()
        self._look()
        looked, before = -1, time.monotonic()
        while not self.closed.wait(interval):
            now = time.monotonic()
            if now - before > self.seconds / 2:  # the process was frozen itself, and knows nothing of the others
                self.thawed = now
            self._beat()
            marks, _, since = self.place
            stuck = now - max(since, self.thawed)
            # The clocks of nodes differ, so a dead heartbeat is one that is the same in two looks, more than half of
            # the patience apart. More looks would be many reads of the storage in a large world.
            if stuck >= 0.4 * self.seconds and looked != marks:
                looked = marks
                self._look()
            elif stuck >= self.seconds:
                self._look()
                if marks == self.place[0]:
                    self._end()
            before = time.monotonic()
        self._beat()

    def _beat(self) -> None:
        marks, place, since = self.place
        beat = dict(marks=marks, place=place, seconds_there=round(time.monotonic() - since, 3), time=time.time(),
                    host=socket.gethostname(), pid=os.getpid(), closed=self.closed.is_set())  # fmt: skip
        self.heartbeats[self.rank] = beat
        with contextlib.suppress(OSError):  # a full disk is for the training to report
            write_json(self.run_dir / "heartbeats" / f"rank_{self.rank}.json", beat)

    def _look(self) -> None:
        """Read the others' heartbeats. The first look is the yardstick: an earlier attempt's file never changes."""
        for rank in set(range(self.world_size)) - {self.rank}:
            beat = read_json(self.run_dir / "heartbeats" / f"rank_{rank}.json")
            if rank in self.heartbeats and beat and beat != self.heartbeats[rank]:
                self.changed[rank] = time.monotonic()
            self.heartbeats[rank] = beat or self.heartbeats.get(rank, {})

    def _end(self) -> None:
        ranks, finding = self._culprits()
        message = f"no progress for {self.seconds:g} s: {finding}"
        with contextlib.suppress(OSError):
            write_json(self.run_dir / "stalled.json", dict(message=message, time=time.time(), ranks=ranks))
        os.write(2, f"{message}\n".encode())  # sys.stderr has a lock, which the hanging thread may hold
        faulthandler.dump_traceback(2)
        os._exit(1)  # a thread that hangs in a collective doesn't end by an exception

    def _culprits(self) -> tuple[list[int], str]:
        """The ranks to blame, and the finding in words."""
        beats, now = self.heartbeats, time.monotonic()
        unseen = [rank for rank in range(self.world_size) if rank != self.rank and rank not in self.changed]
        silent = [rank for rank in self.changed if now - self.changed[rank] > self.seconds / 2]
        silent = [rank for rank in silent if not beats[rank]["closed"]]  # who has closed is silent by right
        others = [rank for rank in range(self.world_size) if rank not in {*unseen, *silent}]
        furthest = max(beats[rank]["marks"] for rank in others)
        late = [rank for rank in others if beats[rank]["marks"] < furthest]
        waiting = [rank for rank in others if rank not in late]
        parts = [
            *_say(unseen, beats, ("has", "have"), "given no sign of life"),
            *_say(silent, beats, ("does", "do"), "not answer ({host}, pid {pid}; last seen in {place!r})"),
            *_say(late, beats, ("is", "are"), "still in {place!r}"),
            *_say(waiting, beats, ("waits", "wait"), "in {place!r}"),
        ]
        if not (unseen or silent or late):
            parts.append("the collective operation there does not come back on any rank")
        return sorted(unseen + silent) or late or waiting, "; ".join(parts)


def _say(ranks: list[int], beats: dict[int, dict[str, Any]], verbs: tuple[str, str], what: str) -> list[str]:
    """A phrase for all ranks of which the same is to be said."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        groups.setdefault(what.format_map(beats[rank]), []).append(rank)
    phrases = [f"{name_ranks(group)} {verbs[len(group) > 1]} {said}" for said, group in groups.items()]
    left = sum(len(group) for group in list(groups.values())[MOST_NAMED:])
    return phrases[:MOST_NAMED] + [f"and so on for {left} more"] * bool(left)


def name_ranks(ranks: list[int]) -> str:
    """`ranks 0, 1, 2`, and no more than `MOST_NAMED` of them.

    >>> name_ranks(list(range(128)))
    'ranks 0, 1, 2, 3, 4, 5, 6, 7 and 120 more'
    """
    named = ", ".join(map(str, ranks[:MOST_NAMED]))
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {named}{more}"


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
