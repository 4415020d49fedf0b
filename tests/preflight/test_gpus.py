"""A node whose PyTorch can't use the GPUs that Ray counts is told before a worker starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from grid import IMPORT_PATH
from ray.cluster_utils import Cluster

from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.demo import demo_model
from tp2d_helpers.preflight import gpus, nodes, plan

CONFIG = dict(model_name="demo", dataset_name="demo", use_gpu=True, tp_size=1, dp_size=1, seq_length=64)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A node without GPUs, which has the driver, and one that claims two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", IMPORT_PATH)
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1, num_gpus=2)
        cluster.wait_for_nodes()
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(**CONFIG | {"model_name": str(demo_model())}, storage_path=str(tmp_path / "runs"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use a GPU here")
def test_a_torch_that_cannot_use_the_gpus_that_ray_counts(
    cluster: Cluster, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe").touch()
    with pytest.raises(ConfigError, match=r"^node [\d.]+: torch \S+ is built without CUDA, .* install a torch") as said:
        nodes.check_nodes(config, tmp_path / "probe")
    assert torch.__version__ in str(said.value)
    assert nodes.check_nodes(config.change(use_gpu=False), tmp_path / "probe") == ", shared by 2 nodes"
    monkeypatch.setattr(plan, "connect", ray.cluster_resources)
    with pytest.raises(ConfigError, match="is built without CUDA"):
        plan.preflight(config)
    assert not (tmp_path / "runs").exists()  # nothing is left, and no worker was started


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use a GPU here")
def test_a_node_whose_gpus_are_taken_is_passed_over(
    cluster: Cluster, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process there would wait for them until the other job ends."""
    monkeypatch.setattr(gpus, "PLACE_SECONDS", 1)
    (tmp_path / "probe").touch()
    taken = ray.remote(num_cpus=0, num_gpus=2)(lambda: time.sleep(60)).remote()
    while ray.available_resources().get("GPU"):
        time.sleep(0.1)
    assert nodes.check_nodes(config, tmp_path / "probe").startswith(", shared by 1 node")
    ray.cancel(taken, force=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use a GPU here")
def test_a_node_alone_and_in_time(
    cluster: Cluster, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [node for node in ray.nodes() if node["Resources"].get("GPU")]
    monkeypatch.setattr(nodes, "alive", lambda: alone)
    with pytest.raises(ConfigError, match="is built without CUDA"):
        nodes.check_nodes(config, tmp_path / "probe")
    monkeypatch.setattr(gpus, "TRIAL_SECONDS", 0)
    with pytest.raises(ConfigError, match="has not tried its GPU within 0 s"):
        nodes.check_nodes(config, tmp_path / "probe")


# What a GPU says, as PyTorch tells it

OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
NO_IMAGE = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be later"


def raising(message: str) -> None:
    raise RuntimeError(message)


@pytest.mark.parametrize("capability, kinds, kernel, words", [
    ((9, 0), ["sm_80", "sm_90"], lambda: 16, []),
    ((8, 9), ["sm_80", "sm_90"], lambda: 16, []),  # kernels for 8.0 run on 8.9
    ((12, 0), ["sm_90", "compute_90"], lambda: 16, []),
    ((12, 0), ["sm_90a", "sm_100f"], lambda: 16, ["no kernels for a GPU (sm_120), but for sm_90a, sm_100f; install"]),
    ((7, 0), ["sm_75", "sm_120", "compute_120"], lambda: 16, ["(sm_70)", "install a torch that has"]),
    ((9, 0), ["sm_90"], lambda: raising(NO_IMAGE), ["no kernel image is available", "nvidia-smi"]),
    ((9, 0), ["sm_90"], lambda: 15, ["computes wrongly"]),
    ((9, 0), ["sm_90"], lambda: raising("CUDA-capable device(s) is/are busy or unavailable"), []),
    (None, ["sm_90"], lambda: 16, [f"can't use its GPU ({OLD}", "install a driver for CUDA 13.0"]),
])  # fmt: skip
def test_what_keeps_pytorch_from_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple, kinds: list[str], kernel: object, words: list[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None if capability else raising(OLD))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: kinds)
    product = SimpleNamespace(sum=lambda: SimpleNamespace(item=kernel))
    monkeypatch.setattr(torch, "ones", lambda *_, device: Ones(product))
    found = gpus.trouble()()
    assert bool(found) == bool(words) and all(word in found for word in words), found


class Ones:
    """A tensor whose product is given."""

    def __init__(self, product: SimpleNamespace) -> None:
        self.product = product

    def __mul__(self, other: int) -> SimpleNamespace:
        return self.product
