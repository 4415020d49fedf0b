"""Save to and load from the run's folder, in DeepSpeed's own format, under Ray Train's bookkeeping.

Every rank writes its part: the weights of its TP shard, its ZeRO share of masters and moments, its random states. The
client state has where the run was: `Progress`. A checkpoint counts when all ranks have written theirs (`run_folder`).

A checkpoint is a pickle, and a pickle can hold code. Loading one here executes nothing from it (`safe_loading`), and
one that another run wrote is refused.
"""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import ray.train
import ray.train.collective
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from torch.utils.data import DataLoader

from tp2d_helpers.checkpoint import run_folder
from tp2d_helpers.checkpoint.files import plain_path
from tp2d_helpers.checkpoint.identity import check_agreement
from tp2d_helpers.checkpoint.resize import UNIVERSAL, safe_loading, universal_checkpoint
from tp2d_helpers.checkpoint.restore import (
    load_trained,
    random_states,
    set_random_states,
    settings_stay,
    settle_on_new_grid,
    without_padding,
)
from tp2d_helpers.checkpoint.run_folder import Progress
from tp2d_helpers.checkpoint.writer import CheckpointWriter
from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.model.engine import PRECISIONS
from tp2d_helpers.speed.optimizer import FusedZeroOptimizer


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    epoch: int,
    step: int,
    avg_loss: float,
    epoch_step: int = 0,
    samples: int = 0,
    run_dir: str | Path = ".",
    eval_loss: float | None = None,
    background: bool = False,
) -> None:
    """Save a checkpoint and report it to Ray Train. Collective: every rank calls it with the same arguments.

    The ranks write straight into the run's folder, which all nodes share.

    Args:
        epoch: whole epochs done.
        step: optimizer steps done over the whole run.
        avg_loss: mean loss of the newest step, kept with the checkpoint as one of its metrics.
        epoch_step: optimizer steps done in the epoch that is under way.
        samples: samples consumed over the whole run.
        run_dir: the run's folder, `<storage_path>/<experiment_name>`.
        eval_loss: loss on the held-out samples, another of its metrics.
        background: copy to host memory and return; Ray Train's upload thread writes while training goes on. It waits
            for the checkpoint before, if that is still being written.
    """
    engine.whole_weights.compare()
    if isinstance(engine.optimizer, FusedZeroOptimizer):
        engine.optimizer.settle()
    progress = Progress(epoch=epoch, epoch_step=epoch_step, step=step, samples=samples)
    if not isinstance(engine.checkpoint_engine, CheckpointWriter):
        engine.checkpoint_engine = CheckpointWriter()
    writer: CheckpointWriter = engine.checkpoint_engine
    writer.disk.wait()
    folder = _new_folder(Path(run_dir), step)
    writer.begin(folder, copy=background)
    scaler = engine.optimizer.loss_scaler if engine.fp16_enabled() else None  # universal checkpoints lack it
    state = {**dataclasses.asdict(progress), "loss_scaler": scaler and vars(scaler)}
    tag = f"step_{step:08d}"
    engine.save_checkpoint(str(folder), tag=tag, client_state=state, exclude_frozen_parameters=True)
    writer.save(random_states(), str(folder / f"random_{dist.get_rank()}.pt"))
    metrics = {"loss": avg_loss, "epoch": epoch, "step": step} | ({} if eval_loss is None else {"eval_loss": eval_loss})
    where = {"step": step, "epoch": epoch, "epoch_step": epoch_step}
    facts = {**where, "world_size": dist.get_world_size(), **_grid(engine), "precision": _precision(engine)}
    facts["metrics"] = metrics
    _report(folder, writer, facts, background)


