"""Nodes that go and come: whole replicas only, and a checkpoint before a node is taken away.

Ray Train restarts a run with as many workers as there are resources for, if `ScalingConfig(num_workers)` is a pair
(fewest, most). It counts single workers. A replica here is a TP group, so the count has to be a multiple of tp_size, on
every node, and the replicas have to share out the global batch. `WholeReplicas` rounds the count down to that, where
Ray Train's own policy does the same for TPU slices.
"""

from __future__ import annotations

import time
from typing import Any

import ray.train
from ray.exceptions import ActorUnavailableError
from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision

from tp2d_helpers.config import Config, make_config


class GridTrainer(TorchTrainer):
    """Ray Train's TorchTrainer, which survives the loss of a node at any time, and keeps replicas whole.

    The two policies are arguments of Ray Train's controller; its public interface has no other place for them.
    """

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        arguments["failure_policy"] = NodeLossPolicy(self.run_config.failure_config)
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = WholeReplicas(self.scaling_config, make_config(**self.train_loop_config))
        return super()._initialize_and_run_controller(**arguments)


class NodeLossPolicy(DefaultFailurePolicy):
    """Ray Train's failure policy, which also tries again if a node is lost while workers are being started on it."""

    def _is_retryable_error(self, training_failed_error: TrainingFailedError) -> bool:
        failure = getattr(training_failed_error, "controller_failure", None)
        return super()._is_retryable_error(training_failed_error) or isinstance(failure, ActorUnavailableError)


class WholeReplicas(ElasticScalingPolicy):
    """Ray Train's elastic policy, counting TP groups that fit into a node instead of single workers."""

    def __init__(self, scaling_config: ray.train.ScalingConfig, config: Config) -> None:
        super().__init__(scaling_config)
        self.tp_size, self.dp_sizes = config.tp_size, possible_dp_sizes(config)
        self.patience, self.waiting_since = max(60, config.cluster_wait_seconds), None

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        worker = self.scaling_config.resources_per_worker  # preflight names them all
        groups = sum(groups_within(resources, worker, self.tp_size) for resources in reserved_resources.values())
        return self.tp_size * max((dp_size for dp_size in self.dp_sizes if dp_size <= groups), default=0)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start with what there is; end the run if for `patience` seconds that is less than the fewest workers."""
        decision = super().make_decision_for_non_running_worker_group()
        if not isinstance(decision, NoopDecision):
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = time.monotonic()
        elif time.monotonic() - self.waiting_since > self.patience:
            raise RuntimeError(
                f"no place for {self.scaling_config.min_workers} workers ({self.dp_sizes[0]} TP groups of "
                f"{self.tp_size}, each in a node) within {self.patience} s; the checkpoints are kept"
            )
        return decision


def groups_within(node: dict[str, float], worker: dict[str, float], tp_size: int) -> int:
    """TP groups of `tp_size` workers that fit into a node, both by their resources."""
    fitting = [node.get(name, 0.0) / amount for name, amount in worker.items() if amount > 0]
    return int(min(fitting) + 1e-6) // tp_size  # shares of a core are not exact in binary


class PreemptionNotice:
    """Ray Train's word that a node will be taken away, told once for each."""

    def __init__(self) -> None:
        self.seen: Any = None

    def arrived(self) -> bool:
        """True if there is a notice that wasn't there at the last call. Collective: every rank calls it."""
        notice = ray.train.get_preemption_info()
        new, self.seen = notice is not None and notice != self.seen, notice
        return new


def possible_dp_sizes(config: Config) -> list[int]:
    """The numbers of replicas, from min_dp_size to dp_size, that can share out the global batch, in rising order.

    Only dp_size itself, if min_dp_size is 0. A micro-batch that is still to be chosen counts as one sample.
    """
    fewest = config.min_dp_size or config.dp_size
    micro = 1 if config.batch_size_per_gpu == "auto" else config.batch_size_per_gpu
    shares = {n: micro * n for n in range(fewest, config.dp_size + 1)}
    return [n for n, share in shares.items() if config.samples_per_step % share == 0]


def first_size(config: Config, resources: dict[str, float]) -> Config:
    """The config of the grid that the run can start with on a cluster that lacks nodes, if min_dp_size lets it."""
    if not (config.min_dp_size and config.use_gpu):
        return config
    sizes = possible_dp_sizes(config)
    fitting = [n for n in sizes if n * config.tp_size <= resources.get("GPU", 0)] or sizes[:1]
    return config.change(dp_size=fitting[-1], min_dp_size=0)
