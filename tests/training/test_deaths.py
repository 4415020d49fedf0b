"""A run that ends as one of its workers died says which, of what, and what to do."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from tp2d_helpers import cgroups, launch
from tp2d_helpers.config import Config, make_config
from tp2d_helpers.preflight.plan import preflight
from tp2d_helpers.training import deaths

BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:11674. GLHF!")
# As Ray 2.60 words it.
INFO = """A worker health check failed.
Worker info: Worker(
  actor=Actor(RayTrainWorker, 17dba68024b6366d87607f2d01000000),
  metadata=ActorMetadata(
    hostname={host!r},
    node_id='c959e172e6c73845f77e02953c3a68cfadbdcf8e395bfb6c1b9366f6',
    node_ip='10.0.0.3',
    pid=23128,
  ),
)"""
DETAIL = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
EOF = (
    f"{DETAIL}Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) "
    "the process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the "
    "worker crashed unexpectedly due to SIGSEGV or another unexpected error. Consider enabling resource isolation"
)
MONITOR = """4 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.3, ID: ce) \
was 7.22GB used / 23.54GB limit (0.306693)
Selected to kill: (Actor(d08b): job ID=01, task name=RayTrainWorker.__init__, pid=23128, actual memory used=3.39GB)
Set max_restarts and max_task_retries to enable retry when the task crashes due to OOM."""
TERMINATED = f"{DETAIL}Worker exits unexpectedly by a signal. SystemExit is raised. The process receives a SIGTERM."
NODE = "The actor died because its node has died. Node Id: c959\n\tthe actor's node was terminated unexpectedly: health"
CRASHED = (
    "Fatal Python error: Segmentation fault\n\nThread 0x0 (most recent call first):\nExtension modules: a (total: 97)"
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a run of two workers on CPU."""
    config = make_config(storage_path=str(tmp_path), experiment_name="x", use_gpu=False, tp_size=1, dp_size=2)
    (config.run_dir / "logs").mkdir(parents=True)
    return config


def died(cause: Exception, host: str = "far") -> WorkerHealthCheckFailedError:
    """What Ray Train has of a worker that died."""
    return WorkerHealthCheckFailedError(INFO.format(host=host), cause)


@pytest.mark.parametrize("cause, log, said", [
    (RayActorError(error_msg=EOF), "", "was killed, perhaps as its node's memory was full; if so, take a smaller"),
    (RayActorError(error_msg=EOF), CRASHED, "crashed (Segmentation fault); the end of its log says where"),
    (RayActorError(error_msg=EOF), f"{CRASHED}\nof an earlier attempt", "was killed, perhaps as its node's memory"),
    (RayActorError(error_msg=TERMINATED), "", "was ended by SIGTERM, as a scheduler, a time limit or a person does it"),
    (RayActorError(error_msg=NODE), "", "was lost with its node; launch it again"),
    (OutOfMemoryError(MONITOR), "",
     "was killed by Ray, as its node's memory was full (7.22GB of 23.54GB used, 3.39GB by this worker); take a"),
    (ActorDiedError(), "", "died: The actor died unexpectedly before finishing this task; launch it again"),
])  # fmt: skip
def test_the_process_that_died_is_named(config: Config, cause: Exception, log: str, said: str) -> None:
    """Whatever its rank is: the others only lost their connections to it. And without Ray's advice to actors."""
    (config.run_dir / "logs/rank_1.log").write_text(log)
    with pytest.raises(launch.TrainingFailed) as caught, launch.follow(config, 9):
        raise WorkerGroupError("failed", {0: BROKEN, 1: died(cause)})
    message = str(caught.value)
    assert message.startswith(f"1 of 2 workers died; rank 1 (pid 23128 on node 10.0.0.3) {said}"), message
    assert message.endswith("\nIts log: " + str(config.run_dir / "logs/rank_1.log")) and message.count("\n") == 1
    assert "peer" not in message and "max_restarts" not in message and "isolation" not in message


def test_without_a_death_the_first_error_is_the_reason(config: Config) -> None:
    said = deaths.describe_failures({1: RuntimeError(""), 0: ValueError("a\nthe loss is not finite")}, config, 0)
    assert said.startswith("2 of 2 workers failed; rank 0: the loss is not finite\n")


@pytest.mark.parametrize("groups, files", [
    ("0::/job/step\n", {"memory.events": "oom 9\noom_kill 2\noom_group_kill 7\n", "job/memory.events": "oom_kill 1\n"}),
    ("4:memory:/job\n1:cpu:/\n0::/\n", {"memory/memory.oom_control": "under_oom 0\noom_kill 3\n"}),  # version 1
])  # fmt: skip
def test_the_kernel_s_count_says_more(
    config: Config, control_groups: Callable, groups: str, files: dict[str, str]
) -> None:
    """Of this machine; of others it knows nothing."""
    control_groups(groups, files)
    assert cgroups.out_of_memory_kills() == 3
    for host, before, by_kernel in (
        (socket.gethostname(), 2, True),
        (socket.gethostname(), 3, False),
        ("far", 2, False),
    ):
        said = deaths.describe_failures({1: died(RayActorError(error_msg=EOF), host)}, config, before)
        assert ("was killed by the kernel, as the memory of this machine or container was full" in said) == by_kernel


@pytest.mark.slow
def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """In a real run: rank 1 goes in mid-step, and rank 0 finds a broken connection."""

    def train_func(settings: dict) -> None:
        import threading

        from tp2d_helpers import train

        if ray.train.get_context().get_world_rank() == 1:
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            threading.Timer(10, kill).start()
        train.train_func(settings)

    config = make_config(model_name="demo", dataset_name="demo", use_gpu=False, tp_size=1, dp_size=2, seq_length=64,
                         batch_size_per_gpu=2, debug_steps=999, storage_path=str(tmp_path), max_failures=0)  # fmt: skip
    try:
        with pytest.raises(launch.TrainingFailed, match=r"rank 1 \(pid \d+ on node 127.0.0.1\) was killed, perhaps"):
            launch.launch(preflight(config), train_func)
    finally:
        ray.shutdown()
