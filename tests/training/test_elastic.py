"""Nodes that go and come, on Ray's own multi-node test cluster: the run goes on with fewer replicas, and grows again.

Two nodes of two cores each; tp 2 × dp 2 puts a TP group on each.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from grid import IMPORT_PATH, run_grid
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.train import ScalingConfig

import tp2d_helpers.launch
from tp2d_helpers.checkpoint.run_folder import checkpoints, newest_checkpoint, read_manifest
from tp2d_helpers.config import Config, make_config
from tp2d_helpers.preflight.plan import preflight
from tp2d_helpers.training.elastic import WholeReplicas, first_size, possible_dp_sizes
from tp2d_helpers.training.metrics import newest_step, read_metrics

pytestmark = pytest.mark.timeout(1500)  # the first test's includes the whole life
STEPS, PATIENCE = 60, 240
PREEMPTED = 2  # DRAIN_NODE_REASON_PREEMPTION of Ray's protocol


class Nodes(threading.Thread):
    """Takes the second node away, brings one back, and drains that one, each after the run has answered the last."""

    def __init__(self, cluster: Cluster, second: Any, config: Config) -> None:
        super().__init__(daemon=True)
        self.cluster, self.second, self.config = cluster, second, config
        self.recovery: dict[str, float] = {}
        self.notice_checkpoint: Path | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.wait(lambda: self.newest_step() >= 12)
            self.timed("a node lost, and not coming back", self.lose, 2)
            self.timed("a node comes (back)", self.bring, 4)
            known = set(checkpoints(self.config.run_dir))
            self.drain()
            self.wait(lambda: {c for c in checkpoints(self.config.run_dir) if self.off_schedule(c)} - known)
            self.notice_checkpoint = max({c for c in checkpoints(self.config.run_dir) if self.off_schedule(c)} - known)
            self.timed("a node preempted after a notice", lambda: None, 2)
        except BaseException as error:
            self.error = error

    def off_schedule(self, folder: Path) -> bool:
        return int(folder.name.split("_")[1]) % self.config.checkpoint_interval != 0

    def lose(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    def bring(self) -> None:
        self.second = self.cluster.add_node(num_cpus=2)

    def drain(self) -> None:
        deadline = int(1000 * (time.time() + 15))
        client = GcsClient(address=self.cluster.address)
        accepted, why = client.drain_node(self.second.node_id, PREEMPTED, "test", deadline)
        assert accepted, why

    def timed(self, name: str, action: Callable[[], None], world_size: int) -> None:
        """Seconds from the action to the first step of a world of another size."""
        began = time.monotonic()
        action()
        self.wait(lambda: self.world_size() == world_size)
        step = self.newest_step()
        self.wait(lambda: self.newest_step() != step)
        self.recovery[name] = time.monotonic() - began

    def world_size(self) -> int:
        """Workers that the newest attempt has; `placement` is written by the patched `fit_to_world`."""
        path = self.config.run_dir / "world_size"
        return int((path.read_text() if path.exists() else "") or 0)

    def newest_step(self) -> int:
        return newest_step(self.config.run_dir / "metrics.jsonl")

    def wait(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"{self.recovery}, then nothing; {self.newest_step()} steps, {self.world_size()}")
            time.sleep(0.1)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A run on two nodes, of which the second goes, comes and is drained; and the run in one process it must equal."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", IMPORT_PATH)  # what the nodes' processes find the helpers by
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
        # Without hooks at exit, which only the main thread could set.
        cluster = Cluster(
            initialize_head=True, shutdown_at_exit=False, head_node_args={"num_cpus": 2, "include_dashboard": False}
        )
        second = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        config = make_config(
            model_name="demo", dataset_name="demo", use_gpu=False, tp_size=2, dp_size=2, min_dp_size=1, seq_length=64,
            batch_size_per_gpu=2, learning_rate=1e-3, debug_steps=STEPS, log_interval=1, checkpoint_interval=10,
            eval_samples=4, storage_path=str(folder), experiment_name="elastic", max_failures=3,
            seed=2,  # in 60 steps of seed 42, a sample magnifies the rounding of its sums to 2e-5 of its loss
        )  # fmt: skip
        plan = preflight(config)
        twin = plan.config.change(experiment_name="twin", tp_size=1, dp_size=1, gradient_accumulation_steps=2)
        run_grid(twin.model_dump())
        patch.setattr(
            tp2d_helpers.launch, "ScalingConfig", functools.partial(ScalingConfig, elastic_resize_monitor_interval_s=2)
        )
        nodes = Nodes(cluster, second, plan.config)
        nodes.start()
        try:
            result = tp2d_helpers.launch.launch(plan, slow_loop())
        finally:
            ray.shutdown()
            cluster.shutdown()
    yield SimpleNamespace(
        config=plan.config, plan=plan, nodes=nodes, result=result,
        records=read_metrics(plan.config.run_dir / "metrics.jsonl"), twin=read_metrics(twin.run_dir / "metrics.jsonl"),
    )  # fmt: skip


def slow_loop() -> Callable[[dict[str, Any]], None]:
    """`train_func`, slow enough for nodes to come and go. It is made here, as Ray sends such a function by value."""

    def train_func(config: dict[str, Any]) -> None:
        """Note the number of workers of each attempt, and take half a second more for each step."""
        from tp2d_helpers import train as loop

        step, fit = loop.train_step, loop.fit_to_world

        def slow_step(*args: Any) -> Any:
            time.sleep(0.5)
            return step(*args)

        def noting(config: dict, world_size: int) -> dict:
            Path(config["storage_path"], config["experiment_name"], "world_size").write_text(str(world_size))
            return fit(config, world_size)

        loop.train_step, loop.fit_to_world = slow_step, noting
        loop.train_func(config)

    return train_func


@pytest.mark.faults
@pytest.mark.slow
def test_the_run_survives_its_nodes(life: SimpleNamespace, outcomes: list) -> None:
    if life.nodes.error:
        raise life.nodes.error
    for name, seconds in life.nodes.recovery.items():
        outcomes.append((name, "equal to an undisturbed run, losses within 1e-5", f"{seconds:.0f} s"))


@pytest.mark.faults
@pytest.mark.slow
def test_it_equals_an_undisturbed_run(life: SimpleNamespace) -> None:
    """Whatever the number of replicas: the same samples in every step, the same losses, the same evaluation."""
    assert [record["step"] for record in life.records] == list(range(1, STEPS + 1))
    for record, expected in zip(life.records, life.twin, strict=True):
        assert record["tokens"] == expected["tokens"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5), record["step"]
        if expected["eval_loss"] and record["eval_loss"]:
            assert record["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


@pytest.mark.faults
@pytest.mark.slow
def test_a_notice_makes_a_checkpoint(life: SimpleNamespace) -> None:
    assert life.nodes.notice_checkpoint is not None, "no checkpoint besides the scheduled ones"


@pytest.mark.faults
@pytest.mark.slow
def test_the_last_checkpoint_is_of_one_replica(life: SimpleNamespace) -> None:
    newest, _ = newest_checkpoint(life.config.run_dir)
    manifest = read_manifest(newest)
    assert (manifest["tp_size"], manifest["dp_size"], manifest["step"]) == (2, 1, STEPS)


# The count, without a cluster


@pytest.mark.parametrize(
    "nodes, tp_size, expected",
    [
        ([2, 2], 2, 4),
        ([2], 2, 2),
        ([1, 1, 1, 1], 2, 0),  # four cores, but no node for a TP group
        ([3, 3], 2, 4),
        ([8], 2, 8),
        ([6], 2, 4),  # three replicas can't share out eight samples
        ([4, 4], 4, 8),
        ([3, 3], 4, 0),
    ],
)
def test_whole_replicas(nodes: list[int], tp_size: int, expected: int) -> None:
    config = make_config(tp_size=tp_size, dp_size=8 // tp_size, min_dp_size=1, batch_size_per_gpu=2)
    policy = WholeReplicas(ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 0.7}), config)
    assert policy._count_possible_workers({str(i): {"CPU": 0.7 * n} for i, n in enumerate(nodes)}) == expected


def test_dp_sizes_that_keep_the_global_batch() -> None:
    config = make_config(dp_size=8, min_dp_size=2, batch_size_per_gpu=2, gradient_accumulation_steps=3)
    assert possible_dp_sizes(config) == [2, 3, 4, 6, 8]
    assert possible_dp_sizes(config.change(min_dp_size=0)) == [8]


def test_the_size_to_start_with() -> None:
    config = make_config(use_gpu=True, tp_size=2, dp_size=4, min_dp_size=1, gradient_accumulation_steps=3)
    assert [first_size(config, {"GPU": gpus}).dp_size for gpus in (0, 2, 5, 6, 8, 16)] == [1, 1, 2, 3, 4, 4]
    fixed = config.change(min_dp_size=0)
    assert first_size(fixed, {"GPU": 2}) == fixed
