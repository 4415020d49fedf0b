"""The part of preflight that looks at the run's folder: can all nodes write there, and what is there already."""

from __future__ import annotations

import contextlib
import math
import uuid
from pathlib import Path
from typing import Any

from tp2d_helpers.checkpoint.disk import check_space, free_bytes, size
from tp2d_helpers.checkpoint.files import lock_run
from tp2d_helpers.checkpoint.resize import universal_bytes, universal_problem
from tp2d_helpers.checkpoint.run_folder import (
    checkpoints,
    is_finished,
    last_step,
    mend_ray_snapshot,
    newest_checkpoint,
    problem_of,
    read_manifest,
    recorded,
    remove_unfinished,
)
from tp2d_helpers.checkpoint.settings import CONTENTS, GRID, changes, check_same_data, must_stay, settings_of
from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.lora import adapter_parameters
from tp2d_helpers.preflight.nodes import check_nodes
from tp2d_helpers.training.metrics import read_metrics
from tp2d_helpers.training.schedule import learning_rate_at


def check_storage(config: Config) -> str:
    """Try to write where the run will, on the driver and on the other nodes. If that fails, nothing stays behind.

    Raises:
        ConfigError: if the folder can't be written, or isn't the same on all nodes.
    """
    made, probe = [], config.run_dir / f".probe-{uuid.uuid4().hex}"
    try:
        made = [folder for folder in (config.run_dir, *config.run_dir.parents) if not folder.exists()]
        config.run_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        found = "writable" + check_nodes(config, probe)
        made = []
        return found
    except OSError as error:
        raise ConfigError(
            f"storage_path = {config.storage_path!r}: can't be written ({error.strerror}); "
            "take a folder that this user may write and that all nodes share"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            for file in config.run_dir.glob(f"{probe.name}*"):
                file.unlink()
            for folder in made:
                folder.rmdir()


def check_room(config: Config, model: ModelFacts, steps: int) -> str:
    """What is free of the storage, in words, and what a checkpoint takes.

    Args:
        steps: per epoch.

    Raises:
        ConfigError: if the next checkpoint can't be written, or the last one not be converted for another grid.
    """
    newest, _ = newest_checkpoint(config.run_dir)
    needed, setting = checkpoint_bytes(config, model), f"storage_path = {config.storage_path!r}: "
    if newest and last_step(config, steps) == read_manifest(newest)["step"]:
        return ""
    if newest and _is_converted(newest, config) and universal_problem(newest):
        peak, left = universal_bytes(newest)
        check_space(config.run_dir, peak, f"converting {newest.name} for the new grid", setting)
        needed += left
    check_space(config.run_dir, needed, "the next checkpoint", setting)
    kept = config.checkpoints_to_keep + 1 - len(checkpoints(config.run_dir))  # a new one comes before an old one goes
    free, one = free_bytes(config.run_dir), checkpoint_bytes(config, model)
    tight = f"; tight: up to {config.checkpoints_to_keep + 1} are there at once" if free < kept * one else ""
    return f", {size(free)} free, a checkpoint takes {size(one)}{tight}"


def checkpoint_bytes(config: Config, model: ModelFacts) -> int:
    """Bytes of a checkpoint: masters and two moments of what is trained; below stage 3 the weights, too."""
    trained = adapter_parameters(model.meta, config.model_dump()) if config.lora_rank else model.parameters
    weights = 0 if config.zero_stage == 3 else 4 if config.precision == "fp32" else 2
    return trained * (weights + 3 * (2 if config.master_weights == "bf16" else 4))


def _is_converted(newest: Path, config: Config) -> bool:
    manifest = read_manifest(newest)
    return any(manifest[name] != getattr(config, name) for name in GRID)


def check_checkpoints(config: Config, given: Config, data: dict[str, Any], steps: int) -> list[tuple[str, str, str]]:
    """Rows about the checkpoint that the run will go on from, and about what was set otherwise; none for a new run.

    Args:
        config: what `continue_run` made of `given`.
        data: what was tokenised (`TokenDataset.identity`).
        steps: per epoch.

    Raises:
        ConfigError: if another process is writing to the run's folder, or the data is not the run's.
    """
    with lock_run(config):
        removed = remove_unfinished(config.run_dir) if recorded(config.run_dir) else []
        mend_ray_snapshot(config)
    newest, skipped = newest_checkpoint(config.run_dir)
    then = settings_of(config.run_dir, newest)
    if must_stay("data", then, config, newest):
        check_same_data(then.get("data"), data, config.dataset_name)
    if not newest:
        return [("checkpoint", "; ".join(skipped), "begins anew")] if skipped else []
    finished = [folder for folder in checkpoints(config.run_dir) if is_finished(folder)]
    damaged = [f"{folder.name} {problem}" for folder in finished if (problem := problem_of(folder))]
    chosen = _how_it_goes_on(newest, config, given, steps)
    if damaged:
        chosen.append("damaged checkpoints stay until you remove them")
    if unknown := [kind for kind in CONTENTS if not then.get(kind)]:
        chosen.append(f"{' and '.join(unknown)} compared by name alone, as an older version recorded them")
    if removed:
        chosen.append(f"removed, as it could never be used: {'; '.join(removed)}")
    rows = [("checkpoint", "; ".join(dict.fromkeys(skipped + damaged)) or "complete", ", ".join(chosen))]
    changed = changes(then, config)
    counts = "what is set now counts" + _how_the_rate_goes_on(config, read_manifest(newest)["step"], steps)
    return [*rows, ("changed since", changed, counts)] if changed else rows


def _how_it_goes_on(newest: Path, config: Config, given: Config, steps: int) -> list[str]:
    manifest, chosen = read_manifest(newest), [f"goes on from {newest.name}"]
    if _is_converted(newest, config):
        chosen.append("converted for the new grid")
    if config.gradient_accumulation_steps != given.gradient_accumulation_steps:
        chosen.append(
            f"gradient_accumulation_steps {config.gradient_accumulation_steps}, so that a step keeps its "
            f"{config.samples_per_step} samples"
        )
    if manifest["epoch_step"] >= steps:
        chosen.append(f"epoch {manifest['epoch'] + 1} is over: {manifest['epoch_step']} steps of {steps} are done")
    if last_step(config, steps) == manifest["step"]:
        chosen.append(f"nothing is left to train: num_epochs is {config.num_epochs}")
    return chosen


def _how_the_rate_goes_on(config: Config, step: int, steps: int) -> str:
    """The learning rate before and after the checkpoint of a step, where the curve that is set now differs there."""
    settings, last = config.model_dump(), last_step(config, steps)
    records = read_metrics(config.run_dir / "metrics.jsonl")
    then = [record["learning_rate"] for record in records if record["step"] == step]
    if step >= last or not then or math.isclose(then[0], learning_rate_at(step, settings, last), abs_tol=1e-12):
        return ""
    now = learning_rate_at(step + 1, settings, last)
    return f"; the learning rate was {then[0]:.3g} in step {step} and is {now:.3g} in step {step + 1} of {last}"
