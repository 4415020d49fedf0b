"""What a shared machine has: another user's process, and a disk with little room."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

FIRST, SECOND = 65531, 65532  # users of a shared disk; only root can become one


def call(function: Callable[..., Any], *arguments: Any, user: int, umask: int = 0o022) -> Any:
    """What function(*arguments) returns, or raises, in a forked process of that user.

    It must do without the threads of this process (of torch or pyarrow), and what it imports must be there: Python's
    own folder may not be the user's to read.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(theirs, function, arguments, user, umask)
    )
    process.start()
    theirs.close()
    ok, found = ours.recv()
    process.join()
    if not ok:
        raise found
    return found


def _child(link: Connection, function: Callable[..., Any], arguments: tuple, user: int, umask: int) -> None:
    os.umask(umask)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    try:
        answer = True, function(*arguments)
    except BaseException as error:
        answer = False, error
    link.send(answer)


@contextlib.contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file of this process, or of those that it starts, grows beyond so many bytes: EFBIG, as a quota is EDQUOT."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
