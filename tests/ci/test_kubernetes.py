"""The job for KubeRay and its image: fields that KubeRay has, versions of requirements.txt, settings that fit."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from ci.notebook import ROOT
from tp2d_helpers.config import Config

FOLDER = ROOT / "ci/kubernetes"
POD = {"securityContext": {"fsGroup": int}, "containers": list, "volumes": list, "tolerations": list}
GROUP = {"rayStartParams": dict, "template": {"spec": POD}}
# What the job uses of ray.io_rayjobs.yaml (KubeRay 1.6.2, and master of 2026-08-19), and of a pod.
JOB = {
    "entrypoint": str, "submissionMode": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": {
        "rayVersion": str, "authOptions": {"mode": str}, "enableInTreeAutoscaling": bool,
        "autoscalerOptions": {"version": str, "idleTimeoutSeconds": int},
        "headGroupSpec": GROUP, "workerGroupSpecs": list,
    },
}  # fmt: skip
WORKERS = GROUP | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
CONTAINER = {"name": str, "image": str, "resources": {"requests": dict, "limits": dict}, "volumeMounts": list}


def misfits(value: Any, fields: Any, at: str = "") -> list[str]:
    """Where a value has a field that isn't there, or one of another type."""
    if not isinstance(fields, dict):
        return [] if type(value) is fields else [f"{at}: {value!r}"]
    return [
        misfit
        for name, part in value.items()
        for misfit in (misfits(part, fields[name], f"{at}.{name}") if name in fields else [f"{at}.{name}: unknown"])
    ]


@pytest.fixture(scope="module")
def documents() -> dict[str, dict]:
    return {item["kind"]: item for item in yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())}


@pytest.fixture(scope="module")
def job(documents: dict[str, dict]) -> dict:
    return documents["RayJob"]["spec"]


@pytest.fixture(scope="module")
def pods(job: dict) -> list[dict]:
    """The specs of the head's and the workers' pod."""
    cluster = job["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.fixture(scope="module")
def config(job: dict, settings: Callable[[str], Config]) -> Config:
    return settings(job["entrypoint"])


def test_fields_are_those_of_kuberay(documents: dict[str, dict], job: dict, pods: list[dict]) -> None:
    assert documents["RayJob"]["apiVersion"] == "ray.io/v1"
    assert misfits(job, JOB) == []
    assert [misfit for group in job["rayClusterSpec"]["workerGroupSpecs"] for misfit in misfits(group, WORKERS)] == []
    assert [misfit for pod in pods for item in pod["containers"] for misfit in misfits(item, CONTAINER)] == []
    assert misfits({"rayVersion": 2.6, "gpus": 1}, JOB["rayClusterSpec"]) == [".rayVersion: 2.6", ".gpus: unknown"]
    assert job["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_versions(job: dict, pins: dict[str, str]) -> None:
    assert job["rayClusterSpec"]["rayVersion"] == pins["ray"]
    [base] = re.findall(r"^FROM (\S+)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert re.fullmatch(rf"rayproject/ray:{re.escape(pins['ray'])}-py31[0-2]-cu\d+", base)


def test_gpus_are_whole_tp_groups_and_enough(job: dict, config: Config) -> None:
    [workers] = job["rayClusterSpec"]["workerGroupSpecs"]
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    gpus = resources["limits"]["nvidia.com/gpu"]
    assert gpus % config.tp_size == 0
    assert gpus * workers["maxReplicas"] == config.num_workers
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert resources["requests"] == resources["limits"]  # a GPU can't be promised to two pods
    assert job["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_settings_fit_nodes_that_come_and_go(job: dict, config: Config) -> None:
    assert job["rayClusterSpec"]["enableInTreeAutoscaling"] and config.cluster_wait_seconds
    assert config.use_gpu is True  # "auto" would train on CPU while there is no node yet
    [workers] = job["rayClusterSpec"]["workerGroupSpecs"]
    gpus = workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert config.min_dp_size * config.tp_size <= gpus * (workers["maxReplicas"] - 1)  # one node less is enough
    assert config.checkpoint_interval and config.max_failures > 1
    assert config.experiment_name != "auto"  # else a second job would begin anew


def test_nothing_ends_a_long_run(job: dict, pods: list[dict], config: Config) -> None:
    """Neither a limit of time, nor the loss of the head. Another job of the same experiment_name goes on."""
    assert not [spec for spec in (job, *pods) if "activeDeadlineSeconds" in spec]
    assert job["backoffLimit"] >= 1 and config.cluster_wait_seconds >= 600  # nodes take minutes to come


def test_all_pods_share_the_storage(documents: dict[str, dict], pods: list[dict], config: Config) -> None:
    claim = documents["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        [container] = pod["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        shared = mounts["/mnt/shared"]["persistentVolumeClaim"]["claimName"]
        assert shared == claim["metadata"]["name"] and config.storage_path.startswith("/mnt/shared/")
        assert container["image"] == pods[0]["containers"][0]["image"]


def test_the_image_copies_what_is_there_and_runs_what_it_copies(job: dict) -> None:
    text = (FOLDER / "Dockerfile").read_text()
    [folder] = re.findall(r"^WORKDIR (\S+)$", text, re.MULTILINE)
    copied = [line.split()[2:-1] for line in text.splitlines() if line.startswith("COPY --chown=1000:100 ")]
    sources = [source for line in copied for source in line]
    assert len(copied) == text.count("\nCOPY ") and all((ROOT / source).exists() for source in sources)
    assert {"requirements.txt", "tp_autotp.ipynb", "tp2d_helpers", "ci"} == set(sources)
    assert "pip install --no-cache-dir -r requirements.txt" in text
    script = job["entrypoint"].split()[1]
    assert script.startswith(f"{folder}/ci/") and (ROOT / script.removeprefix(f"{folder}/")).is_file()
    assert f"PYTHONPATH={folder}" in text
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == set(sources)
    assert fnmatch.fnmatch("tp2d_helpers/__pycache__", "**/__pycache__") and "**/__pycache__" in ignored
