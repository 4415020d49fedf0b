"""What a run's folder holds: its settings (`tp2d_helpers.checkpoint.settings`), and its checkpoints.

Only complete checkpoints count. One is complete if every rank that wrote it has left its manifest, `rank_<r>.json`,
which it writes last: the run it belongs to and its settings, the grid, and the names and sizes of the files that this
rank wrote. So a checkpoint that was cut off, or that lost a file since, is told from a good one without opening it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tp2d_helpers.checkpoint.files import read_json, write_json
from tp2d_helpers.config import Config, ConfigError

FORMAT = 3  # of a checkpoint: 1 had one parameter group, whose norms and biases decayed; for 2, see `older.py`
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclass
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

    def due(self, interval: int) -> bool:
        """True at the end of an epoch, and every `interval` steps (0: only at the end of an epoch)."""
        return self.epoch_step == 0 or (interval > 0 and self.step % interval == 0)

    def last_step(self, num_epochs: int, steps_per_epoch: int) -> int:
        """The step that the run will end with. An epoch that is shorter now than what was done of it is over."""
        left = (num_epochs - self.epoch) * steps_per_epoch - min(self.epoch_step, steps_per_epoch)
        return self.step + max(left, 0)


def recorded(run_dir: Path) -> dict[str, Any]:
    """What `record_run` wrote into a run's folder: its settings and its `run_id`; empty if there is no run.

    Raises:
        ConfigError: if the file is there, and can't be read.
    """
    path = run_dir / "config.json"
    if not path.exists():
        return {}
    if not (found := read_json(path)):
        raise ConfigError(
            f"experiment_name = {run_dir.name!r}: {path} is damaged (empty, cut off, or not readable), so it is not "
            "known which settings the run has. Put back a copy of it, or take another experiment_name"
        )
    return found


def write_manifest(folder: Path, rank: int, files: dict[str, int], **facts: Any) -> None:
    """Declare this rank's part of a checkpoint complete. The last thing that a rank writes into the folder.

    Args:
        files: size in bytes of each file that the rank wrote, by its path in the folder.
        facts: `step`, `world_size`, the grid and the metrics, the same on all ranks.
    """
    run = recorded(folder.parent)
    own = {"format": FORMAT, "run_id": run.get("run_id"), "settings": run, "files": files}
    write_json(folder / f"rank_{rank}.json", {**facts, **own})


def read_manifest(folder: Path, rank: int = 0) -> dict[str, Any]:
    """The manifest of a rank: the grid that wrote the checkpoint, its step, the run's id, the rank's files."""
    return json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8"))


def is_finished(folder: Path) -> bool:
    """True if all ranks have written their manifests, whatever has become of the files since."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return all((folder / f"rank_{rank}.json").exists() for rank in range(read_manifest(folder)["world_size"]))
    return False


def problem_of(folder: Path) -> str | None:
    """Why a checkpoint can't be used, in a few words with the file; None if it is complete."""
    try:
        world_size = read_manifest(folder)["world_size"]
        manifests = [read_manifest(folder, rank) for rank in range(world_size)]
    except FileNotFoundError as error:
        return f"was not finished ({Path(error.filename).name} is missing)"
    except (ValueError, KeyError, TypeError):
        return "has an unreadable manifest"
    for name, size in ((name, size) for manifest in manifests for name, size in manifest["files"].items()):
        path = folder / name
        if not path.exists():
            return f"lacks {name}"
        if path.stat().st_size != size:
            return f"has {name} truncated ({path.stat().st_size:,} of {size:,} bytes)"
    return None


def checkpoint_tag(folder: Path) -> Path:
    """DeepSpeed's own folder in a checkpoint, `step_<n>`; its file `latest`, which names it, is not needed.

    Raises `FileNotFoundError` if there is none, `ValueError` if there are several.
    """
    found = sorted(path for path in folder.glob("step_*") if path.is_dir() and not path.name.endswith("_universal"))
    if not found:
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no folder step_*")
    if len(found) > 1:
        raise ValueError(f"{folder} must have one folder step_*, and has {[path.name for path in found]}")
    return found[0]


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, the newest first."""
    names = ((path, re.fullmatch(r"checkpoint_(\d+)(?:_(\d+))?", path.name)) for path in run_dir.glob("checkpoint_*"))
    found = {path: (int(name[1]), int(name[2] or 1)) for path, name in names if name and path.is_dir()}
    return sorted(found, key=found.__getitem__, reverse=True)


def newest_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run (None if there is none), and a line for each newer one that is not."""
    skipped = []
    for folder in checkpoints(run_dir):
        problem = problem_of(folder)
        if problem is None:
            return folder, skipped
        skipped.append(f"{folder.name} {problem}")
    return None, skipped


