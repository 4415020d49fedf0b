"""Can PyTorch use the GPUs that Ray has counted? Asked on each node, before a worker starts there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.preflight.connection import patience

SHARE = 0.01  # of a GPU, so that one is seen
PLACE_SECONDS = 5  # for a GPU of the node to be free; where none is, another job uses them
TRIAL_SECONDS = 120  # to start a process and import PyTorch, from a network's disk perhaps


@contextlib.contextmanager
def trial(nodes: list[dict]) -> Iterator[Callable[[], None]]:
    """Let each node that has GPUs try one, all at once, while the body does something else.

    Args:
        nodes: as `ray.nodes()` describes them. One whose GPUs are all taken is passed over.

    Yields:
        what waits for the answers, and raises `ConfigError` with the first node that can't use its GPU.
    """
    groups = {}
    for node in nodes:
        if node["Resources"].get("GPU"):
            selector = [{"ray.io/node-id": node["NodeID"]}]
            groups[placement_group([{"GPU": SHARE}], bundle_label_selector=selector)] = node["NodeManagerAddress"]
    try:
        end, tasks = time.monotonic() + PLACE_SECONDS, {}
        for group, address in groups.items():
            if group.wait(max(0, end - time.monotonic())):
                place = PlacementGroupSchedulingStrategy(group)
                task = ray.remote(num_cpus=0, num_gpus=SHARE, max_retries=0, scheduling_strategy=place)(trouble())
                tasks[task.remote()] = address
        yield lambda: _refuse(tasks)
    finally:
        for group in groups:
            remove_placement_group(group)


def _refuse(tasks: dict[ray.ObjectRef, str]) -> None:
    seconds = patience(TRIAL_SECONDS)
    answered, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=seconds) if tasks else ([], [])
    for task, address in tasks.items():
        try:
            found = ray.get(task) if task in answered else f"PyTorch has not tried its GPU within {seconds} s"
        except ray.exceptions.RayError as error:
            found = f"PyTorch's trial of its GPU ended the process ({reason(error)})"
        if found:
            raise ConfigError(f"node {address}: {found}. Or set use_gpu to False")


def trouble() -> Callable[[], str]:
    """The task of `trial`, a local function: it travels whole."""

    def nvidia(*asked: str) -> str:
        """What `nvidia-smi` says of the first GPU."""
        import subprocess

        command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"nvidia-smi can't be asked ({type(error).__name__})"
        return f"nvidia-smi: {(said.stdout.strip() or said.stderr.strip() or 'nothing').splitlines()[0]}"

    def try_gpu() -> str:
        """Why PyTorch can't use the GPU that Ray gives to this task; "" if it can, or others use all of its memory."""
        import torch

        if not (torch.version.cuda or torch.version.hip):
            wanted = f"install a torch {torch.__version__.partition('+')[0]} that is built for CUDA"
            return f"torch {torch.__version__} is built without CUDA, and Ray counts GPUs there; {wanted}"
        build = f"torch {torch.__version__}, built for CUDA {torch.version.cuda},"
        try:
            torch.cuda.init()
            major, minor = torch.cuda.get_device_capability()
            kinds = [kind for kind in torch.cuda.get_arch_list() if kind.partition("_")[2].rstrip("af").isdigit()]
            numbers = [(kind.partition("_")[0], int(kind.partition("_")[2].rstrip("af"))) for kind in kinds]
            # Machine code runs on later GPUs of the same generation, intermediate code (PTX) on all later ones.
            fits = [n <= 10 * major + minor and (how == "compute" or n // 10 == major) for how, n in numbers]
            if torch.version.cuda and numbers and not any(fits):
                return (
                    f"{build} has no kernels for {torch.cuda.get_device_name()} (sm_{major}{minor}), but for "
                    f"{', '.join(kinds)}; install a torch that has"
                )
            if (torch.ones(8, device="cuda") * 2).sum().item() != 16:
                return f"{build} computes wrongly on its GPU ({nvidia('name', 'driver_version')})"
        except torch.OutOfMemoryError:
            return ""
        except (RuntimeError, AssertionError) as error:
            why = " ".join(str(error).split()).partition(" CUDA kernel errors")[0][:300].rstrip(". ")
            if "busy or unavailable" in why:
                return ""
            return (
                f"{build} can't use its GPU ({why}; {nvidia('name', 'driver_version')}); install a driver for "
                f"CUDA {torch.version.cuda}, or a torch that is built for the driver's"
            )
        return ""

    return try_gpu
