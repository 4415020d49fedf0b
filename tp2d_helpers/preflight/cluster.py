"""The Ray cluster: what it has, and whether it has room for a run's workers."""

from __future__ import annotations

import collections
import itertools
import os
import platform
import socket
import time

import ray
from ray._private import state
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.planning.memory import Setting
from tp2d_helpers.planning.traffic import tp_bytes
from tp2d_helpers.preflight.connection import JOB
from tp2d_helpers.speed.devices import devices_in
from tp2d_helpers.training.elastic import groups_within, possible_dp_sizes

WORKERS_PER_CORE = 4  # on CPU: more of them would spend their time waiting for each other
RETURN_SECONDS = 1  # for cores that a run has just held, where there are enough without
PLACEMENT_SECONDS = 10  # for resources that are there; a run that has just ended gives its own back in less


def on_loopback() -> bool:
    """Whether no node is outside this machine, as of the Ray that `connect` starts."""
    return {node["NodeManagerAddress"] for node in alive()} == {"127.0.0.1"}


def loopback_variables() -> dict[str, str]:
    """What makes gloo and NCCL listen on the loopback interface: the workers' environment, if no node is outside it."""
    if not on_loopback():
        return {}
    interface = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: os.environ.get(name, interface) for name in names}


def alive() -> list[dict]:
    """The nodes that Ray has, as it describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def describe_cluster(resources: dict[str, float]) -> str:
    """The cluster's nodes, cores and GPUs, with their type where Ray knows it."""
    types = devices_in(resources)
    nodes = len(alive())
    number = int(resources.get("GPU", 0))
    gpus = f"{number} GPU{'s' * (number != 1)}" + (f" ({', '.join(types)})" if types else "")
    return f"{nodes} node{'s' * (nodes > 1)}, {resources.get('CPU', 0):g} CPU cores, {gpus}; {platform.machine()}"


def check_resources(config: Config, resources: dict[str, float], free: list[float] | None = None) -> dict[str, float]:
    """Resources of one worker: a GPU, or a core, or a share of one where there are fewer cores than workers.

    Args:
        resources: what the cluster has, held by others or not.
        free: cores of each node that nobody holds (`free_cores`); all, on one node, if it isn't given.

    Raises:
        ConfigError: if the cluster is too small. With `cluster_wait_seconds`, an autoscaling cluster gets that long
            to grow first.
    """
    need, gpus = config.num_workers, int(resources.get("GPU", 0))
    if not config.use_gpu:
        return {"CPU": _share_of_a_core(config, resources.get("CPU", 0.0), free)}
    worker = {"GPU": 1.0}  # and no core: nodes with few cores per GPU can be had
    if gpus < need and not _grows_to([worker] * need, config.cluster_wait_seconds):
        pairs = ", ".join(f"{tp} × {gpus // tp}" for tp in range(1, gpus + 1) if gpus % tp == 0)
        raise ConfigError(
            f"tp_size × dp_size = {config.tp_size} × {config.dp_size} = {need} GPUs, and the cluster has {gpus}"
            + (f"; with those, take {pairs}" if gpus else "; set use_gpu to False to train on CPU")
            + f". (Waited {config.cluster_wait_seconds} s for more: cluster_wait_seconds.)"
        )
    return worker


def _share_of_a_core(config: Config, cores: float, free: list[float] | None) -> float:
    """The largest share, up to a whole core, of which the nodes have room for all workers."""
    need, free = config.num_workers, [cores] if free is None else free
    # Ray counts in units of 1/10000.
    shares = {min(1.0, int(there / count * 10_000) / 10_000) for there in free for count in range(1, need + 1)}
    fitting = [share for share in shares if share and sum(int(there / share + 1e-6) for there in free) >= need]
    if not fitting or max(fitting) < 1 / WORKERS_PER_CORE:
        held = f" that are free of {cores:g}" if sum(free) < cores - 1e-6 else ""
        raise ConfigError(
            f"tp_size × dp_size = {config.tp_size} × {config.dp_size} = {need} workers on {sum(free):g} CPU cores"
            f"{held}: at most {int(WORKERS_PER_CORE * sum(free))} ({WORKERS_PER_CORE} per core) make sense"
            + (f". {who_holds()}" if held else "")
        )
    return max(fitting)


