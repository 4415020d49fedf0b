"""The Ray cluster: what it has, and whether it has room for a run's workers."""

from __future__ import annotations

import collections
import importlib
import importlib.metadata
import itertools
import os
import platform
import socket
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tp2d_helpers.cache import cache_dir
from tp2d_helpers.config import Config, ConfigError, reason
from tp2d_helpers.data.files import paths_of
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.planning.memory import Setting
from tp2d_helpers.planning.traffic import tp_bytes
from tp2d_helpers.preflight.checks import OLDEST
from tp2d_helpers.preflight.connection import patience
from tp2d_helpers.preflight.gpus import trial
from tp2d_helpers.speed.devices import devices_in
from tp2d_helpers.training.elastic import groups_within, possible_dp_sizes

WORKERS_PER_CORE = 4  # on CPU: more of them would spend their time waiting for each other
PLACEMENT_SECONDS = 10  # for resources that are there; a run that has just ended gives its own back in less
ANSWER_SECONDS = 30  # for a node to start a process and look at the storage
SIGHT_SECONDS = 3  # for a file to appear on another node of a network storage


def loopback_variables() -> dict[str, str]:
    """What makes gloo and NCCL listen on the loopback interface: the workers' environment, if no node is outside it."""
    if {node["NodeManagerAddress"] for node in _alive()} != {"127.0.0.1"}:
        return {}
    interface = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: os.environ.get(name, interface) for name in names}


def _alive() -> list[dict]:
    return [node for node in ray.nodes() if node["Alive"]]


def describe_cluster(resources: dict[str, float]) -> str:
    """The cluster's nodes, cores and GPUs, with their type where Ray knows it."""
    types = devices_in(resources)
    nodes = len(_alive())
    number = int(resources.get("GPU", 0))
    gpus = f"{number} GPU{'s' * (number != 1)}" + (f" ({', '.join(types)})" if types else "")
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
            "End other jobs on this cluster, or take fewer workers."
        )
    return counts


def check_replicas(config: Config, worker: dict[str, float]) -> None:
    """Whether a run that may shrink has room for its fewest TP groups, each within a node: there it would wait in vain.

    Raises:
        ConfigError: if the nodes can't have that many, even with no other job on them.
    """
    nodes = [node["Resources"] for node in _alive()]
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
    if len(_alive()) == 1:
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


def check_nodes(config: Config, probe: Path) -> str:
    """Let each node that may get workers look for the driver's file `probe`, and for local models and data.

    Each compares its libraries with the driver's, looks at its environment and writes a file beside the probe, too,
    and builds the demo's model if it hasn't yet. Meanwhile those with GPUs try one (`trial`), also a cluster's only
    node.

    Returns:
        What was found, in words; nothing for a cluster of one node.

    Raises:
        ConfigError: with the first node that lacks something, or says nothing for `ANSWER_SECONDS` (more, if it
            installs packages first).
    """
    nodes = _alive()
    with trial(nodes if config.use_gpu else []) as refuse:
        found = _check_shared(config, probe) if len(nodes) > 1 else ""
        refuse()
    return found


def _check_shared(config: Config, probe: Path) -> str:
    paths = {"storage_path": [str(probe)], "model_name": [config.model_name] * Path(config.model_name).is_absolute()}
    for name in ("dataset_name", "eval_dataset_name"):
        paths[name] = [str(path) for path in paths_of(getattr(config, name))]
    look, demo, tasks = _look(), Path(config.model_name).parent == cache_dir(), {}
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in OLDEST}  # the build may differ
    for node in _alive():
        if node["Resources"].get("GPU" if config.use_gpu else "CPU"):
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task, own = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(look), f"{probe}-{len(tasks)}"
            tasks[task.remote(paths, SIGHT_SECONDS, own, demo, versions)] = (node["NodeManagerAddress"], own)
    seconds = patience(ANSWER_SECONDS)
    answered, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=seconds)
    silent = ("storage_path", f"has not said within {seconds} s what it sees there")
    for task, (address, own) in tasks.items():
        name, trouble = _answer(task) if task in answered else silent
        if not name:
            raise ConfigError(f"node {address}: {trouble}")
        if not trouble and look({name: [own]}, SIGHT_SECONDS)[1]:
            trouble = "wrote a file there that the driver does not see"
        if trouble:
            found = f"{name} = {getattr(config, name)!r}: not shared: node {address} {trouble}"
            raise ConfigError(f"{found}; take a folder that all nodes mount")
    return f", shared by {len(tasks)} node{'s' * (len(tasks) > 1)}"


def _answer(task: ray.ObjectRef) -> tuple[str, str]:
    """What a node's `look` returned, or what became of it."""
    try:
        return ray.get(task)
    except ray.exceptions.RuntimeEnvSetupError as error:
        last = str(error).strip().splitlines()[-1]
        return "", f"can't make ray.init's runtime_env ({last}); see runtime_env_agent.log in Ray's logs there"
    except ray.exceptions.RayError as error:
        return "storage_path", f"can't look there ({reason(error)})"


def _look() -> Callable[..., tuple[str, str]]:
    """The task of `check_nodes`, a local function: it travels whole, and no node imports PyTorch to find a file."""
    cure = (
        "install requirements.txt there, or let Ray bring what is missing, before preflight: "
        'ray.init(runtime_env={"pip": "requirements.txt", "py_modules": ["tp2d_helpers"]})'
    )

    def look(
        paths: dict[str, list[str]], seconds: float, own: str = "", demo: bool = False, versions: dict | None = None
    ) -> tuple[str, str]:
        """(parameter at fault, why): what this node doesn't see of `paths` within `seconds`; "" if all is well.

        No parameter, if it is the node's environment.
        """
        try:
            for name, wanted in (versions or {}).items():
                if (found := importlib.metadata.version(name)).partition("+")[0] != wanted:
                    return "", f"has {name} {found}, and the driver {wanted}; {cure}"
            if own:
                importlib.import_module("tp2d_helpers.preflight.environment").check_environment()
        except ModuleNotFoundError as error:  # also of `version`
            return "", f"lacks {error.name}; {cure}"
        except ValueError as error:
            return "", str(error)
        if demo and not Path(*paths["model_name"]).exists():
            importlib.import_module("tp2d_helpers.demo").demo_model()
        end = time.monotonic() + seconds
        for name, path in [(name, path) for name, several in paths.items() for path in several]:
            while not Path(path).exists():
                if time.monotonic() > end:
                    what = "the file that the driver wrote there" if name == "storage_path" else "it"
                    return name, f"does not see {what}"
                time.sleep(0.1)
        try:
            if own:
                Path(own).touch()
        except OSError as error:
            return "storage_path", f"can't write there ({error.strerror})"
        return "storage_path", ""

    return look
