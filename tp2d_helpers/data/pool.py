"""Tokenising by all cores: a process of its own, which forks one for each core, and a file for each part.

Neither `fork` nor `spawn` of the process that asks will do: it may have the threads of Ray or a notebook, or a
`__main__` that must not run twice. So a new interpreter is started, which has no threads. It imports the libraries
once; the processes that it forks share that memory. They read the rows from the file that these are mapped from, and
the tokens come back as files, so that a run that was killed finds those that it had.

Nobody is left behind. The new process leads a group of its own, which is killed as a whole: by the process that asked
when it leaves for any reason, such as Ctrl-C, and by itself when that one is gone.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import datasets

from tp2d_helpers.data.folder import Part
from tp2d_helpers.data.rows import Place, Text, divide

SIZE = 4_000_000  # bytes of text in a part, at most, or one row of chats
MOST = 16  # processes: each needs about 60 MB of its own
INTERVAL = 0.5  # seconds between two signs of life
# `tokens` imports all that tokenising does, torch too: done by each process, that would be 250 MB in each.
START = """import sys; sys.path[:] = {path!r}
import tp2d_helpers.data.tokens
from tp2d_helpers.data.pool import main
main({handle})"""


class Encoder(Protocol):
    """What tokenises: `TextEncoder`, `ChatEncoder`."""

    def cuts(self, text: Text, size: int) -> Iterator[int]:
        """The bytes at which a long row may be divided into parts of about `size`."""

    def encode(self, rows: datasets.Dataset, begin: Place, end: Place, tick: Callable[[int], None]) -> Part:
        """The tokens from `begin` to before `end`. `tick` gets the bytes that are done, again and again."""


@dataclass(frozen=True)
class Job:
    """What is to be tokenised, and where its parts are kept."""

    encoder: Encoder
    rows: datasets.Dataset
    folder: Path
    processes: int
    size: int = SIZE

    def parts(self) -> Iterator[tuple[Place, Place]]:
        """Where each part begins and ends."""
        return divide(self.rows, self.size, lambda text: self.encoder.cuts(text, self.size))

    def file(self, begin: Place, end: Place) -> Path:
        """A part's file. Its name says which text it is: parts divided in another way are not taken for it."""
        return self.folder / f"{begin.row}.{begin.byte}-{end.row}.{end.byte}.npz"

    def make(self, begin: Place, end: Place, tick: Callable[[int], None]) -> bool:
        """Tokenise a part into its file. Returns False if it was there.

        The file may be gone again: another node that was faster removes the folder, and this may be in the midst of it.
        """
        if Part.load(self.file(begin, end)):
            return False
        part = self.encoder.encode(self.rows, begin, end, tick)
        with contextlib.suppress(FileNotFoundError):
            part.save(self.file(begin, end))
        return True


def run(job: Job, tick: Callable[[int], None]) -> Iterator[tuple[Part, bool]]:
    """(a part, whether it was made now) for all parts, in order.

    Args:
        tick: called at least every few seconds while work goes on, with the bytes of text that are done.

    Raises:
        What an encoder raises, for the first part that it fails on; RuntimeError if a process dies.
    """
    link, other = multiprocessing.Pipe()
    command = START.format(path=sys.path, handle=other.fileno())
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    leader = subprocess.Popen(
        [sys.executable, "-c", command], pass_fds=[other.fileno()], env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    other.close()
    try:
        link.send(job)
        while message := link.recv():
            if isinstance(message, int):
                tick(message)
            elif isinstance(message, BaseException):
                raise message
            else:
                begin, end, made = message
                # Another node that was faster may have removed all files; its result is as good, and this one goes on.
                yield Part.load(job.file(begin, end)) or job.encoder.encode(job.rows, begin, end, lambda _: None), made
    except (EOFError, ConnectionError) as error:
        raise RuntimeError("a process that tokenises was killed, perhaps as the memory was full") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()
        link.close()


def main(handle: int) -> None:
    """What the new process does. Sends numbers of bytes, parts, an exception, and None at the end."""
    link = Connection(handle)
    job = link.recv()
    gc.freeze()  # a collection would write to the memory that is shared
    threading.Thread(target=_end_with, args=(link,), daemon=True).start()
    try:
        for message in _work(job, link):
            link.send(message)
        link.send(None)
    except BaseException as error:
        link.send(error)
    threading.Event().wait()  # to be killed


def _end_with(link: Connection) -> None:
    """Kill this process and those that it forked once the one that asked is gone."""
    with contextlib.suppress(EOFError, OSError):
        link.recv()
    os.killpg(0, signal.SIGKILL)


def _work(job: Job, link: Connection) -> Iterator[int | tuple[Place, Place, bool]]:
    context, parts, pending = multiprocessing.get_context("fork"), job.parts(), deque()
    done, told = context.Value("q", 0), 0
    with ProcessPoolExecutor(job.processes, context, _begin, (job, done, link)) as pool:
        more = True
        while more or pending:
            while more and len(pending) < 3 * job.processes:
                if more := (part := next(parts, None)) is not None:
                    pending.append((part, pool.submit(_make, *part)))
            if pending and (made := _result(pending[0][1])) is not None:
                yield *pending.popleft()[0], made
            if done.value > told:
                yield done.value - told
                told = done.value


def _result(future: Future[bool]) -> bool | None:
    """What a future returns; None if it isn't done yet, after a while."""
    with contextlib.suppress(NotYet):
        return future.result(timeout=INTERVAL)
    return None


_job: Job
_tick: Callable[[int], None]


def _begin(job: Job, done: multiprocessing.Value, link: Connection) -> None:
    """Set up a forked process."""
    global _job, _tick
    link.close()  # or nobody would see that the leader is gone

    def tick(size: int) -> None:
        """Bytes that this process has done."""
        with done.get_lock():
            done.value += size

    _job, _tick = job, tick


def _make(begin: Place, end: Place) -> bool:
    return _job.make(begin, end, _tick)