def free_cores(workers: int) -> list[float]:
    """Cores of each node that nobody holds. Those of a run that has just ended are waited for, if it needs them."""
    began = time.monotonic()
    while True:
        free = [node.get("CPU", 0.0) for node in state.available_resources_per_node().values()]
        enough = workers <= WORKERS_PER_CORE * sum(free)
        if sum(free) >= ray.cluster_resources().get("CPU", 0.0) - 1e-6:
            return free
        if time.monotonic() - began > (RETURN_SECONDS if enough else PLACEMENT_SECONDS):
            return free
        time.sleep(0.1)


def who_holds() -> str:
    """A sentence about who holds what isn't free: this job's own entrypoint, and what else runs on the cluster."""
    own = ray.get_runtime_context().get_job_id()
    running = [
        f"{job['Entrypoint']!r} (pid {job['DriverPid']} on {job['DriverIPAddress']})" for job in state.jobs()
        if not job["IsDead"] and job["JobID"] != own and "/ray/dashboard/" not in job["Entrypoint"]
    ]  # fmt: skip
    others = f"Other jobs on this cluster: {', '.join(running) or 'none'}. End them, or take fewer workers"
    mine = "This job's own entrypoint holds what it was submitted with (--entrypoint-num-cpus, -gpus, -resources). "
    return (mine if JOB in os.environ else "") + others


def check_placement(config: Config, worker: dict[str, float]) -> list[int]:
    """Ask Ray for the places of all workers, and give them back: Ray Train would wait for them without a word.

    Returns:
        Workers on each node that has any, in the order of their ranks: Ray Train numbers the workers node by node.

    Raises:
        ConfigError: if other jobs hold too much of the cluster, or its nodes can't be cut into such workers.
    """
    counts = _places([worker] * config.num_workers, max(PLACEMENT_SECONDS, config.cluster_wait_seconds))
    if not counts:
        free = ray.available_resources()
        raise ConfigError(
            f"tp_size × dp_size = {config.tp_size} × {config.dp_size} = {config.num_workers} workers of {worker}: "
            f"Ray has no place for them; free are {free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} CPU cores. "
            f"{who_holds()}"
        )
    return counts


def check_replicas(config: Config, worker: dict[str, float]) -> None:
    """Whether a run that may shrink has room for its fewest TP groups, each within a node: there it would wait in vain.

    Raises:
        ConfigError: if the nodes can't have that many, even with no other job on them.
    """
    nodes = [node["Resources"] for node in alive()]
    fewest, groups = possible_dp_sizes(config)[0], sum(groups_within(node, worker, config.tp_size) for node in nodes)
    if config.min_dp_size and groups < fewest:
        most = max(groups_within(node, worker, 1) for node in nodes)
        raise ConfigError(
            f"min_dp_size = {config.min_dp_size}: a run that may go on with fewer replicas keeps each TP group within "
            f"a node, and there the {len(nodes)} node{'s' * (len(nodes) > 1)} have room for {groups} of tp_size "
            f"{config.tp_size}, where it needs {fewest}. The largest node takes {most} workers: take a tp_size that "
            "divides that, or min_dp_size 0, with which TP groups may span nodes"
        )


def _grows_to(bundles: list[dict[str, float]], seconds: int) -> bool:
    return bool(seconds and _places(bundles, seconds))


def _places(bundles: list[dict[str, float]], seconds: float) -> list[int]:
    group = placement_group(bundles)  # the request that makes an autoscaler add nodes
    try:
        if not group.wait(seconds):
            return []
        nodes = placement_group_table(group)["bundles_to_node_id"]
        return list(collections.Counter(nodes[bundle] for bundle in sorted(nodes)).values())
    finally:
        remove_placement_group(group)


def describe_placement(config: Config, model: ModelFacts, counts: list[int]) -> list[tuple[str, str, str]]:
    """On several nodes, one row: workers per node, and whether each TP group lies within a node, or what it costs.

    Args:
        counts: what `check_placement` returned.
    """
    if len(alive()) == 1:
        return []
    found = f"{len(counts)} node{'s' * (len(counts) > 1)}: {' + '.join(map(str, counts))} workers"
    spanning = {end // config.tp_size for end in itertools.accumulate(counts) if end % config.tp_size}
    if not spanning:
        return [("nodes", found, "each TP group within a node")]
    setting = Setting.of(config.model_dump())
    once = "block_all_reduce" in setting.optimizations
    sent = tp_bytes(model, config.tp_size, setting.tokens, setting.width, once) * config.gradient_accumulation_steps
    groups = f"{len(spanning)} TP groups span" if len(spanning) > 1 else "1 TP group spans"
    cost = f"{groups} nodes: {sent / 1e6:,.1f} MB per step and worker travel between them"
    return [("nodes", found, f"{cost}; take a tp_size that divides the workers of a node")]
