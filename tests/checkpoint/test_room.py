"""What a checkpoint and its conversion take of the disk is known beforehand, and refused where there is too little."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from grid import Run

from tp2d_helpers.checkpoint import disk, resize
from tp2d_helpers.checkpoint.resize import convert, universal_bytes, universal_checkpoint
from tp2d_helpers.checkpoint.run_folder import newest_checkpoint
from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.preflight.folder import check_room, checkpoint_bytes

Train = Callable[..., Run]
LIFE = dict(num_epochs=2, debug_steps=6, checkpoint_interval=4, eval_samples=5, eval_interval=3)  # as test_checkpoint's


def taken(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_file_system_that_does_not_say_what_is_free() -> None:
    disk.check_space(Path("/proc/nowhere"), 10**30, "anything")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """free(n): n bytes are free on every disk."""
    found = SimpleNamespace(total=10**15, free=10**15)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: found)
    return lambda count: setattr(found, "free", int(count))


@pytest.mark.parametrize("settings", [
    dict(zero_stage=1, precision="fp32"), dict(zero_stage=1, precision="bf16"), dict(zero_stage=3, precision="bf16"),
    dict(zero_stage=3, precision="bf16", dp_size=2),
    dict(zero_stage=1, precision="bf16", master_weights="bf16"), dict(zero_stage=1, precision="fp32", lora_rank=64),
], ids=str)  # fmt: skip
def test_the_bytes_that_a_checkpoint_and_its_conversion_take(
    monkeypatch: pytest.MonkeyPatch, train: Train, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Predicted within a few percent, but for what a small file has besides its tensors."""
    config = Config(**train("llama", debug_steps=1, **settings).config)
    checkpoint, _ = newest_checkpoint(config.run_dir)
    predicted, extra = checkpoint_bytes(config, ModelFacts.read(config.model_name)), 150_000
    assert predicted <= taken(checkpoint) <= 1.02 * predicted + extra
    copy = Path(shutil.copytree(checkpoint, tmp_path / "run" / checkpoint.name))
    save, peaks, before = torch.save, [], taken(copy)

    def saving(*arguments: Any, **more: Any) -> None:
        save(*arguments, **more)
        peaks.append(taken(copy) - before)

    monkeypatch.setattr(torch, "save", saving)
    convert(copy)
    peak, (most, left) = max(peaks), universal_bytes(copy)
    few = 400_000  # of each weight, several small files
    assert 0.9 * most < peak < 1.35 * most + few and left < taken(copy) - before < left + few


def test_too_little_room_is_told_before_a_run(train: Train, free: Callable[[int], None]) -> None:
    config = Config(**train("qwen2-tied", **LIFE, tp_size=1, dp_size=2).config)
    model = ModelFacts.read(config.model_name)
    one, new = checkpoint_bytes(config, model), config.change(experiment_name="new")
    free(one - 1)
    message = rf"storage_path = '{config.storage_path}': the next checkpoint needs 3.4 MB, and the disk of .* free"
    with pytest.raises(ConfigError, match=message.replace("3.4", rf"{one / 1e6:.1f}")):
        check_room(new, model, 6)
    assert not new.run_dir.exists() and check_room(config, model, 6) == "", "nothing is left to train"
    free(one)
    assert check_room(new, model, 6).endswith("; tight: up to 3 are there at once")
    free(3 * one)
    assert check_room(new, model, 6) == f", {3 * one / 1e6:.1f} MB free, a checkpoint takes {one / 1e6:.1f} MB"
    free(1.1 * one)
    other = config.change(tp_size=2, dp_size=1, num_epochs=3)  # which takes 1.5 checkpoints, and of that leaves 0.75
    with pytest.raises(ConfigError, match=r"converting checkpoint_00000012 for the new grid needs .* MB, and the disk"):
        check_room(other, model, 6)
    newest, _ = newest_checkpoint(config.run_dir)
    free(universal_bytes(newest)[0])  # enough to convert it, and then not for the next one beside it
    with pytest.raises(ConfigError, match="the next checkpoint needs"):
        check_room(other, model, 6)


def test_a_conversion_for_which_there_is_no_room_leaves_nothing(
    train: Train, tmp_path: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, _ = newest_checkpoint(Config(**train("qwen2-tied", **LIFE, tp_size=1, dp_size=2).config).run_dir)
    checkpoint = Path(shutil.copytree(newest, tmp_path / newest.name))
    before = sorted(checkpoint.rglob("*"))

    def full(arguments: Any) -> None:
        Path(arguments.output_folder, "zero").mkdir(parents=True)
        raise RuntimeError("enforce fail at inline_container.cc: file write failed")

    with monkeypatch.context() as patch:
        patch.setattr(resize.ds_to_universal, "main", full)
        with pytest.raises(RuntimeError, match="inline_container"):
            convert(checkpoint)
        assert sorted(checkpoint.rglob("*")) == before
        free(universal_bytes(checkpoint)[0] - 1)
        with pytest.raises(ConfigError, match=r"its form for another grid needs .* MB, and the disk of .* MB free"):
            convert(checkpoint)
    assert sorted(checkpoint.rglob("*")) == before
    monkeypatch.undo()
    assert universal_checkpoint(checkpoint) == "universal"
