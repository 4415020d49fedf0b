"""Ray nodes as `ray start` makes them, with addresses of their own on this machine."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = ("127.0.0.2", "127.0.0.3")  # the head is the first


def start_node(*arguments: str, environment: dict[str, str], hidden: list[Path]) -> subprocess.Popen:
    """`ray start`, in a mount namespace of its own in which the `hidden` folders are empty."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=2", "--num-gpus=0",
               "--object-store-memory=100000000", "--disable-usage-stats", *arguments]  # fmt: skip
    if hidden:
        mounts = "".join(f"mount -t tmpfs none {folder} && " for folder in hidden)
        command = ["unshare", "-m", "sh", "-c", mounts + 'exec "$@"', "sh", *command]
    with open(environment["TP2D_LOG"], "a") as log:
        return subprocess.Popen(command, env=environment, cwd="/", stdout=log, stderr=log, start_new_session=True)


def stop(node: subprocess.Popen) -> None:
    """Kill a node and all of its processes, those that Ray puts into sessions of their own included."""
    processes = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
    for process in [node, *processes]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait(20)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((NODES[0], 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((NODES[0], port)) == 0


def wait_for(condition: Callable[[], bool], seconds: float, node: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert node.poll() is None and time.monotonic() < end, f"no node within {seconds} s:\n{log.read_text()}"
        time.sleep(0.1)


def start_two(folder: Path, environment: dict[str, str], hidden: list[Path], nodes: list[subprocess.Popen]) -> str:
    """Start a head and another node, add them to `nodes` at once, and return the address of the cluster."""
    log, port = Path(environment["TP2D_LOG"]), free_port()
    head = ["--head", f"--port={port}", f"--temp-dir={folder}/ray", "--include-dashboard=false"]
    nodes.append(start_node(*head, f"--node-ip-address={NODES[0]}", environment=environment, hidden=[]))
    wait_for(lambda: answers(port), 60, nodes[0], log)
    join = [f"--address={NODES[0]}:{port}", f"--node-ip-address={NODES[1]}"]
    nodes.append(start_node(*join, environment=environment, hidden=hidden))
    wait_for(lambda: log.read_text().count("Ray runtime started") == 2, 60, nodes[1], log)
    return f"{NODES[0]}:{port}"
