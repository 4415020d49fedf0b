"""Jobs: groups of processes that `run.py` starts, lets go one after the other, waits for, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GRACE = 5.0  # seconds that processes get to end by themselves


def free_port() -> int:
    """A port on the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def worker_environment(processes: int, rank: int) -> dict[str, str]:
    """What torchrun would set but the port, for communication within this machine; variables that are set stay."""
    threads = max(1, min(8, (os.cpu_count() or 1) // processes))
    defaults = dict(OMP_NUM_THREADS=str(threads), GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo",
                    TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1")  # fmt: skip
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes,
                 MASTER_ADDR="127.0.0.1")  # fmt: skip
    return {**defaults, **os.environ, **{name: str(value) for name, value in place.items()}}


class Job:
    """`processes` copies of a script, each with its rank. They import, and then wait for `release`."""

    def __init__(
        self, script: str, settings: dict[str, Any], processes: int, folder: Path, env: dict[str, str] | None = None
    ) -> None:
        """Start the processes. `folder` gets the settings, the logs, and what the job leaves."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.result = folder, folder / "result.json"
        self.go = folder / "go"
        for stale in folder.glob("result.json*"):
            stale.unlink()
        self.go.unlink(missing_ok=True)
        settings = {**settings, "result": str(self.result), "go": str(self.go), "raw": str(folder / "raw.json")}
        path = folder / "job.json"
        path.write_text(json.dumps(settings, indent=1))
        self.logs = [folder / f"rank{rank}.log" for rank in range(processes)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = {**worker_environment(processes, rank), **(env or {})}
            with open(log, "wb") as file:
                self.processes.append(
                    subprocess.Popen([sys.executable, str(HERE / script), str(path)], env=environment, stdout=file,
                                     stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
                )  # fmt: skip

    def release(self) -> None:
        """Let the processes begin. They read the port of their rendezvous: one that is free now."""
        scratch = self.go.with_suffix(".tmp")
        scratch.write_text(str(free_port()))
        scratch.replace(self.go)

    def wait(self, seconds: float) -> str | None:
        """Wait until all have ended; None if all went well, else the reason in a line. Leaves no process behind."""
        end, reason = time.monotonic() + seconds, None
        try:
            while None in (codes := [process.poll() for process in self.processes]):
                if any(codes):  # one has failed
                    break
                if time.monotonic() > end:
                    reason = f"stopped at its time limit of {seconds:.0f} s"
                    break
                time.sleep(0.1)
        finally:
            self.end()
        return reason or (self.error() if any(process.returncode for process in self.processes) else None)

    def end(self) -> None:
        """End the processes and those that they started: a request first, for Ray to stop its own."""
        running = [process for process in self.processes if process.poll() is None]
        for process in running:
            process.terminate()
        end = time.monotonic() + GRACE
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a compiler's helpers are in the same group
        for process in self.processes:
            process.wait()

    def error(self) -> str:
        """What a rank noted as it failed, else the last line of a log of a process that failed."""
        note = self.result.with_name(self.result.name + ".error")
        if note.exists():
            return note.read_text()
        failed = [i for i, p in enumerate(self.processes) if p.returncode and p.returncode != -signal.SIGTERM] or [0]
        lines = self.logs[failed[0]].read_text(errors="replace").strip().splitlines()
        return (lines[-1] if lines else f"exit code {self.processes[failed[0]].returncode}")[:400]

    def found(self) -> dict[str, Any]:
        """What the job wrote so far."""
        return json.loads(self.result.read_text()) if self.result.exists() else {}
