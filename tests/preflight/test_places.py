"""A cluster of others: what its nodes, and the jobs on it, put into the environment. Each case was reported.

Two nodes (`two_nodes.py`) whose environment has the variables of other launchers, and drivers as `ray job submit`
starts them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from grid import ROOT
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from two_nodes import NODES, start_two, stop

from tp2d_helpers.preflight.connection import JOB

# Of mpirun under AzureML, torchrun and accelerate. The last two let all ranks but the first load no weights.
LAUNCHERS = {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_RANK": "3", "AZUREML_EXPERIMENT_ID": "a",
             "LOCAL_SIZE": "7", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
             "ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # fmt: skip
SETTINGS = dict(model_name="demo", dataset_name="demo", use_gpu=False, tp_size=2, dp_size=2, seq_length=64,
                batch_size_per_gpu=2, learning_rate=1e-3, debug_steps=2, log_interval=1, max_failures=0)  # fmt: skip
SOON = 60  # seconds: of 5 to 15 on a quiet machine; it was minutes, or for ever
DRIVER = """
import json, sys, time
sys.path[:0] = json.loads(sys.argv[1])
from tp2d_helpers.config import make_config
from tp2d_helpers.launch import launch
from tp2d_helpers.preflight.plan import preflight

settings, training = json.loads(sys.argv[2])


def train_func(config):
    import mine  # which the job brought
    from tp2d_helpers import train
    train.train_func(config)


began = time.monotonic()
try:
    plan = preflight(make_config(**settings))
    print(json.dumps(plan.resources_per_worker))
    if training:
        print(launch(plan, train_func).error)
except (ValueError, RuntimeError) as error:
    print(error)
