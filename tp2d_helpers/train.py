"""What every worker runs: the training loop, and around it what keeps a run alive.

`train_func` reads like a loop on one GPU: parallelism is in the engine and in the order of the data. `worker` holds
what only a long run needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import ray.train
import torch
from torch.utils.data import DataLoader

from tp2d_helpers.checkpoint.files import claim_run
from tp2d_helpers.checkpoint.resize import fit_to_world
from tp2d_helpers.checkpoint.run_folder import Progress
from tp2d_helpers.checkpoint.save_load import load_checkpoint, save_checkpoint
from tp2d_helpers.data.dataloader import create_dataloader, data_settings, global_batches
from tp2d_helpers.data.evaluation import evaluate
from tp2d_helpers.launchers import forget_others
from tp2d_helpers.model.engine import setup_model_with_autotp
from tp2d_helpers.planning.out_of_memory import explain_out_of_memory
from tp2d_helpers.speed import graphs
from tp2d_helpers.training.elastic import PreemptionNotice
from tp2d_helpers.training.metrics import StepMetrics, log_to_file
from tp2d_helpers.training.samples import Samples
from tp2d_helpers.training.schedule import schedule_learning_rate
from tp2d_helpers.training.watchdog import Watchdog


def train_step(engine: deepspeed.DeepSpeedEngine, micro_batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """One optimizer step; returns this rank's mean loss, which stays on its device."""
    losses = []
    for batch in micro_batches:
        batch = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in batch.items()}
        loss = engine(**batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()  # steps the optimizer at the last micro-batch only
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def train_func(config: dict[str, Any]) -> None:
    """Train on one worker. Ray Train runs it on all workers at once."""
    with worker(config) as run:
        config = run.config
        engine, _, dp_group, _, dp_rank = setup_model_with_autotp(
            config["model_name"], config["tp_size"], config["dp_size"], run.rank, run.world_size, config
        )
        loader = create_dataloader(dp_rank=dp_rank, **data_settings(config))
        progress = load_checkpoint(engine, run.folder, config["seed"], config["trust_checkpoint"], loader)
        last_step = progress.last_step(config["num_epochs"], loader.batch_sampler.steps_per_epoch)
        schedule_learning_rate(engine, config, last_step)
        metrics = StepMetrics(engine, dp_group, run.folder, config["seq_length"], config["log_interval"], progress.step)
        samples = Samples(engine, loader, config, run.folder, progress.step)

        engine.train()
        while progress.epoch < config["num_epochs"]:
            for micro_batches, tokens in run.epoch(loader, progress):
                loss = train_step(engine, micro_batches)
                metrics.record(progress.step + 1, progress.epoch, loss, tokens)
                progress.advance(loader.batch_sampler.steps_per_epoch, loader.batch_sampler.global_batch)
                if run.evaluates(progress):
                    samples.write(progress.step)
                    metrics.record_evaluation(evaluate(engine, loader, dp_group))
                saving = run.saves(progress, metrics)
                if saving or metrics.flush_due():
                    metrics.flush()
                if saving:
                    save_checkpoint(
                        engine, progress.epoch, progress.step, metrics.newest_loss, progress.epoch_step,
                        progress.samples, run.folder, metrics.newest_eval_loss, config["async_checkpoint"],
                    )  # fmt: skip
                    metrics.restart_clock()


@dataclass
class Worker:
    """A worker's place in the run. What it decides, it decides at the same step as all the others."""

    config: dict[str, Any]
    rank: int
    world_size: int
    folder: Path
    watchdog: Watchdog
    notice: PreemptionNotice = field(default_factory=PreemptionNotice)

    def epoch(self, loader: DataLoader, progress: Progress) -> Iterator[tuple[list[dict[str, torch.Tensor]], int]]:
        """The global batches that are left of the epoch, each passed through the watchdog."""
        loader.batch_sampler.set_epoch(progress.epoch, start_step=progress.epoch_step)
        return self.watchdog.steps(global_batches(loader), progress)

    def evaluates(self, progress: Progress) -> bool:
        """Whether to evaluate now: with each checkpoint that was planned, and every `eval_interval` steps."""
        due = progress.due(self.config["checkpoint_interval"]) or progress.due(self.config["eval_interval"])
        return bool(self.config["eval_samples"]) and due

    def saves(self, progress: Progress, metrics: StepMetrics) -> bool:
        """Whether to save now: as planned, or since a node will be taken away. Collective: every rank asks."""
        return progress.due(self.config["checkpoint_interval"]) or (metrics.flush_due() and self.notice.arrived())


@contextlib.contextmanager
def worker(config: dict[str, Any]) -> Iterator[Worker]:
    """What surrounds the loop on a worker.

    An environment of Ray's alone, a log file of its own, the grid that the workers there are can form, a watchdog, the
    run's folder held against other writers, words for what runs out of memory, and CUDA graphs freed at the end.
    """
    forget_others()
    context, folder = ray.train.get_context(), Path(config["storage_path"], config["experiment_name"])
    rank, world_size = context.get_world_rank(), context.get_world_size()
    log_to_file(folder, rank)
    config = fit_to_world(config, world_size)
    patience = config["hang_timeout_seconds"]
    with explain_out_of_memory(config), Watchdog(folder, rank, world_size, patience) as watchdog:
        claim_run(folder, rank)
        try:
            yield Worker(config, rank, world_size, folder, watchdog)
        finally:
            graphs.release()
