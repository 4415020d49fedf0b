"""A folder of the cache is whole, on the disk before it has its name, and looked at once by all processes of a node."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tp2d_helpers.cache import build_once, seal
from tp2d_helpers.cache.seal import GOOD_SECONDS, LIST, damage

FILES = {"tokens.bin": b"0123456789" * 1000, "part/meta.json": b"{}", "empty": b""}


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this node keeps what its processes found."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    return tmp_path / "node"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    names, read = [], seal._hash

    def recording(path: Path) -> str:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(seal, "_hash", recording)
    return names


def fill(scratch: Path) -> None:
    for name, content in FILES.items():
        (scratch / name).parent.mkdir(exist_ok=True)
        (scratch / name).write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])


def zero(path: Path) -> None:
    """As many bytes, with a block that the disk never got."""
    content = path.read_bytes()
    path.write_bytes(content[:1] + bytes(len(content) - 1))


@pytest.mark.parametrize("name, harm, words", [
    ("tokens.bin", cut, "tokens.bin has 2,500 bytes, not 10,000"),
    ("tokens.bin", zero, "tokens.bin has other contents"),
    ("tokens.bin", Path.unlink, "tokens.bin is missing"), ("empty", Path.unlink, "empty is missing"),
    ("empty", lambda path: path.write_bytes(b"1"), "empty has 1 bytes, not 0"),
    ("part/meta.json", zero, "part/meta.json has other contents"), (LIST, cut, f"{LIST} is no list of its files"),
    (LIST, lambda path: path.write_text("{}\n[]"), f"{LIST} is no list of its files"),
    (LIST, lambda path: path.write_text('["a"]'), f"{LIST} is no list of its files"),
    (LIST, zero, f"{LIST} is no list of its files"), (LIST, Path.unlink, f"{LIST} is missing"),
])  # fmt: skip
def test_a_damaged_folder_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, harm: Callable[[Path], None], words: str
) -> None:
    folder = build_once(tmp_path / "tokens-a", fill)
    assert damage(folder) == ""
    harm(folder / name)
    assert build_once(folder, fill) == folder
    assert capsys.readouterr().out == f"{folder} is damaged ({words}): it is made anew\n"
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    build_once(folder, lambda _: pytest.fail("it is whole"))
    assert [path.name for path in tmp_path.glob("tokens-a*")] == ["tokens-a", "tokens-a.lock"]


def test_the_disk_has_all_of_it_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, rename, fsync = [], Path.rename, os.fsync

    def recording(handle: int) -> None:
        fsync(handle)
        flushed.append(Path(f"/proc/self/fd/{handle}").readlink())

    def renaming(path: Path, target: Path) -> Path:
        if target.name == "tokens-a":
            assert {path, path / "part", path / LIST, *(path / name for name in FILES)} <= {*flushed}
            flushed.append(target)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(Path, "rename", renaming)
    assert build_once(tmp_path / "tokens-a", fill) in flushed


def test_the_processes_of_a_node_read_it_once(tmp_path: Path, hashed: list[str], node: Path) -> None:
    folder = build_once(tmp_path / "tokens-a", fill)
    del hashed[:]
    ranks = [threading.Thread(target=build_once, args=(folder, fill)) for _ in range(8)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(hashed) == ["empty", "meta.json", "tokens.bin"]


@pytest.mark.parametrize("again", ["restarted", "touched", "a day later", "no verdict"])
def test_it_is_read_again(
    tmp_path: Path, hashed: list[str], node: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    folder = build_once(tmp_path / "tokens-a", fill)
    build_once(folder, fill)
    del hashed[:]
    build_once(folder, fill)
    assert not hashed
    if again == "restarted":
        monkeypatch.setattr(seal, "_boot", lambda: "another")
    if again == "touched":
        (folder / "tokens.bin").touch()
    verdict = next(path for path in node.glob("tp2d-*/*") if path.suffix == "")
    if again == "a day later":
        os.utime(verdict, (0, verdict.stat().st_mtime - GOOD_SECONDS - 1))
    if again == "no verdict":
        verdict.write_bytes(b"")
    build_once(folder, fill)
    assert len(hashed) == len(FILES)


def test_without_a_place_for_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process reads it then."""
    folder = build_once(tmp_path / "tokens-a", fill)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    assert damage(folder) == ""
    zero(folder / "tokens.bin")
    assert damage(folder) == "tokens.bin has other contents"