def last_step(config: Config, steps_per_epoch: int) -> int:
    """The step that the run will end with, counted from its newest complete checkpoint on."""
    newest, _ = newest_checkpoint(config.run_dir)
    manifest = read_manifest(newest) if newest else {}
    where = {name: manifest[name] for name in ("epoch", "epoch_step", "step") if newest}
    return Progress(**where).last_step(config.num_epochs, steps_per_epoch)


def remove_unfinished(run_dir: Path) -> list[str]:
    """Remove what was left of writes that were cut off, and can never be used; return a line for each.

    These are the run's unfinished checkpoints that are older than its newest complete one. To be called by who holds
    the run's folder: a newer one may be about to be written. What all ranks had finished stays, damaged or not.
    """
    newest, _ = newest_checkpoint(run_dir)
    found, run_id = checkpoints(run_dir), recorded(run_dir).get("run_id")
    left = [folder for folder in found[found.index(newest) + 1 :] if not is_finished(folder)] if newest else []
    ours = [folder for folder in left if all(read_json(part).get("run_id") == run_id for part in _manifests(folder))]
    lines = [f"{folder.name} {problem_of(folder)}" for folder in ours]
    for folder in ours:
        shutil.rmtree(folder, ignore_errors=True)
    return lines


def _manifests(folder: Path) -> list[Path]:
    return list(folder.glob("rank_*.json"))


def check_origin(folder: Path, trusted: bool) -> None:
    """Refuse a checkpoint that another run wrote, unless the user trusts it, or one in a form that can't be loaded.

    Raises:
        ConfigError: with what to do.
    """
    manifest = read_manifest(folder)
    then, now = manifest.get("run_id"), recorded(folder.parent).get("run_id")
    if then != now and not trusted:
        raise ConfigError(
            f"{folder}: not written by this run (its run_id is {then!r}, this run's {now!r}). Checkpoints are pickles; "
            "remove it, or set trust_checkpoint to True if you know where it comes from"
        )
    form = manifest.get("format", 1)
    if form == 2:
        from tp2d_helpers.checkpoint.older import trains_otherwise  # the folder itself is read without libraries

    if form < 2 or (form == 2 and trains_otherwise(manifest["settings"])):
        raise ConfigError(
            f"{folder}: written by a version of this package that let other weights decay, such as norms and biases, "
            f"or put LoRA on other layers (format {form}, not {FORMAT}). Go on with that version, or export it and "
            "begin a run with the export as model_name"
        )


def mend_ray_snapshot(config: Config) -> None:
    """Make Ray Train's list of checkpoints name those that are complete, the best last, if it doesn't.

    Ray would stop at one that is gone, at a list that was cut off or that another version wrote. It would never delete
    one that was complete but not yet on its list when the run was killed. And it would delete the wrong one where
    another `keep_checkpoints_by` has put the list in order.
    """
    path = config.run_dir / RAY_SNAPSHOT
    complete = [folder for folder in reversed(checkpoints(config.run_dir)) if problem_of(folder) is None]
    metrics = {folder.name: read_manifest(folder).get("metrics", {}) for folder in complete}
    order = {name: index for index, name in enumerate(metrics)}
    if config.keep_checkpoints_by != "newest":  # Ray keeps the last of its list; one without the metric is the worst
        order = dict(sorted(order.items(), key=lambda item: _score(metrics[item[0]], config.keep_checkpoints_by)))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads(path.read_text(encoding="utf-8"))
        listed = [result["checkpoint_dir_name"] for result in state["checkpoint_results"]]
        if state["ray_version"] == importlib.metadata.version("ray") and listed == list(order):
            return
    results = [{"checkpoint_dir_name": name, "metrics": metrics[name]} for name in order]
    latest = {"checkpoint_dir_name": complete[-1].name, "metrics": metrics[complete[-1].name]} if complete else None
    lists = ("pending_training_results", "pending_validation_specs", "validated_checkpoint_dir_names",
             "timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names")  # fmt: skip
    write_json(path, {"ray_version": importlib.metadata.version("ray"), "checkpoint_results": results,
                  "checkpoint_report_indices": list(order.values()), "latest_checkpoint_result": latest,
                  "current_report_index": len(results), **{name: [] for name in lists}})  # fmt: skip


def _score(metrics: dict[str, Any], by: str) -> float:
    value = metrics.get(by)
    return -value if value is not None and math.isfinite(value) else -math.inf
