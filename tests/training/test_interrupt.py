"""What `follow` makes of the end of a launch. Ctrl-C in a real Jupyter kernel: a short message, no workers left."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from grid import NOTEBOOK
from jupyter_client import BlockingKernelClient, KernelManager

from tp2d_helpers.checkpoint.files import write_json
from tp2d_helpers.checkpoint.run_folder import newest_checkpoint
from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.launch import Tail, TrainingFailed, TrainingInterrupted, follow
from tp2d_helpers.training.metrics import append, keep_until, read_metrics

pytestmark = pytest.mark.slow
SETTINGS = """
from tp2d_helpers.config import make_config
from tp2d_helpers.preflight.plan import preflight
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
        """Wait for a cell. status: "ok", "error" or "aborted"; printed: its text; shown: the error, as displayed."""
        answer = SimpleNamespace(status="", printed="", shown="")
        end = time.monotonic() + seconds
        for receive in (self.client.get_iopub_msg, self.client.get_shell_msg):
            while True:  # messages of other cells may come first
                message = receive(timeout=max(0.0, end - time.monotonic()))
                kind, content = message["msg_type"], message["content"]
                if message["parent_header"].get("msg_id") != cell:
                    continue
                if kind == "stream":
                    answer.printed += content["text"]
                elif kind == "execute_result":
                    answer.printed += content["data"]["text/plain"]
                elif kind == "error":
                    answer.shown += "\n".join(content["traceback"])
                elif kind == "execute_reply":
                    answer.status = content["status"]
                if kind == "execute_reply" or content.get("execution_state") == "idle":
                    break
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


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """A kernel, as the notebook's."""
    kernel = Kernel()
    try:
        answer = kernel.run("from tp2d_helpers.launch import launch", 120)
        assert answer.status == "ok", answer.shown
        yield kernel
    finally:
        kernel.stop()


def test_an_interrupted_launch(kernel: Kernel, tmp_path: Path) -> None:
    """The reader is told, the workers end, later cells don't run, the kernel lives, and the run can be continued."""
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    answer = kernel.run(SETTINGS.format(storage=str(tmp_path)), 120)
    assert answer.status == "ok", answer.shown
    cell, following = kernel.start("result = launch(plan)"), kernel.start("print('as in Run All')")
    ended = kernel.client.shell_channel.msg_ready
    wait_until(lambda: ended() or (len(read_metrics(metrics)) >= 7 and newest_checkpoint(metrics.parent)[0]), 240)
    assert not ended(), kernel.finish(cell, 20).shown
    assert len(kernel.workers()) == 2
    kernel.manager.interrupt_kernel()
    answer = kernel.finish(cell, 20)
    wait_until(lambda: not kernel.workers(), 20)

    done = len(read_metrics(metrics))
    checkpoint = newest_checkpoint(metrics.parent)[0].name
    assert answer.status == "error" and answer.shown == (
        f"TrainingInterrupted: interrupted after step {done} of 500; the workers are stopped.\n"
        f"A launch with experiment_name = 'stopped' continues from {checkpoint}."
    )
    assert len(answer.printed.splitlines()) <= 1 + done, answer.printed
    assert kernel.finish(following, 20).status == "aborted"
    assert kernel.run("1 + 1").printed == "2"

    more = kernel.run(f"result = launch(preflight(plan.config.change(debug_steps={done + 3})))", 240)
    assert more.status == "ok", more.shown
    assert f"steps {done + 1} to {done + 3};" in more.printed and f"step {done + 3}/{done + 3}  epoch 0" in more.printed
    assert [record["step"] for record in read_metrics(metrics)] == list(range(1, done + 4))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Settings of a run in `tmp_path`."""
    return make_config(storage_path=str(tmp_path), experiment_name="x")


def test_an_interrupt_before_any_checkpoint(config: Config) -> None:
    """Python's own KeyboardInterrupt, and the SystemExit that Ray Train makes of it. Ctrl-C works again afterwards."""
    handler = signal.getsignal(signal.SIGINT)
    for error in (KeyboardInterrupt, SystemExit(0)):
        with pytest.raises(TrainingInterrupted, match="after step 0 of 9") as caught, follow(config, 9):
            signal.signal(signal.SIGINT, lambda *_: None)
            raise error
        assert isinstance(caught.value, KeyboardInterrupt) and "begins anew" in str(caught.value)
        assert signal.getsignal(signal.SIGINT) is handler


def test_a_stall_is_the_reason_of_a_failed_run(config: Config) -> None:
    """If it happened in this launch, and not in one before."""
    stalled = config.run_dir / "stalled.json"
    with pytest.raises(TrainingFailed) as caught, follow(config, 9):
        write_json(stalled, dict(message="no progress for 60 s: rank 3 has given no sign of life", time=0.0, ranks=[3]))
        raise RuntimeError("the actor died")
    assert "rank 3 has given no sign of life" in str(caught.value) and str(config.run_dir / "logs") in str(caught.value)
    with pytest.raises(TrainingFailed) as caught, follow(config, 9):
        raise RuntimeError("the actor died")
    assert "the actor died" in str(caught.value) and "rank 3" not in str(caught.value)


def test_two_launches_into_one_folder(config: Config) -> None:
    with follow(config, 9), pytest.raises(ConfigError, match="another run is writing"), follow(config, 9):
        pass
    with follow(config, 9):
        pass


def test_the_tail_of_a_file_that_is_replaced(tmp_path: Path) -> None:
    """No line twice, none lost: a growing file, a half-written line, and what a restarted run makes of it."""
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)

    def new() -> list[int]:
        return [record["step"] for record in tail.read()]

    assert new() == []
    append(path, [{"step": 1}, {"step": 2}])
    assert new() == [1, 2] and new() == []
    append(path, [{"step": 3}])
    with open(path, "a") as file:
        file.write(json.dumps({"step": 4})[:5])
    assert new() == [3] and new() == []
    keep_until(path, 1)
    append(path, [{"step": 2}, {"step": 3}, {"step": 4}, {"step": 5}])  # longer than it was before
    assert new() == [1, 2, 3, 4, 5] and new() == []
    path.write_text("")
    assert new() == []
    append(path, [{"step": 6}])
    assert new() == [6]
