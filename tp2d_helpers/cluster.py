"""The Ray cluster: connect to it, say what it has, find out whether it has room for a run's workers."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path

import ray
from ray.util.placement_group import placement_group, remove_placement_group

import tp2d_helpers
from tp2d_helpers.config import Config, ConfigError

WORKERS_PER_CORE = 4  # on CPU: more of them would spend their time waiting for each other
PLACEMENT_SECONDS = 10  # for resources that are there; a run that has just ended gives its own back in less


def connect() -> dict[str, float]:
    """Connect to the Ray cluster there is (`RAY_ADDRESS`), or start one here; return its resources.

    Worker logs are not sent to the notebook: every worker has a log file. The helpers travel to all nodes.

    Raises:
        ConfigError: if nothing answers at `RAY_ADDRESS`. Ray itself would go on asking for more than five minutes.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address, package = os.environ.get("RAY_ADDRESS", ""), str(Path(tp2d_helpers.__file__).parent)
        # The package's parent is on the local workers' path already; py_modules serves the other nodes.
        env = {"py_modules": [package]} if address else {}
        try:
            _knock(address)
            ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=env, include_dashboard=False)
        except OSError as error:
            if not address:
                raise
            raise ConfigError(
                f"RAY_ADDRESS = {address!r}: no Ray cluster answers there ({str(error).splitlines()[0]}); "
                "start one, or unset RAY_ADDRESS to use this machine alone"
            ) from error
    return ray.cluster_resources()


def _knock(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # and not "auto" or "local"
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def describe_cluster(resources: dict[str, float]) -> str:
    """The cluster's nodes, cores and GPUs, with their type where Ray knows it."""
    types = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    nodes = sum(node["Alive"] for node in ray.nodes())
    gpus = f"{int(resources.get('GPU', 0))} GPUs" + (f" ({', '.join(types)})" if types else "")
    return f"{nodes} node{'s' * (nodes > 1)}, {resources.get('CPU', 0):g} CPU cores, {gpus}; {platform.machine()}"


def check_resources(config: Config, resources: dict[str, float]) -> dict[str, float]:
    """Resources of one worker: a GPU, or a core, or a share of one where there are fewer cores than workers.

    Raises:
        ConfigError: if the cluster is too small. With `cluster_wait_seconds`, an autoscaling cluster gets that long
            to grow first.
    """
    need, gpus, cpus = config.num_workers, int(resources.get("GPU", 0)), resources.get("CPU", 0)
    if not config.use_gpu:
        if need > WORKERS_PER_CORE * cpus:
            raise ConfigError(
                f"tp_size × dp_size = {config.tp_size} × {config.dp_size} = {need} workers on {cpus:g} CPU cores: "
                f"at most {int(WORKERS_PER_CORE * cpus)} ({WORKERS_PER_CORE} per core) make sense"
            )
        return {"CPU": min(1.0, int(cpus / need * 10_000) / 10_000)}  # Ray counts in units of 1/10000
    worker = {"GPU": 1.0}  # and no core: nodes with few cores per GPU can be had
    if gpus < need and not _grows_to([worker] * need, config.cluster_wait_seconds):
        pairs = ", ".join(f"{tp} × {gpus // tp}" for tp in range(1, gpus + 1) if gpus % tp == 0)
        raise ConfigError(
            f"tp_size × dp_size = {config.tp_size} × {config.dp_size} = {need} GPUs, and the cluster has {gpus}"
            + (f"; with those, take {pairs}" if gpus else "; set use_gpu to False to train on CPU")
            + f". (Waited {config.cluster_wait_seconds} s for more: cluster_wait_seconds.)"
        )
    return worker


def check_placement(config: Config, worker: dict[str, float]) -> None:
    """Ask Ray for the places of all workers, and give them back: Ray Train would wait for them without a word.

    Raises:
        ConfigError: if other jobs hold too much of the cluster, or its nodes can't be cut into such workers.
    """
    if not _grows_to([worker] * config.num_workers, max(PLACEMENT_SECONDS, config.cluster_wait_seconds)):
        free = ray.available_resources()
        raise ConfigError(
            f"tp_size × dp_size = {config.tp_size} × {config.dp_size} = {config.num_workers} workers of {worker}: "
            f"Ray has no place for them; free are {free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} CPU cores. "
            "End other jobs on this cluster, or take fewer workers."
        )


def _grows_to(bundles: list[dict[str, float]], seconds: int) -> bool:
    if seconds == 0:
        return False
    group = placement_group(bundles)  # the request that makes an autoscaler add nodes
    try:
        return group.wait(seconds)
    finally:
        remove_placement_group(group)
