"""What a run's folder tells: which checkpoint is the newest, which can go, and what a damaged file means."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from tp2d_helpers.checkpoint import files
from tp2d_helpers.checkpoint.files import write_json
from tp2d_helpers.checkpoint.run_folder import (
    checkpoints,
    mend_ray_snapshot,
    problem_of,
    recorded,
    remove_unfinished,
    write_manifest,
)
from tp2d_helpers.checkpoint.settings import continue_run, record_run
from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.preflight.folder import check_checkpoints


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Settings of a run that has been recorded."""
    config = make_config(
        storage_path=str(tmp_path), experiment_name="x", keep_checkpoints_by="eval_loss", tp_size=1, dp_size=1
    )
    record_run(config)
    return config


def checkpoint(config: Config, name: str, world_size: int = 1, **metrics: float) -> Path:
    """A checkpoint of one file, with the manifest of rank 0 alone."""
    folder = config.run_dir / f"checkpoint_{name}"
    folder.mkdir()
    (folder / "weights").write_text("w")
    where = dict(epoch=0, epoch_step=int(name[:8]), tp_size=1, dp_size=world_size, zero_stage=1)
    write_manifest(folder, 0, {"weights": 1}, step=int(name[:8]), world_size=world_size, metrics=metrics, **where)
    return folder


@pytest.mark.parametrize("metrics", [{}, {"eval_loss": float("nan")}])
def test_a_checkpoint_without_the_metric_is_the_worst(config: Config, metrics: dict[str, float]) -> None:
    """As of a preemption before the first evaluation; Ray reads the list, and drops that one first."""
    checkpoint(config, "00000005", eval_loss=3.0)
    checkpoint(config, "00000007", **metrics)
    checkpoint(config, "00000010", eval_loss=2.0)
    mend_ray_snapshot(config)
    storage = StorageContext(storage_path=config.storage_path, experiment_dir_name="x")
    manager = CheckpointManager(CheckpointConfig(2, "eval_loss", "min"), storage)
    names = [Path(result.checkpoint.path).name for result in manager._checkpoint_results]
    assert names == ["checkpoint_00000007", "checkpoint_00000005", "checkpoint_00000010"]
    assert Path(manager.latest_checkpoint_result.checkpoint.path).name == "checkpoint_00000010"


def test_another_order_to_keep_checkpoints_by(config: Config) -> None:
    """Ray puts a new one into its list as if that were in the order of now; from a wrong end, it deletes the best."""
    for name, loss in (("00000005", 2.0), ("00000007", 3.0), ("00000010", 4.0)):
        checkpoint(config, name, eval_loss=loss)
    storage = StorageContext(storage_path=config.storage_path, experiment_dir_name="x")
    for by, steps in (("newest", [5, 7, 10]), ("eval_loss", [10, 7, 5]), ("newest", [5, 7, 10])):
        mend_ray_snapshot(config.change(keep_checkpoints_by=by))
        manager = CheckpointManager(CheckpointConfig(3), storage)
        names = [Path(result.checkpoint.path).name for result in manager._checkpoint_results]
        assert names == [f"checkpoint_{step:08d}" for step in steps]


def test_the_newest_comes_first(tmp_path: Path) -> None:
    names = ["checkpoint_00000030", "checkpoint_00000020_10", "checkpoint_00000020_2", "checkpoint_00000020"]
    for name in [*names, "checkpoint_notes"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == names


def test_what_can_never_be_used_is_removed(config: Config) -> None:
    """An older write that was cut off goes. Complete, damaged, newer and other runs' checkpoints stay."""
    complete, cut_off = checkpoint(config, "00000002"), checkpoint(config, "00000003", world_size=2)
    begun, damaged = config.run_dir / "checkpoint_00000004", checkpoint(config, "00000005")
    begun.mkdir()
    other, newest = checkpoint(config, "00000006", world_size=2), checkpoint(config, "00000008")
    newer = checkpoint(config, "00000009", world_size=2)
    (damaged / "weights").write_text("")
    write_json(other / "rank_0.json", {"run_id": "another", "world_size": 2})
    [(_, found, chosen), *_] = check_checkpoints(config, config, {}, 9)
    assert checkpoints(config.run_dir) == [newer, newest, other, damaged, complete]
    assert found == (
        "checkpoint_00000009 was not finished (rank_1.json is missing); "
        "checkpoint_00000005 has weights truncated (0 of 1 bytes)"
    )
    assert chosen == (
        "goes on from checkpoint_00000008, damaged checkpoints stay until you remove them, model and "
        "data compared by name alone, as an older version recorded them, removed, as it could never "
        f"be used: {begun.name} was not finished (rank_0.json is missing); "
        f"{cut_off.name} was not finished (rank_1.json is missing)"
    )
    assert problem_of(newest) is None and check_checkpoints(config, config, {}, 9)[0][2].count("removed") == 0


def test_nothing_is_removed_where_no_checkpoint_is_complete(config: Config) -> None:
    folder = checkpoint(config, "00000003", world_size=2)
    assert remove_unfinished(config.run_dir) == [] and folder.exists()


@pytest.mark.parametrize("content", ["", '{"model_name": "de', "[]", "\0\0\0"])
def test_a_damaged_config_is_told_in_words(config: Config, content: str) -> None:
    """As a power failure leaves it, where it wasn't flushed."""
    (config.run_dir / "config.json").write_text(content)
    for ask in (lambda: recorded(config.run_dir), lambda: continue_run(config), lambda: record_run(config)):
        with pytest.raises(ConfigError, match=r"experiment_name = 'x': .*/x/config\.json is damaged .*Put back a copy"):
            ask()
    assert (config.run_dir / "config.json").read_text() == content


def test_a_small_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contents are flushed before it is renamed, and the folder after that."""
    flushed, sync, path = [], os.fsync, tmp_path / "config.json"

    def recording(handle: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{handle}").is_dir(), path.exists()))
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", recording)
    write_json(path, {"a": 1})
    assert flushed == [(False, False), (True, True)] and json.loads(path.read_text()) == {"a": 1}
