"""The notebook's launch on a Ray cluster of two nodes, and what the Ray that `connect` starts opens to the network.

The two nodes are on this machine, with addresses and, where the system permits it, folders of their own: the second
one sees neither the driver's cache nor what is in `own`. The driver is a process of its own, in a folder from which the
helpers can't be imported.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from grid import ROOT, run_grid
from two_nodes import NODES, start_two, stop

from tp2d_helpers.config import Config, make_config
from tp2d_helpers.demo import demo_model
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.preflight import cluster as ray_cluster
from tp2d_helpers.preflight.plan import preflight
from tp2d_helpers.training.metrics import read_metrics

SETTINGS = dict(model_name="demo", dataset_name="demo", use_gpu=False, tp_size=2, dp_size=2, seq_length=64,
                batch_size_per_gpu=2, learning_rate=1e-3, debug_steps=4, log_interval=1,
                max_failures=0)  # fmt: skip
SECRETS = {"HF_TOKEN": "hf_secretsecret", "HUGGING_FACE_HUB_TOKEN": "hf_oldsecret", "WANDB_API_KEY": "wandbsecret",
           "AWS_SECRET_ACCESS_KEY": "awssecret", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # fmt: skip
SECONDS = 300  # for the driver, which takes a minute
DRIVER = """
import json, os, shutil, sys
sys.path[:0] = sys.argv[1:3]  # of this process alone: Ray tells its workers where the script is, and not this
from tp2d_helpers.config import ConfigError, make_config
from tp2d_helpers.demo import demo_model
from tp2d_helpers.launch import launch
from tp2d_helpers.preflight.plan import preflight

settings, found = json.loads(sys.argv[3]), {}
storage, own = settings.pop("storage_path"), settings.pop("own")
shutil.copytree(demo_model(), own + "/model")
for name, change in {"storage_path": {"storage_path": own + "/runs"},
                     "model_name": {"storage_path": storage, "model_name": own + "/model"}}.items():
    try:
        preflight(make_config(**{**settings, **change}))
    except ConfigError as error:
        found[name] = str(error)
found["left"] = os.listdir(own) + [os.path.exists(storage)]
across = make_config(**{**settings, "tp_size": 4, "dp_size": 1}, storage_path=storage, experiment_name="across")
found["across"] = preflight(across).rows


def train_func(config):
    import ray, tp2d_helpers
    from tp2d_helpers import train
    run_dir = train.Path(config["storage_path"], config["experiment_name"])
    rank = ray.train.get_context().get_world_rank()
    run_dir.mkdir(parents=True, exist_ok=True)
    place = [tp2d_helpers.__file__, ray.util.get_node_ip_address(), sys.path, os.environ.get("PYTHONPATH", "")]
    (run_dir / f"place_{rank}.json").write_text(json.dumps(place))
    train.train_func(config)


