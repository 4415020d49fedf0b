"""What `RAY_ADDRESS` says: where a cluster is, whether it answers, and which versions it has."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys

import ray

from tp2d_helpers.config import ConfigError

ANSWER_SECONDS = 8  # for a cluster
START_SECONDS = 60  # for the process that asks it, which imports Ray: seconds, or more from a network storage
HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s\[\]:/@?#]+):(\d{1,5})")
# In a process of its own, since Ray's client goes on asking for minutes. "auto" becomes what `ray.init` makes of it.
ASK = """
import json, signal, socket, sys
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import GcsClient

signal.alarm(int(sys.argv[2]))  # ends this process, whatever it waits for
address = canonicalize_bootstrap_address_or_die(sys.argv[1])
print("\\n" + sys.argv[3] + address, flush=True)
host, _, port = address.rpartition(":")
socket.create_connection((host.strip("[]"), int(port)), timeout=int(sys.argv[2])).close()
print("\\n" + sys.argv[3] + json.dumps(get_cluster_metadata(GcsClient(address=address))))
"""
MARK = "tp2d: "  # of the two lines that it prints; what a site's Python prints has none


def check_form(address: str) -> None:
    """Whether an address is one that a driver can connect to.

    Raises:
        ConfigError: if it is not `host:port`, `auto` or `local`.
    """
    found = HOST_PORT.fullmatch(address)
    if address in ("auto", "local") or (found and 0 < int(found[2]) < 2**16):
        return
    what = "is no address of a Ray cluster"
    if re.match(r"\s*https?://", address, re.IGNORECASE):
        what = "is the address of a job server, which takes jobs (ray job submit), and not that of the cluster"
    raise ConfigError(
        f"RAY_ADDRESS = {address!r}: {what}; set it to host:port of the cluster's head (ray start --head prints it), "
        "or on a node of the cluster to auto, or unset it to use this machine alone"
    )


def find_cluster(address: str) -> str:
    """The host:port at which a cluster of the driver's versions answers.

    Args:
        address: `host:port` or `auto`.

    Raises:
        ConfigError: if none answers within `ANSWER_SECONDS`, or one of other versions.
    """
    command, trouble = [sys.executable, "-c", ASK, address, str(ANSWER_SECONDS), MARK], "the process that asked died"
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        asking.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        trouble = f"Python took more than {START_SECONDS} s to import Ray and ask"
        asking.kill()
    output, errors = asking.communicate()
    found = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
    if asking.returncode == -signal.SIGALRM:
        trouble = f"nothing within {ANSWER_SECONDS} s"
    named = repr(address) + (f" ({found[0]})" if found and found[0] != address else "")
    if asking.returncode:
        trouble = errors.strip().splitlines()[-1] if errors.strip() and asking.returncode > 0 else trouble
        raise ConfigError(
            f"RAY_ADDRESS = {named}: no Ray cluster answers there ({trouble}); "
            "start one, or unset RAY_ADDRESS to use this machine alone. "
            "One that asks for a token needs RAY_AUTH_MODE=token and the token here, too."
        )
    check_versions(named, json.loads(found[1]) or {})
    return found[0]


def check_versions(named: str, cluster: dict[str, str]) -> None:
    """Whether a cluster's Ray and Python are the driver's, as Ray itself wants it.

    Args:
        named: the cluster, for the message.
        cluster: its `ray_version` and `python_version`; empty if it doesn't say.

    Raises:
        ConfigError: with both.
    """
    here = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    parts = 2 if os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL") == "minor" else 3
    theirs, ours = (
        (versions["ray_version"], versions["python_version"].split(".")[:parts]) for versions in (here | cluster, here)
    )
    if theirs != ours:
        said = "the cluster has Ray {ray_version} on Python {python_version}".format(**here | cluster)
        raise ConfigError(
            f"RAY_ADDRESS = {named}: {said}, and here it is Ray {ray.__version__} on Python "
            f"{platform.python_version()}; a driver needs the same ones: start it with the cluster's Python"
        )
