"""Ctrl-C during the launch, in a real Jupyter kernel: a short message, no workers left, and the run can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from grid import NOTEBOOK
from jupyter_client import BlockingKernelClient, KernelManager

from tp2d_helpers.metrics import read_metrics

SETTINGS = """
from tp2d_helpers.config import make_config
from tp2d_helpers.preflight import preflight
plan = preflight(make_config(
    model_name="demo", dataset_name="demo", use_gpu=False, tp_size=1, dp_size=2, seq_length=64, batch_size_per_gpu=2,
    debug_steps=500, log_interval=1, checkpoint_interval=5, storage_path={storage!r}, experiment_name="stopped"))
"""


class Kernel:
    """A Jupyter kernel of this interpreter, and how a front end uses it."""

    def __init__(self) -> None:
        self.manager = KernelManager()
        self.manager.start_kernel(cwd=str(NOTEBOOK.parent))
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.process = psutil.Process(self.manager.provisioner.pid)

    def start(self, code: str) -> str:
        """Send a cell."""
        return self.client.execute(code)

    def finish(self, cell: str, seconds: float) -> SimpleNamespace:
        """Wait for a cell. status: "ok" or "error"; printed: all its text; shown: the error as it is displayed."""
        answer = SimpleNamespace(status="", printed="", shown="")
        end = time.monotonic() + seconds
        while True:
            message = self.client.get_iopub_msg(timeout=max(0.0, end - time.monotonic()))
            content = message["content"]
            if message["parent_header"].get("msg_id") != cell:
                continue
            if message["msg_type"] == "stream":
                answer.printed += content["text"]
            elif message["msg_type"] == "error":
                answer.shown += "\n".join(content["traceback"])
            elif message["msg_type"] == "execute_result":
                answer.printed += content["data"]["text/plain"]
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                break
        while True:  # the replies of earlier cells come first
            reply = self.client.get_shell_msg(timeout=max(0.0, end - time.monotonic()))
            if reply["parent_header"]["msg_id"] == cell:
                answer.status = reply["content"]["status"]
                return answer

    def run(self, code: str, seconds: float = 60) -> SimpleNamespace:
        """Send a cell and wait for it."""
        return self.finish(self.start(code), seconds)

    def workers(self) -> list[psutil.Process]:
        """The training workers of this kernel's Ray session."""
        found = []
        for process in self.process.children(recursive=True):
            try:
                found += [process] if "RayTrainWorker" in " ".join(process.cmdline()) else []
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self) -> None:
        """End it and all that it started."""
        processes = self.process.children(recursive=True)
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        for process in psutil.wait_procs(processes, timeout=10)[1]:
            process.kill()


def wait_until(true: Callable[[], object], seconds: float) -> float:
    """Wait for it; return how long it took in seconds."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    """A kernel in which the notebook's definitions were run."""
    kernel = Kernel()
    try:
        cells = nbformat.read(NOTEBOOK, as_version=4).cells
        tagged = [
            cell.source for cell in cells if {"imports", "train-func", "launch-function"} & {*cell.metadata.get("tags", [])}
        ]
        answer = kernel.run("\n".join(tagged), 120)
        assert answer.status == "ok", answer.shown
        yield kernel
    finally:
        kernel.stop()


def test_an_interrupted_launch(kernel: Kernel, tmp_path: Path) -> None:
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    answer = kernel.run(SETTINGS.format(storage=str(tmp_path)), 120)
    assert answer.status == "ok", answer.shown
    cell = kernel.start("result = launch(plan)")
    wait_until(lambda: len(read_metrics(metrics)) >= 7, 120)
    assert len(kernel.workers()) == 2
    kernel.manager.interrupt_kernel()
    began = time.monotonic()
    answer = kernel.finish(cell, 30)
    print("cell", time.monotonic() - began)
    print(json.dumps(vars(answer), indent=1))
    print("workers", wait_until(lambda: not kernel.workers(), 20))
    answer = kernel.run("1 + 1")
    assert answer.printed == "2"