def _report(folder: Path, writer: CheckpointWriter, facts: dict[str, Any], background: bool) -> None:
    """Tell Ray Train of the checkpoint; it calls `writer.write`, at once or in its upload thread."""

    def upload(checkpoint: Checkpoint, _: str) -> Checkpoint:
        """Nothing moves: the checkpoint is in its place already."""
        writer.write(**facts)
        return checkpoint

    ray.train.report(
        facts["metrics"],
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC if background else CheckpointUploadMode.SYNC,
        checkpoint_upload_fn=upload,
        delete_local_checkpoint_after_upload=False,  # it is the uploaded one
    )
    if not background:
        ray.train.collective.barrier()  # the slowest rank may take longer than the others' next collective lasts


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    run_dir: str | Path = ".",
    seed: int = 42,
    trusted: bool = False,
    loader: DataLoader | None = None,
) -> Progress:
    """Load the run's newest complete checkpoint into the engine; say where the run goes on. Collective.

    A checkpoint of another grid is converted first, once, by rank 0. What the optimizer was set to stays: the learning
    rate, weight decay, betas, clipping. For the schedule of the learning rate see `schedule_learning_rate`.

    Args:
        seed: of the run; on another grid than before, dropout starts anew from it and the step.
        trusted: load it even if another run wrote it.
        loader: of this rank's data; an epoch that is shorter now than what was done of it is over.

    Returns:
        The progress at the checkpoint, all zeros if there is none.

    Raises:
        ConfigError: if another run wrote it, and `trusted` is False; or if a rank has another model or other
            data than the run.
        RuntimeError: if the checkpoint is there but can't be loaded.
    """
    folder, tag, moved = _on_rank_0(lambda: _choose(engine, Path(run_dir), trusted))
    if loader:
        check_agreement(engine, loader, Path(run_dir))
    if folder is None:
        return Progress()
    engine.checkpoint_engine = CheckpointWriter()
    # What the key "checkpoint": {"load_universal": …} of the config sets for good, before it is known what is there.
    engine.load_universal_checkpoint = lambda: tag == UNIVERSAL
    try:
        with safe_loading(), settings_stay(engine), without_padding(engine), plain_path(folder) as place:
            path, state = engine.load_checkpoint(str(place), tag=tag, custom_load_fn=load_trained)
    except pickle.UnpicklingError as error:
        raise RuntimeError(f"{folder} holds code, which is not executed; remove it ({reason(error)})") from error
    del engine.load_universal_checkpoint
    if path is None:
        raise RuntimeError(f"{folder} holds no DeepSpeed checkpoint that this grid of ranks can load")
    progress = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
    if moved:
        settle_on_new_grid(engine, progress.step, seed, state["loss_scaler"])
    else:
        set_random_states(torch.load(folder / f"random_{dist.get_rank()}.pt", weights_only=True))
    if loader and progress.epoch_step >= loader.batch_sampler.steps_per_epoch:
        progress.epoch, progress.epoch_step = progress.epoch + 1, 0
    return progress


def _choose(engine: deepspeed.DeepSpeedEngine, run_dir: Path, trusted: bool) -> tuple[Path | None, str, bool]:
    """The checkpoint to load, the tag in it, and whether it is of another grid; on rank 0 only."""
    for line in run_folder.remove_unfinished(run_dir):
        print(f"removed: {line}", flush=True)
    folder, skipped = run_folder.newest_checkpoint(run_dir)
    for line in skipped:
        print(f"not used: {line}", flush=True)
    if folder is None:
        return None, "", False
    run_folder.check_origin(folder, trusted)
    manifest, now = run_folder.read_manifest(folder), _precision(engine)
    if manifest["precision"] != now:
        raise ConfigError(
            f"precision: {folder} was trained in {manifest['precision']}, and this run computes in {now}; set "
            f"precision to {manifest['precision']!r}, or take another experiment_name"
        )
    moved = any(manifest[name] != value for name, value in _grid(engine).items())
    tag = universal_checkpoint(folder) if moved else f"step_{manifest['step']:08d}"
    return folder, tag, moved


def _on_rank_0(function: Any) -> Any:
    """Call it on rank 0 and return its result on all ranks, so that all decide alike. Collective.

    Before torch's collective, which fails after half an hour, the ranks meet at Ray Train's barrier, which waits: for
    rank 0, or for ranks that come late because their node had to tokenise, or their checkpoint is still being written.
    """
    answer = [function() if dist.get_rank() == 0 else None]
    ray.train.collective.barrier()
    dist.broadcast_object_list(answer)
    return answer[0]


def _new_folder(run_dir: Path, step: int) -> Path:
    """An empty folder for a checkpoint. One that all ranks have finished is never written into again."""

    def choose() -> Path:
        """The first name that no finished checkpoint has, cleared of an unfinished one; on rank 0 only."""
        folder, count = run_dir / f"checkpoint_{step:08d}", 1
        while run_folder.is_finished(folder):
            count += 1
            folder = run_dir / f"checkpoint_{step:08d}_{count}"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    return _on_rank_0(choose)


def _precision(engine: deepspeed.DeepSpeedEngine) -> str:
    if any(hasattr(module, "float8") for module in engine.module.modules()):
        return "fp8"
    dtype = next(engine.module.parameters()).dtype
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def _grid(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    stage = int(engine.zero_optimization_stage())
    return {"tp_size": engine.mp_world_size, "dp_size": engine.seq_dp_world_size, "zero_stage": stage}
