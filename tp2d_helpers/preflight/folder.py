"""The part of preflight that looks at the run's folder: can all nodes write there, and what is there already."""

from __future__ import annotations

import contextlib
import uuid

from tp2d_helpers.checkpoint.files import lock_run
from tp2d_helpers.checkpoint.run_folder import (
    GRID,
    check_origin,
    checkpoints,
    is_finished,
    mend_ray_snapshot,
    newest_checkpoint,
    problem_of,
    recorded,
    remove_unfinished,
)
from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.preflight.cluster import check_nodes


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


def check_checkpoints(config: Config, given: Config) -> list[tuple[str, str, str]]:
    """A row about the checkpoint that the run will go on from; none for a new run.

    Raises:
        ConfigError: if another process is writing to the run's folder, or another run wrote the checkpoint.
    """
    run_dir, found = config.run_dir, recorded(config.run_dir)
    with lock_run(config):
        removed = remove_unfinished(run_dir) if found else []
        mend_ray_snapshot(config)
    newest, skipped = newest_checkpoint(run_dir)
    if not found or not (newest or skipped):
        return []
    if newest:
        check_origin(newest, config.trust_checkpoint)
    chosen = [f"goes on from {newest.name}" if newest else "begins anew"]
    if any(found[name] != getattr(config, name) for name in GRID):
        chosen.append("converted for the new grid")
    if config.gradient_accumulation_steps != given.gradient_accumulation_steps:
        chosen.append(
            f"gradient_accumulation_steps {config.gradient_accumulation_steps}, so that a step keeps its "
            f"{config.global_batch_size} samples"
        )
    finished = [folder for folder in checkpoints(run_dir) if is_finished(folder)]
    damaged = [f"{folder.name} {problem}" for folder in finished if (problem := problem_of(folder))]
    if damaged:
        chosen.append("damaged checkpoints stay until you remove them")
    if removed:
        chosen.append(f"removed, as it could never be used: {'; '.join(removed)}")
    return [("checkpoint", "; ".join(dict.fromkeys(skipped + damaged)) or "complete", ", ".join(chosen))]
