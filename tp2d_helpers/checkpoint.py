"""Save to and load from Ray Train's storage, in DeepSpeed's own format.

Every rank writes its part: the weights of its TP shard, and its ZeRO share of masters and moments. The client state has
where the run was: `Progress`. Ray Train keeps count of the checkpoints, and hands a restarted worker the newest.

A checkpoint is a pickle: loading one runs code from it. `load_checkpoint` only ever loads what Ray Train kept for this
run, in this run's folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import deepspeed
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode


@dataclasses.dataclass
class Progress:
    """Where a run is. All counts are of what is done: 0 at the start."""

    epoch: int = 0  # whole epochs
    epoch_step: int = 0  # optimizer steps in the epoch that is under way
    step: int = 0  # optimizer steps over the whole run
    samples: int = 0  # samples over the whole run

    def advance(self, steps_per_epoch: int, samples: int) -> None:
        """Count one more optimizer step; the last step of an epoch begins the next one."""
        self.step, self.samples, self.epoch_step = self.step + 1, self.samples + samples, self.epoch_step + 1
        if self.epoch_step == steps_per_epoch:
            self.epoch, self.epoch_step = self.epoch + 1, 0

    def checkpoint_due(self, interval: int) -> bool:
        """True at the end of an epoch, and every `interval` steps (0: only at the end of an epoch)."""
        return self.epoch_step == 0 or (interval > 0 and self.step % interval == 0)


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    epoch: int,
    step: int,
    avg_loss: float,
    epoch_step: int = 0,
    samples: int = 0,
    run_dir: str | Path = ".",
) -> None:
    """Save a checkpoint and report it to Ray Train. Collective: every rank calls it with the same arguments.

    The ranks write straight into the run's folder, which all nodes share, so nothing is copied; the checkpoint counts
    from the moment that Ray Train has every rank's report.

    Args:
        epoch: whole epochs done.
        step: optimizer steps done over the whole run.
        avg_loss: mean loss of the newest step, kept with the checkpoint as its metric.
        epoch_step: optimizer steps done in the epoch that is under way.
        samples: samples consumed over the whole run.
        run_dir: the run's folder, `<storage_path>/<experiment_name>`.
    """
    progress = Progress(epoch=epoch, epoch_step=epoch_step, step=step, samples=samples)
    folder = Path(run_dir) / f"checkpoint_{step:08d}"
    engine.save_checkpoint(str(folder), tag=f"step_{step:08d}", client_state=dataclasses.asdict(progress))
    ray.train.report(
        {"loss": avg_loss, "epoch": epoch, "step": step},
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )


def load_checkpoint(engine: deepspeed.DeepSpeedEngine) -> Progress:
    """Load the newest checkpoint that Ray Train has of this run into the engine; say where the run goes on.

    Returns:
        The progress at the checkpoint, all zeros if there is none.

    Raises:
        RuntimeError: if the checkpoint is there but can't be loaded.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress()
    with checkpoint.as_directory() as folder:
        path, state = engine.load_checkpoint(folder)
        if path is None:
            raise RuntimeError(f"{checkpoint} holds no DeepSpeed checkpoint that this grid of ranks can load")
    return Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
