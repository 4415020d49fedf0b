"""Connect to Ray, or start it: within a limit of time, and with a word about what stands in the way."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.runtime_env.uv_runtime_env_hook import _get_uv_run_cmdline
from ray.util.client import ray as client

import tp2d_helpers
from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.preflight.address import check_form, find_cluster
from tp2d_helpers.preflight.environment import cannot_write, check_environment, check_hook, reads_token_file, token_file

WORKER_SECONDS = 120  # for a first worker process
BUILD_SECONDS = 900  # for one whose node installs packages first: Ray itself gives up after 600
PYTHON_SECONDS = 12  # for an interpreter to import Ray
UV, JOB = "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_JOB_CONFIG_JSON_ENV_VAR"  # the second is what a submitted job brings


def connect() -> dict[str, float]:
    """Connect to the Ray cluster there is (`RAY_ADDRESS`), or start one here; return its resources.

    Worker logs are not sent to the notebook: every worker has a log file. The helpers travel to all nodes. What is
    started here is for this machine alone: it listens on the loopback address, and joins no cluster it was not told of.

    A Ray that is connected already stays as it is, with the `runtime_env` that was given to `ray.init`.

    Raises:
        ConfigError: if something in the environment stands in the way, no cluster of these versions answers at
            `RAY_ADDRESS`, or no worker starts. Ray itself would go on asking, or waiting, for minutes or for ever,
            without a word.
    """
    started = ray.is_initialized()
    address = os.environ.get("RAY_ADDRESS") or "local"
    if client.is_connected() or (not started and address.startswith("ray://")):
        raise ConfigError(
            f"{'ray.init: Ray Client' if started else f'RAY_ADDRESS = {address!r}'}: the driver reads what the workers "
            "write, and so must be on a node of the cluster; submit it from here as a job (ray job submit), or start "
            "it there with RAY_ADDRESS=auto"
        )
    if not started:
        check_form(address)
        check_hook()
    check_environment(starts_ray=not started and address == "local")
    if not started:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        _start_here() if address == "local" else _join(address)
        _check_python()
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
    _bring_token()
    # Under `uv run`, workers are started by this interpreter, too, and not by uv once more.
    uv = {} if UV in os.environ else {UV: False}
    try:
        # What starts within takes 127.0.0.1 for its node's address, and binds to nothing else. `_node_ip_address` does
        # not bring that about: Ray replaces a loopback address by the outside one, and then binds to all. Only where it
        # takes clusters for impossible (its default on macOS and Windows) it stays inside.
        with _constants(ENABLE_RAY_CLUSTER=False, **uv):
            ray.init("local", log_to_driver=False, logging_level="ERROR", runtime_env=env, include_dashboard=False)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        cure = "Its files go to RAY_TMPDIR: set it to a short path that can be written, if that is the trouble"
        raise ConfigError(f"Ray can't start on this machine: {reason(error)}. {cure}") from error


def _bring_token() -> None:
    """Where Ray has no token, and can't write one into the home folder, it gets one for this process's own Ray."""
    if reads_token_file() and not os.access(token_file(), os.R_OK) and cannot_write(token_file().parent):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex()


def _join(address: str) -> None:
    command = _get_uv_run_cmdline()
    if command and UV not in os.environ:
        raise ConfigError(
            f"{shlex.join(command)!r}: Ray would start workers by uv, too, in an environment that each node makes for "
            f"itself; set {UV}=0 and start Python again: workers then have the Python that Ray was started with there"
        )
    found = find_cluster(address)
    try:
        env = _helpers()
        ray.init(found, log_to_driver=False, logging_level="ERROR", runtime_env=env, include_dashboard=False)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"RAY_ADDRESS = {address!r}: a cluster answers, and can't be joined: {reason(error)}"
        ) from error


def _helpers() -> dict[str, list[str]]:
    """The runtime_env that brings the helpers to the other nodes.

    In a submitted job, Ray may have brought them here and will there. A job's `py_modules` can't be merged with others:
    the helpers are added to those it brings.
    """
    package = Path(tp2d_helpers.__file__).parent
    if "runtime_resources" in package.parts:
        return {}
    try:
        job = json.loads(os.environ.get(JOB) or "{}")
        brought = list((job.get("runtime_env") or {}).get("py_modules") or [])
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{JOB}: Ray's own variable of a submitted job can't be read ({reason(error)})") from error
    if not brought:
        return {"py_modules": [str(package)]}
    if str(package) not in brought:
        job["runtime_env"]["py_modules"] = [*brought, str(package)]
        os.environ[JOB] = json.dumps(job)
    return {}


@contextlib.contextmanager
def _constants(**values: Any) -> Iterator[None]:
    """Within it, Ray's constants, which it has read from the environment as it was imported, have these values."""
    before = {name: getattr(ray_constants, name) for name in values}
    vars(ray_constants).update(values)
    try:
        yield
    finally:
        vars(ray_constants).update(before)


def _check_python() -> None:
    """What a job's `runtime_env` or a hook has workers started by is a Python with the driver's Ray."""
    command = ray.get_runtime_context().runtime_env.get("py_executable", "")
    if command in ("", sys.executable, shlex.quote(sys.executable)):
        return
    ask = "import platform, ray; print(ray.__version__, platform.python_version())"
    wanted = f"{ray.__version__} {platform.python_version()}"
    try:
        ran = subprocess.run([*shlex.split(command), "-c", ask], capture_output=True, text=True, timeout=PYTHON_SECONDS)
        lines = ran.stdout.strip().splitlines() or ran.stderr.strip().splitlines()
        found = (lines or [f"exit code {ran.returncode}"])[-1]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        found = reason(error)
    if found != wanted:
        ray.shutdown()
        hook = os.environ.get("RAY_RUNTIME_ENV_HOOK")
        who = f"RAY_RUNTIME_ENV_HOOK = {hook!r}" if hook else "the job's runtime_env"
        raise ConfigError(
            f"py_executable = {command!r} (by {who}): workers would be started by it, and asked for its Ray and Python "
            f"it says {found!r}, where the driver has {wanted!r}; leave it out, or name a Python with the driver's"
        )


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
