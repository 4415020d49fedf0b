"""Connect to Ray, or start it: within a limit of time, and with a word about what stands in the way."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ray
from ray._private import ray_constants
from ray.util.client import ray as client

import tp2d_helpers
from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.preflight.environment import check_environment

HEALTH_SECONDS = 45  # for a cluster to answer; a command of Ray's asks, which takes some seconds to start
WORKER_SECONDS = 120  # for a first worker process
BUILD_SECONDS = 900  # for one whose node installs packages first: Ray itself gives up after 600


def connect() -> dict[str, float]:
    """Connect to the Ray cluster there is (`RAY_ADDRESS`), or start one here; return its resources.

    Worker logs are not sent to the notebook: every worker has a log file. The helpers travel to all nodes. What is
    started here is for this machine alone: it listens on the loopback address, and joins no cluster it was not told of.

    A Ray that is connected already stays as it is, with the `runtime_env` that was given to `ray.init`.

    Raises:
        ConfigError: if something in the environment stands in the way, nothing answers at `RAY_ADDRESS`, or no worker
            starts. Ray itself would go on asking, or waiting, for minutes or for ever, without a word.
    """
    started = ray.is_initialized()
    address = os.environ.get("RAY_ADDRESS") or "local"
    if client.is_connected() or (not started and address.startswith("ray://")):
        raise ConfigError(
            f"{'ray.init: Ray Client' if started else f'RAY_ADDRESS = {address!r}'}: the driver reads what the workers "
            "write, and so must be on a node of the cluster; submit it from here as a job (ray job submit), or start "
            "it there with RAY_ADDRESS=auto"
        )
    check_environment(starts_ray=not started and address == "local")
    if not started:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        _start_here() if address == "local" else _join(address)
        _see_a_worker()
    return ray.cluster_resources()


def patience(seconds: int) -> int:
    """How long to wait for a node's process: `seconds`, or more if the job's runtime_env has packages to install."""
    installs = {"pip", "uv", "conda"} & set(ray.get_runtime_context().runtime_env)
    return BUILD_SECONDS if installs else seconds


def _start_here() -> None:
    # Ray puts the interpreter's path into a line of shell as it is, and waits for ever for what a space makes of it.
    quoted = shlex.quote(sys.executable)
    env = {"py_executable": quoted} if quoted != sys.executable else {}
    try:
        with _on_loopback():
            ray.init("local", log_to_driver=False, logging_level="ERROR", runtime_env=env, include_dashboard=False)
    except (OSError, ValueError, RuntimeError) as error:
        cure = "Its files go to RAY_TMPDIR: set it to a short path that can be written, if that is the trouble"
        raise ConfigError(f"Ray can't start on this machine: {reason(error)}. {cure}") from error


def _join(address: str) -> None:
    # py_modules brings the package to the other nodes. In a submitted job, Ray may have brought it here and will there.
    package = Path(tp2d_helpers.__file__).parent
    env = {} if "runtime_resources" in package.parts else {"py_modules": [str(package)]}
    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level="ERROR", runtime_env=env, include_dashboard=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"RAY_ADDRESS = {address!r}: no Ray cluster answers there ({str(error).splitlines()[0]}); "
            "start one, or unset RAY_ADDRESS to use this machine alone. "
            "One that asks for a token needs RAY_AUTH_MODE=token and the token here, too."
        ) from error


def _knock(address: str) -> None:
    """See that a cluster answers at host:port. Raises `OSError` if there is none, or something else."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # "auto"
        return
    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=HEALTH_SECONDS)
    if asked.returncode:
        raise OSError((asked.stderr.strip().splitlines() or ["no answer to Ray's health check"])[-1])


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts within takes 127.0.0.1 for its node's address, and binds to nothing else.

    `ray.init(_node_ip_address="127.0.0.1")` does not: Ray replaces a loopback address by the outside one, and then
    binds to all. Only where it takes clusters for impossible (its default on macOS and Windows) it stays inside.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _see_a_worker() -> None:
    """Let a worker process start as those of a run do: with an environment of its own, for which Ray asks a shell."""

    def started() -> bool:
        """That it runs is the answer."""
        return True

    task = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": {"TP2D_PROBE": "1"}})(started).remote()
    seconds = patience(WORKER_SECONDS)
    try:
        ray.get(task, timeout=seconds)
    except ray.exceptions.RayError as error:
        ray.shutdown()
        raise ConfigError(
            f"Ray answers, but starts no worker process within {seconds} s ({reason(error)}); python here is "
            f"{sys.executable!r}. See ray/session_latest/logs in Ray's temporary folder (RAY_TMPDIR, else /tmp)"
        ) from None
