"""A full disk is told by its folder, before the work where that can be foreseen, and nothing half-made stays on it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from child import little_room
from safetensors.torch import save_file

from tp2d_helpers.cache import build_once, check_space, clear_cache, is_full, parts_of
from tp2d_helpers.config import ConfigError
from tp2d_helpers.preflight.environment import cannot_write

MEGABYTE = 10**6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache on a disk of a megabyte."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path]).returncode:
        pytest.skip("only root can mount a disk")
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    subprocess.run(["umount", "-l", tmp_path], check=True)


def write_bytes(scratch: Path) -> None:
    parts_of(scratch.parent / "tokens-a").mkdir()
    (scratch / "tokens.bin").write_bytes(bytes(3 * MEGABYTE))


def write_tensors(scratch: Path) -> None:
    """By a library that has an exception of its own."""
    save_file({"weight": torch.zeros(MEGABYTE)}, scratch / "model.safetensors")


@pytest.mark.parametrize("build", [write_bytes, write_tensors])
def test_a_full_disk(small_disk: Path, build) -> None:
    words = (
        rf"^TP2D_CACHE = '{small_disk}': no room to make tokens-a after [01]\.\d MB, \d\.\d MB free \(.*No space left"
    )
    with pytest.raises(ConfigError, match=words + ".*; make room, or set TP2D_CACHE to a folder on a larger disk"):
        build_once(small_disk / "tokens-a", build)
    assert [path.name for path in small_disk.iterdir()] == ["tokens-a.lock"]
    (small_disk / "rest").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    assert cannot_write(small_disk) == "No space left on device"
    clear_cache()


@pytest.mark.parametrize("build", [write_bytes, write_tensors])
def test_a_quota(folder: Path, build) -> None:
    words = rf"^TP2D_CACHE = '{folder}': no room to make tokens-a .*File too large"
    with pytest.raises(ConfigError, match=words), little_room(MEGABYTE):
        build_once(folder / "tokens-a", build)
    assert [path.name for path in folder.iterdir()] == ["tokens-a.lock"]
    with little_room(1):
        assert cannot_write(folder) == "File too large"


def test_what_will_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate may be twice too large."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500 * MEGABYTE))
    check_space(folder / "not" / "there", 900 * MEGABYTE, "they")
    with pytest.raises(
        ConfigError, match=r"^TP2D_CACHE = .*: 0\.5 GB free, and they need about 1\.1 GB; make room, or"
    ):
        check_space(folder / "tokens-a", 1100 * MEGABYTE, "they")


def test_whose_error_it_is() -> None:
    full, wrapped = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), RuntimeError("it failed")
    wrapped.__cause__ = full
    assert is_full(full) and is_full(wrapped) and is_full(RuntimeError("No space left on device (os error 28)"))
    assert is_full(OSError("Not enough disk space. Needed: 3 GB"))
    assert not is_full(FileNotFoundError(errno.ENOENT, "No such file")) and not is_full(ValueError())
    wrapped.__cause__ = wrapped
    assert not is_full(wrapped)


def test_an_error_of_another_folder_passes(folder: Path) -> None:
    def build(scratch: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/data/train.jsonl")

    with pytest.raises(PermissionError, match="Permission denied"):
        build_once(folder / "tokens-a", build)
