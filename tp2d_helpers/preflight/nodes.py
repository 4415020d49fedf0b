"""What each node of the cluster says: of the storage, the models and data, its libraries and its environment."""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tp2d_helpers.cache import cache_dir
from tp2d_helpers.config import Config, ConfigError, reason
from tp2d_helpers.data.files import paths_of
from tp2d_helpers.preflight.checks import OLDEST
from tp2d_helpers.preflight.cluster import alive, on_loopback
from tp2d_helpers.preflight.connection import patience
from tp2d_helpers.preflight.environment import check_interfaces
from tp2d_helpers.preflight.gpus import trial

ANSWER_SECONDS = 30  # for a node to start a process and look at the storage
SIGHT_SECONDS = 3  # for a file to appear on another node of a network storage


def check_environments(config: Config) -> None:
    """Let each node that may get workers compare its libraries with the driver's, and look at its environment.

    Raises:
        ConfigError: with the first node that lacks something, or says nothing for `ANSWER_SECONDS` (more, if it
            installs packages first).
    """
    if on_loopback():  # this machine and its environment, to which the driver's interfaces are added
        return check_interfaces()
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in OLDEST}  # the build may differ
    nodes, compare = _with_workers(config), _compare()
    answers = _answers([_start(node, compare, versions) for node in nodes], "what it has")
    for node, (name, trouble) in zip(nodes, answers, strict=True):
        if name or trouble:
            raise ConfigError(f"node {node['NodeManagerAddress']}: {trouble}")


def check_nodes(config: Config, probe: Path) -> str:
    """Let each node that may get workers look for the driver's file `probe`, and for local models and data.

    Each writes a file beside the probe, too, and builds the demo's model if it hasn't yet. Meanwhile those with GPUs
    try one (`trial`), also a cluster's only node.

    Returns:
        What was found, in words; nothing for a cluster of one node.

    Raises:
        ConfigError: with the first node that doesn't see something, or says nothing for `ANSWER_SECONDS`.
    """
    nodes = alive()
    with trial(nodes if config.use_gpu else []) as refuse:
        found = _check_shared(config, probe) if len(nodes) > 1 else ""
        refuse()
    return found


def _check_shared(config: Config, probe: Path) -> str:
    paths = {"storage_path": [str(probe)], "model_name": [config.model_name] * Path(config.model_name).is_absolute()}
    for name in ("dataset_name", "eval_dataset_name"):
        paths[name] = [str(path) for path in paths_of(getattr(config, name))]
    look, demo, nodes = _look(), Path(config.model_name).parent == cache_dir(), _with_workers(config)
    own = [f"{probe}-{number}" for number in range(len(nodes))]
    tasks = [_start(node, look, paths, SIGHT_SECONDS, file, demo) for node, file in zip(nodes, own, strict=True)]
    for node, file, (name, trouble) in zip(nodes, own, _answers(tasks, "what it sees there"), strict=True):
        if not trouble and look({name: [file]}, SIGHT_SECONDS)[1]:
            trouble = "wrote a file there that the driver does not see"
        if trouble:
            found = f"{name} = {getattr(config, name)!r}: not shared: node {node['NodeManagerAddress']} {trouble}"
            raise ConfigError(f"{found}; take a folder that all nodes mount")
    return f", shared by {len(nodes)} node{'s' * (len(nodes) > 1)}"


def _with_workers(config: Config) -> list[dict]:
    return [node for node in alive() if node["Resources"].get("GPU" if config.use_gpu else "CPU")]


def _start(node: dict, function: Callable, *arguments: object) -> ray.ObjectRef:
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(function).remote(*arguments)


def _answers(tasks: list[ray.ObjectRef], asked: str) -> list[tuple[str, str]]:
    """What each task returned, or what became of it: (parameter at fault, why)."""
    seconds = patience(ANSWER_SECONDS)
    answered, _ = ray.wait(tasks, num_returns=len(tasks), timeout=seconds)
    silent = ("storage_path", f"has not said within {seconds} s {asked}")
    return [_answer(task) if task in answered else silent for task in tasks]


def _answer(task: ray.ObjectRef) -> tuple[str, str]:
    try:
        return ray.get(task)
    except ray.exceptions.RuntimeEnvSetupError as error:
        last = str(error).strip().splitlines()[-1]
        return "", f"can't make ray.init's runtime_env ({last}); see runtime_env_agent.log in Ray's logs there"
    except ray.exceptions.RayError as error:
        return "storage_path", f"can't look there ({reason(error)})"


# The two tasks are local functions: they travel whole, and no node imports PyTorch to find a file.


def _compare() -> Callable[[dict[str, str]], tuple[str, str]]:
    """The task of `check_environments`."""
    cure = (
        "install requirements.txt there, or let Ray bring what is missing, before preflight: "
        'ray.init(runtime_env={"pip": "requirements.txt", "py_modules": ["tp2d_helpers"]})'
    )

    def compare(versions: dict[str, str]) -> tuple[str, str]:
        """("", what is wrong with this node's libraries or environment); ("", "") if all is well."""
        try:
            for name, wanted in versions.items():
                if (found := importlib.metadata.version(name)).partition("+")[0] != wanted:
                    return "", f"has {name} {found}, and the driver {wanted}; {cure}"
            environment = importlib.import_module("tp2d_helpers.preflight.environment")
            environment.check_environment()
            environment.check_interfaces()
        except ModuleNotFoundError as error:  # also of `version`
            return "", f"lacks {error.name}; {cure}"
        except ValueError as error:
            return "", str(error)
        return "", ""

    return compare


def _look() -> Callable[..., tuple[str, str]]:
    """The task of `check_nodes`."""

    def look(paths: dict[str, list[str]], seconds: float, own: str = "", demo: bool = False) -> tuple[str, str]:
        """(parameter at fault, why): what this node doesn't see of `paths` within `seconds`; "" if all is well."""
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
