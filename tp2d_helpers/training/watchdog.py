"""A watchdog that ends a hang and names its cause."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tp2d_helpers import heartbeat
from tp2d_helpers.checkpoint.files import read_json, write_json

if TYPE_CHECKING:
    from tp2d_helpers.checkpoint.run_folder import Progress

MOST_NAMED = 8  # ranks, in one message
BUSY = 0.05  # of a core: a start that takes more is at work; Ray's own threads in a worker take a hundredth
MOVED = 2**20  # bytes read or written since the last beat: the same

Batch = TypeVar("Batch")


class Watchdog:
    """Ends this process if no rank of the run has made progress for `seconds`, and says which ranks are the cause.

    A rank that fails to arrive at a collective leaves all others waiting in it. So every rank tells where it is, by
    the marks and pulses of `tp2d_helpers.heartbeat`, and a thread writes that to
    `<run_dir>/heartbeats/rank_<rank>.json`. A thread that runs out of patience reads all of these files. As long as
    one of the ranks makes progress, such as rank 0 that converts a checkpoint, the others go on waiting. Otherwise the
    cause is the ranks without a heartbeat, or else the ranks that have set fewer marks than others, or else nobody:
    then all wait in a collective that doesn't come back. It writes the finding to `<run_dir>/stalled.json` and to
    stderr and exits with 1, and Ray Train restarts the workers from the newest checkpoint. The ranks meet in files
    because torch's store lives in rank 0, which may be the one that hangs.

    Until the first batch, a worker loads and compiles in libraries that tell nothing. There, a process that computes,
    reads or writes makes progress.
    """

    def __init__(self, run_dir: str | Path, rank: int, world_size: int, seconds: float) -> None:
        """Start the thread.

        Args:
            run_dir: a folder that all ranks share.
            rank, world_size: of the whole world.
            seconds: the longest time that a healthy run spends without a mark or pulse, and some more; 0 turns it off.
        """
        self.run_dir, self.rank, self.world_size, self.seconds = Path(run_dir), rank, world_size, seconds
        self.patient_since = time.monotonic()  # not before this: the process was frozen, or busy with its start
        self.heartbeats: dict[int, dict[str, Any]] = {}
        self.changed: dict[int, float] = {}  # when this rank saw the heartbeat of another change, by its own clock
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        heartbeat.restart()
        if seconds:
            self.thread.start()

    def steps(self, batches: Iterable[Batch], progress: Progress) -> Iterator[Batch]:
        """Pass on the batches of optimizer steps, and mark each as it is waited for and as it is there."""
        heartbeat.mark(f"batch of step {progress.step + 1}")
        for batch in batches:
            heartbeat.mark(f"step {progress.step + 1}")
            yield batch
            heartbeat.mark(f"batch of step {progress.step + 1}")

    def close(self) -> None:
        """Stop watching. The others learn that this rank has gone, and where it was."""
        self.closed.set()
        if self.thread.is_alive():
            self.thread.join()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            heartbeat.mark("the end")
        self.close()

    def _watch(self) -> None:
        interval = min(self.seconds / 10, 5)
        self._beat()
        self._look()
        looked, again, before, work = None, 0.0, time.monotonic(), _work()
        while not self.closed.wait(interval):
            now, place, worked, work = time.monotonic(), heartbeat.here(), work, _work()
            busy = work[0] - worked[0] > BUSY * (now - before) or work[1] - worked[1] > MOVED
            # A process that was frozen itself knows nothing of the others.
            if now - before > self.seconds / 2 or (place.starting and busy):
                self.patient_since = now
            self._beat()
            idle = self._idle()
            # The clocks of nodes differ, so a dead heartbeat is one that is the same in two looks, more than half of
            # the patience apart. More looks would be many reads of the storage in a large world.
            if idle >= 0.4 * self.seconds and looked != place[:2]:
                looked, again = place[:2], 0.0
                self._look()
            elif idle >= self.seconds and now >= again:
                self._look()
                others = min((self.heartbeats[rank]["idle"] for rank in self._answering()), default=idle)
                if others >= self.seconds - 2 * interval and place[:2] == heartbeat.here()[:2]:
                    self._end()
                again = now + self.seconds - others
            before = now
        self._beat()

    def _idle(self) -> float:
        """Seconds since this rank's work last went on."""
        return time.monotonic() - max(heartbeat.here().since, self.patient_since)

    def _beat(self) -> None:
        place = heartbeat.here()
        beat = dict(marks=place.marks, pulses=place.pulses, place=place.name, idle=round(self._idle(), 3),
                    time=time.time(), host=socket.gethostname(), pid=os.getpid(),
                    closed=self.closed.is_set())  # fmt: skip
        self.heartbeats[self.rank] = beat
        with contextlib.suppress(OSError):  # a full disk is for the training to report
            write_json(self.run_dir / "heartbeats" / f"rank_{self.rank}.json", beat, durable=False)

    def _look(self) -> None:
        """Read the others' heartbeats. The first look is the yardstick: an earlier attempt's file never changes."""
        for rank in set(range(self.world_size)) - {self.rank}:
            beat = read_json(self.run_dir / "heartbeats" / f"rank_{rank}.json")
            if rank in self.heartbeats and beat and beat != self.heartbeats[rank]:
                self.changed[rank] = time.monotonic()
            self.heartbeats[rank] = beat or self.heartbeats.get(rank, {})

    def _silent(self) -> list[int]:
        """Ranks whose heartbeat has stopped, other than by right."""
        now = time.monotonic()
        silent = [rank for rank in self.changed if now - self.changed[rank] > self.seconds / 2]
        return [rank for rank in silent if not self.heartbeats[rank]["closed"]]

    def _answering(self) -> set[int]:
        """The other ranks that live and are not done."""
        return {rank for rank in self.changed if not self.heartbeats[rank]["closed"]} - {*self._silent()}

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
        beats, silent = self.heartbeats, self._silent()
        unseen = [rank for rank in range(self.world_size) if rank != self.rank and rank not in self.changed]
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


def _work() -> tuple[float, int]:
    """(seconds of CPU time, bytes read or written) of this process: by calls, and by page faults in mapped files."""
    used, moved = resource.getrusage(resource.RUSAGE_SELF), 0
    with contextlib.suppress(OSError):  # a system without it
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
        moved = int(counts["rchar"]) + int(counts["wchar"])
    return used.ru_utime + used.ru_stime, moved + used.ru_majflt * resource.getpagesize()


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
