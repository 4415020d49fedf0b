"""Which worker ended a run, and of what it died, in words: not of what the others lost when it was gone."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from ray.exceptions import OutOfMemoryError, RayError

from tp2d_helpers.cgroups import out_of_memory_kills
from tp2d_helpers.config import Config

CRASH = r"(?s).*Fatal Python error: ([\w ]+).*\(total: \d+\)\s*\Z"  # as Python's handler of signals ends a log
LOG_END = 100_000  # bytes of a log in which a crash is looked for


def describe_failures(failures: Mapping[int, Exception], config: Config, killed_before: int) -> str:
    """The message of a run that ended with its workers.

    Args:
        failures: by rank, as Ray Train gives them, of the last attempt. A process that has died comes first: the
            others find nothing but a broken connection.
        killed_before: `out_of_memory_kills()` at the launch.
    """
    causes = {rank: getattr(failure, "health_check_failure", failure) for rank, failure in failures.items()}
    died = [rank for rank, cause in causes.items() if isinstance(cause, RayError)]
    rank = min(died or causes)
    log, text = config.run_dir / "logs" / f"rank_{rank}.log", str(failures[rank]).strip()
    if not died:
        said = (text.splitlines() or [type(causes[rank]).__name__])[-1]
        return f"{len(failures)} of {config.num_workers} workers failed; rank {rank}: {said}\nIts log: {log}"
    pid, node, host = (_find(rf"\b{name}='?([^',\s]+)", text) for name in ("pid", "node_ip", "hostname"))
    here = host in ("", socket.gethostname())
    what = _death(causes[rank], pid, log, config, here and out_of_memory_kills() > killed_before)
    place = f" (pid {pid} on node {node})" if pid and node else ""
    return f"{len(died)} of {config.num_workers} workers died; rank {rank}{place} {what}\nIts log: {log}"


def _death(cause: Exception, pid: str, log: Path, config: Config, kernel_killed: bool) -> str:
    """Of what a worker died, and what the reader can do."""
    text = str(cause)
    less = "take fewer workers on a node, nodes with more memory, or async_checkpoint False, which needs no copy there"
    if not config.use_gpu:
        less = "take a smaller batch_size_per_gpu or seq_length, a smaller model, or fewer workers on a node"
    again = "launch it again: it goes on from its newest checkpoint"
    if isinstance(cause, OutOfMemoryError):
        used, whole = _find(r"was ([\d.]+ ?GB) used", text), _find(r"used / ([\d.]+ ?GB)", text)
        own = _find(rf"pid={pid}, actual memory used=([\d.]+ ?GB)", text)
        held = f" ({used} of {whole} used, {own or 'some'} by this worker)" if used and whole else ""
        return f"was killed by Ray, as its node's memory was full{held}; {less}"
    with contextlib.suppress(OSError):
        if crash := _find(CRASH, log.read_bytes()[-LOG_END:].decode(errors="replace")):
            return f"crashed ({crash}); the end of its log says where"
    if "SIGTERM" in text:
        return f"was ended by SIGTERM, as a scheduler, a time limit or a person does it; {again}"
    if "its node" in text:
        return f"was lost with its node; {again}, on the nodes that are left"
    if kernel_killed:
        return f"was killed by the kernel, as the memory of this machine or container was full; {less}"
    if "End of file" in text:
        return f"was killed, perhaps as its node's memory was full; if so, {less}"
    return f"died: {' '.join(text.split())[:300].rstrip('.')}; {again}"


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