print(time.monotonic() - began)
"""


@pytest.fixture(scope="module")
def drive() -> Iterator[Callable[..., tuple[list[str], float]]]:
    """drive(training, **environment): what a driver on two nodes prints, and its seconds without imports."""
    with tempfile.TemporaryDirectory(prefix="tp2d-") as name:
        folder, nodes = Path(name), []
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS", JOB)}
        kept |= {"RAY_AUTH_MODE": "disabled", "TP2D_LOG": str(folder / "log")}
        (folder / "driver.py").write_text(DRIVER)
        (folder / "run").write_text("import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)")

        def driver(training: bool, above: str = "", **environment: str) -> tuple[list[str], float]:
            settings = SETTINGS | {"storage_path": str(folder / "runs")}
            paths = [str(ROOT), str(ROOT / "tests")]
            command = [sys.executable, "driver.py", json.dumps(paths), json.dumps([settings, training])]
            if above:  # a process that calls itself "uv run", and starts the driver
                command = [above, "run", *command]
            ran = subprocess.run(command, executable=sys.executable, env=kept | {"RAY_ADDRESS": address} | environment,
                                 cwd=folder, capture_output=True, text=True, timeout=300)  # fmt: skip
            assert ran.returncode == 0, ran.stderr
            *printed, seconds = ran.stdout.splitlines()
            return printed, float(seconds)

        try:
            address = start_two(folder, kept | LAUNCHERS, [], nodes)
            driver.address, driver.nodes, driver.folder = address, nodes, folder
            yield driver
        finally:
            for node in reversed(nodes):
                stop(node)


EACH_A_CORE = '{"CPU": 1.0}'


def submitted(**runtime_env: Any) -> dict[str, str]:
    """What `ray job submit` sets for the driver of a job with such a runtime_env."""
    return {JOB: json.dumps({"runtime_env": runtime_env, "metadata": {}})}


@pytest.mark.slow
def test_other_launchers_and_what_a_job_brings(drive: Callable) -> None:
    """Nodes that mpirun started, and a job with modules, a folder and variables of its own."""
    for name in ("modules/mine", "work"):
        (drive.folder / name).mkdir(parents=True)
    (drive.folder / "modules/mine/__init__.py").touch()
    job = submitted(py_modules=[str(drive.folder / "modules/mine")], working_dir=str(drive.folder / "work"),
                    env_vars={"TP2D_OF_THE_JOB": "1"})  # fmt: skip
    printed, _ = drive(True, **job)
    assert printed[-1] == "None", printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_an_interface_that_nodes_do_not_have(drive: Callable, name: str) -> None:
    [said], seconds = drive(False, **submitted(env_vars={name: "eth77"}))
    nodes = [f"node {node}: {name} = 'eth77': there is no such interface, but " for node in NODES]
    assert said.startswith(tuple(nodes)) and seconds < SOON, said


@pytest.mark.slow
def test_a_python_that_is_not_there(drive: Callable) -> None:
    [said], seconds = drive(False, **submitted(py_executable="/no/such/python"))
    assert "py_executable = '/no/such/python' (by the job's runtime_env)" in said and seconds < SOON, said
    assert "or name a Python with the driver's" in said
    assert drive(False, **submitted(py_executable=sys.executable))[0] == [EACH_A_CORE]


@pytest.mark.slow
def test_under_uv_run(drive: Callable) -> None:
    """With the variable that the refusal names, workers have the nodes' Python. And "auto" is resolved."""
    auto = {"RAY_ADDRESS": "auto", "RAY_TMPDIR": str(drive.folder)}
    [said], seconds = drive(False, "uv", **auto)
    assert "set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 and start Python again" in said and seconds < SOON, said
    assert drive(False, "uv", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0", **auto)[0] == [EACH_A_CORE]


@pytest.mark.slow
def test_cores_that_others_hold(drive: Callable) -> None:
    """Half of them, on one node; then nearly all. The holder is named."""
    hold = """
import ray, sys, time
ray.init(log_to_driver=False)
ray.get(ray.util.placement_group([{"CPU": float(sys.argv[1])}] * int(sys.argv[2])).ready())
print("held", flush=True)
time.sleep(99)
"""
    for size, count, expected in (
        ("2", "1", '{"CPU": 0.5}'),
        ("0.9", "4", "= 4 workers on 0.4 CPU cores that are free"),
    ):
        environment = os.environ | {"RAY_ADDRESS": drive.address, "RAY_AUTH_MODE": "disabled"}
        holder = subprocess.Popen([sys.executable, "-c", hold, size, count], env=environment, stdout=subprocess.PIPE)
        try:
            assert holder.stdout.readline() == b"held\n"
            [said], seconds = drive(False)
        finally:
            holder.kill()
            holder.wait()
        assert expected in said, said
    assert drive(False)[0] == [EACH_A_CORE]
    assert f"(pid {holder.pid} on {NODES[0]})" in said and "End them, or take fewer workers" in said and seconds < SOON


@pytest.mark.slow
@pytest.mark.parametrize("by", ["auto", "address"])
def test_a_cluster_of_another_ray(drive: Callable, by: str) -> None:
    """It says so, for a moment."""
    from ray._common.usage.usage_lib import get_cluster_metadata

    client = GcsClient(address=drive.address)
    true = get_cluster_metadata(client)

    def change(found: dict[str, Any]) -> None:
        client.internal_kv_put(b"CLUSTER_METADATA", json.dumps(found).encode(), True, b"cluster")

    change(true | {"ray_version": "2.9.3", "python_version": "3.9.1"})
    try:
        [said], seconds = drive(
            False, RAY_ADDRESS="auto" if by == "auto" else drive.address, RAY_TMPDIR=f"{drive.folder}"
        )
    finally:
        change(true)
    assert "the cluster has Ray 2.9.3 on Python 3.9.1, and here it is Ray " + ray.__version__ in said, said
    assert drive.address in said and seconds < SOON


@pytest.mark.slow
def test_a_node_alone_and_a_head_that_was_killed(drive: Callable) -> None:
    """Of one node, too, the interfaces are looked at. Of a head that doesn't answer, nothing is."""
    stop(drive.nodes.pop())
    client, end = GcsClient(address=drive.address), time.monotonic() + 60
    while sum(node.state == GcsNodeInfo.ALIVE for node in client.get_all_node_info().values()) > 1:
        assert time.monotonic() < end, "the cluster counts a node that is gone"
        time.sleep(0.2)
    [said], seconds = drive(False, **submitted(env_vars={"GLOO_SOCKET_IFNAME": "eth77"}))
    assert said.startswith(f"node {NODES[0]}: GLOO_SOCKET_IFNAME = 'eth77'") and seconds < SOON, said
    stop(drive.nodes.pop())
    [said], seconds = drive(False)
    assert "no Ray cluster answers there (Connect" in said and drive.address in said and seconds < SOON, said