plan = preflight(make_config(**settings, storage_path=storage, experiment_name="two_nodes"))
found["rows"], found["variables"] = plan.rows, plan.worker_runtime_env["env_vars"]
found["error"] = str(launch(plan, train_func).error)
print(json.dumps(found))
"""


CONNECT = """
from tp2d_helpers.preflight import connection
try:
    connection.connect()
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Of the cluster; a short path, since Ray keeps sockets in it."""
    with tempfile.TemporaryDirectory(prefix="tp2d-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def can_hide(folder: Path) -> bool:
    """May this user give a process its own view of the file system?"""
    (folder / "mount").mkdir()
    if not shutil.which("unshare"):
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(folder / "mount")]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def run(folder: Path, can_hide: bool) -> Iterator[SimpleNamespace]:
    """What the driver found on the two nodes, and the run that it left."""
    cache, own = folder / "cache", folder / "own"
    for path in (cache, own, folder / "elsewhere"):
        path.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    # With its own token, whatever Ray an earlier test started, and whatever token the user has.
    kept |= SECRETS | {"RAY_AUTH_MODE": "token", "TP2D_CACHE": str(cache), "TP2D_LOG": str(folder / "log")}
    nodes = []
    try:
        address = start_two(folder, kept, [cache, own] if can_hide else [], nodes)
        without = {name: value for name, value in kept.items() if "RAY_AUTH" not in name}
        without |= {"RAY_ADDRESS": address, "HOME": str(folder / "elsewhere"), "PYTHONPATH": str(ROOT)}
        stranger = subprocess.run([sys.executable, "-c", CONNECT], env=without, capture_output=True, text=True)
        (folder / "elsewhere" / "driver.py").write_text(DRIVER)
        settings = SETTINGS | {"storage_path": str(folder / "runs"), "own": str(own)}
        command = [sys.executable, "driver.py", str(ROOT), str(ROOT / "tests"), json.dumps(settings)]
        environment = kept | {"RAY_ADDRESS": address}
        driver = subprocess.run(command, cwd=folder / "elsewhere", env=environment, capture_output=True, text=True,
                                timeout=SECONDS)  # fmt: skip
        assert driver.returncode == 0, driver.stdout + driver.stderr
        run_dir = folder / "runs" / "two_nodes"
        places = [json.loads((run_dir / f"place_{rank}.json").read_text()) for rank in range(4)]
        found = json.loads(driver.stdout.splitlines()[-1])
        yield SimpleNamespace(dir=run_dir, places=places, found=found, output=driver.stdout + driver.stderr,
                              stranger=stranger)  # fmt: skip
    finally:
        for node in reversed(nodes):
            stop(node)


@pytest.mark.slow
def test_two_nodes_train_as_one_machine(run: SimpleNamespace) -> None:
    assert run.found["error"] == "None"
    recorded = json.loads((run.dir / "config.json").read_text())
    settled = {name: value for name, value in recorded.items() if name in Config.model_fields}
    twin = make_config(**settled).change(experiment_name="twin")
    run_grid(twin.model_dump())
    now, then = (read_metrics(path / "metrics.jsonl") for path in (run.dir, twin.run_dir))
    assert [record["step"] for record in then] == [1, 2, 3, 4]
    assert list(run.dir.glob("checkpoint_00000004/**/*.pt"))
    for name in ("step", "loss", "grad_norm", "learning_rate", "tokens"):
        assert [record[name] for record in now] == pytest.approx([record[name] for record in then], rel=1e-6), name


@pytest.mark.slow
def test_without_the_token_it_is_told(run: SimpleNamespace) -> None:
    """With it, as the message says, the run above was made."""
    assert run.stranger.stdout.strip().endswith("needs RAY_AUTH_MODE=token and the token here, too."), run.stranger


@pytest.mark.slow
def test_each_tp_group_is_on_one_node(run: SimpleNamespace) -> None:
    addresses = [place[1] for place in run.places]
    assert addresses[0] == addresses[1] != addresses[2] == addresses[3] and set(addresses) == set(NODES)
    rows = {what: (found, chosen) for what, found, chosen in run.found["rows"]}
    assert rows["nodes"] == ("2 nodes: 2 + 2 workers", "each TP group within a node")
    assert rows["storage"][0].startswith("writable, shared by 2 nodes, ")  # and what is free
    # Each node has loopback addresses of its own here; on others, an interface named for the workers would be wrong.
    assert not [name for name in run.found["variables"] if name.endswith("IFNAME")]


@pytest.mark.slow
def test_a_tp_group_that_spans_nodes_is_told(run: SimpleNamespace) -> None:
    found, chosen = next(row[1:] for row in run.found["across"] if row[0] == "nodes")
    # 2·3/4 · 4 bytes · 2·64 tokens · 128 · (4 layers · (2 forward + 2 backward) + 2) all-reduces
    assert found == "2 nodes: 2 + 2 workers" and chosen.startswith("1 TP group spans nodes: 1.8 MB per step and worker")
    assert chosen.endswith("take a tp_size that divides the workers of a node")


@pytest.mark.parametrize("counts, spanning", [
    ([3, 1], "1 TP group spans"), ([1, 2, 1], "2 TP groups span"), ([1, 3], "1 TP group spans"), ([2, 2], None),
    ([4], None),
])  # fmt: skip
def test_tp_groups_that_span_nodes(monkeypatch: pytest.MonkeyPatch, counts: list[int], spanning: str | None) -> None:
    monkeypatch.setattr(ray_cluster, "alive", lambda: [{}, {}])
    config = make_config(**SETTINGS).change(model_name=str(demo_model()), gradient_accumulation_steps=2)
    [(_, found, chosen)] = ray_cluster.describe_placement(config, ModelFacts.read(config.model_name), counts)
    assert found.endswith(f": {' + '.join(map(str, counts))} workers")
    assert chosen.startswith(f"{spanning} nodes: 2.4 MB" if spanning else "each TP group within a node")


@pytest.mark.slow
def test_the_helpers_travel(run: SimpleNamespace) -> None:
    """Every worker imports them from what Ray unpacked on its node: nothing else leads to them."""
    for file, _, path, variable in run.places:
        assert "/runtime_resources/py_modules_files/" in file and not Path(file).is_relative_to(ROOT)
        assert str(ROOT) not in [*path, *variable.split(os.pathsep)]


@pytest.mark.slow
def test_storage_that_is_not_shared(run: SimpleNamespace, can_hide: bool, folder: Path) -> None:
    if not can_hide:
        pytest.skip("needs a node with its own view of the file system: unshare -m, mount")
    assert run.found["storage_path"] == (
        f"storage_path = '{folder}/own/runs': not shared: node {NODES[1]} does not see the file that the driver "
        "wrote there; take a folder that all nodes mount"
    )
    assert run.found["left"] == ["model", False]


@pytest.mark.slow
def test_model_that_is_on_one_node(run: SimpleNamespace, can_hide: bool, folder: Path) -> None:
    if not can_hide:
        pytest.skip("needs a node with its own view of the file system: unshare -m, mount")
    assert run.found["model_name"].startswith(f"model_name = '{folder}/own/model': not shared: node {NODES[1]} ")


@pytest.mark.slow
def test_no_secret_is_left(run: SimpleNamespace) -> None:
    """Not in logs, settings, metrics or checkpoints; the environment of the driver and of all workers had them."""
    files = [path for path in run.dir.rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl", "rank_0.log"} <= {path.name for path in files}
    for path in files:
        held = [name for name, secret in SECRETS.items() if secret.encode() in path.read_bytes()]
        assert not held, f"{path} has {held}"
    assert not [name for name, secret in SECRETS.items() if secret in run.output]


def member() -> type:
    """The class of a worker with a process group as Ray Train makes it; local, so that it travels whole."""

    class Member:
        def rendezvous(self) -> tuple[str, int]:
            with socket.socket() as probe:
                probe.bind(("", 0))
                return ray.util.get_node_ip_address(), probe.getsockname()[1]

        def join(self, rank: int, address: str, port: int) -> None:
            import torch.distributed as dist

            dist.init_process_group("gloo", f"tcp://{address}:{port}", rank=rank, world_size=2)
            dist.barrier()

    return Member


def test_ray_of_this_machine_listens_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config, others = make_config(**SETTINGS | {"dp_size": 1}, storage_path=str(tmp_path)), family()
    try:
        plan = preflight(config)
        assert "nodes" not in [what for what, *_ in plan.rows]
        remote = ray.remote(num_cpus=0.5, runtime_env=plan.worker_runtime_env)(member())
        members = [remote.remote() for _ in range(2)]
        address, port = ray.get(members[0].rendezvous.remote(), timeout=60)
        ray.get([member.join.remote(rank, address, port) for rank, member in enumerate(members)], timeout=60)
        processes = family() - others | {os.getpid()}
        listening = [
            connection for connection in psutil.net_connections("inet")
            if connection.pid in processes and connection.status == psutil.CONN_LISTEN
        ]  # fmt: skip
        assert len(listening) >= 8, "of GCS, raylet, driver and two workers with gloo's pairs"
        outside = [connection for connection in listening if not is_loopback(connection.laddr.ip)]
        # PyTorch's TCPStore, where the ranks meet, has no setting for the address that it binds to.
        assert {connection.laddr.port for connection in outside} <= {port}, outside
        assert plan.worker_runtime_env["env_vars"]["GLOO_SOCKET_IFNAME"] == "lo"
    finally:
        ray.shutdown()


def family() -> set[int]:
    """The processes that this one started, and theirs."""
    return {process.pid for process in psutil.Process().children(recursive=True)}


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback
