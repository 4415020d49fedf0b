"""A node whose libraries are not the driver's is told before a worker starts, and Ray brings what it lacks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from grid import ROOT
from ray.cluster_utils import Cluster

from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.preflight import connection, nodes


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which Python finds an old transformers; it can be taken away."""
    metadata = tmp_path_factory.mktemp("old") / "transformers-4.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0\n")
    return metadata.parent


@pytest.fixture(scope="module")
def cluster(old: Path) -> Iterator[Cluster]:
    """Two nodes. The second has the old transformers, and neither has the helpers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(old.parent)})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def connected(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Config, Path]]]:
    """Connect a driver that has the helpers in its own path only; the arguments of `check_nodes`."""

    def connect(**runtime_env: list[str]) -> tuple[Config, Path]:
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=runtime_env)
        (tmp_path / "probe").touch()
        return make_config(model_name="demo", dataset_name="demo", use_gpu=False), tmp_path / "probe"

    monkeypatch.chdir(tmp_path)  # Ray tells workers where the driver was started, and where its script is
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != ROOT])
    yield connect
    ray.shutdown()


def test_other_versions(connected: Callable[..., tuple[Config, Path]]) -> None:
    with pytest.raises(ConfigError, match=r"^node [\d.]+: has transformers 4\.0, and the driver 5\.\S+; install req"):
        nodes.check_environments(connected()[0])


def test_helpers_that_are_not_there_and_are_brought(connected: Callable[..., tuple[Config, Path]], old: Path) -> None:
    aside = old.rename(old.with_name("aside"))
    try:
        arguments = connected()
        with pytest.raises(ConfigError, match=r"^node [\d.]+: lacks tp2d_helpers; install .* or let Ray bring"):
            nodes.check_environments(arguments[0])
        ray.shutdown()
        arguments = connected(py_modules=[str(ROOT / "tp2d_helpers")])
        nodes.check_environments(arguments[0])
        assert nodes.check_nodes(*arguments) == ", shared by 1 node"
    finally:
        aside.rename(old)


def test_a_node_that_installs_packages_gets_more_time(
    connected: Callable[..., tuple[Config, Path]], old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "ANSWER_SECONDS", 0)
    arguments = connected(pip=[str(tmp_path / "nothing")])
    with pytest.raises(ConfigError, match=r"^node [\d.]+: can't make ray\.init's runtime_env \(.*\); see runtime"):
        nodes.check_environments(arguments[0])
    ray.shutdown()
    arguments = connected()
    with pytest.raises(ConfigError, match=r"node [\d.]+ has not said within 0 s what it sees there; take a folder"):
        nodes.check_nodes(*arguments)


@pytest.mark.parametrize(
    "started, named", [(False, "RAY_ADDRESS = 'ray://127.0.0.1:9'"), (True, "ray.init: Ray Client")]
)
def test_ray_client(monkeypatch: pytest.MonkeyPatch, started: bool, named: str) -> None:
    """It is refused without a try: nothing answers at that address."""
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:9")
    monkeypatch.setattr(ray, "is_initialized", lambda: started)
    monkeypatch.setattr(connection.client, "is_connected", lambda: started)
    with pytest.raises(
        ConfigError, match=r"^[^\n]*: the driver reads what .* \(ray job submit\), or start it"
    ) as caught:
        connection.connect()
    assert str(caught.value).startswith(named)


@pytest.mark.parametrize("place, brought", [("home", True), ("runtime_resources/working_dir_files/_ray_pkg_1", False)])
def test_a_job_does_not_bring_what_ray_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, brought: bool
) -> None:
    package, given = tmp_path / place / "tp2d_helpers", {}
    monkeypatch.setattr(connection.tp2d_helpers, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(ray, "init", lambda *arguments, **named: given.update(named))
    connection._join("auto")
    assert given["runtime_env"] == ({"py_modules": [str(package)]} if brought else {})
