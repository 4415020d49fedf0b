"""The cache keeps what is used, and gets rid of the rest by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from grid import IMPORT_PATH

from tp2d_helpers.cache import build_once, clear_cache, locks
from tp2d_helpers.cache.clear import DAY, UNUSED_DAYS
from tp2d_helpers.cache.seal import seal

# A builder that says where it builds and stays there until it is killed.
BUILDER = """
import sys, time
from tp2d_helpers.cache import build_once, cache_dir
def build(folder):
    (folder / "tokens.bin").write_bytes(b"half")
    print(folder.name, flush=True)
    time.sleep(600)
build_once(cache_dir() / sys.argv[1], build)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path))
    return tmp_path


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def make(folder: Path, name: str) -> Path:
    return build_once(folder / name, lambda scratch: (scratch / "file").write_text("text"))


def last_changed(path: Path, days: float) -> None:
    """Make a folder look as if it had been left alone for so many days."""
    then = time.time() - days * DAY
    for each in (*path.rglob("*"), path):
        os.utime(each, (then, then))


def test_what_a_dead_builder_left_is_removed_and_what_a_live_one_builds_is_not(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": IMPORT_PATH}
    command = [sys.executable, "-c", BUILDER, "tokens-a"]
    builder = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        scratch = builder.stdout.readline().strip()
        last_changed(folder / scratch, 100)  # age alone does not make it nobody's
        assert clear_cache() == [] and folders(folder) == [scratch]
    finally:
        builder.kill()
        builder.communicate()
    assert clear_cache() == [scratch] and folders(folder) == []
    assert make(folder, "tokens-a").exists()


def test_what_another_node_builds_is_left_alone_for_a_day(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system, the lock that it holds may not be seen here."""
    kept = make(folder, "demo-py3.12")
    (folder / "demo-py3.12.other-node.abcd").mkdir()
    (folder / "demo-py3.12.abcdefgh").mkdir()  # as older versions called them
    assert clear_cache() == []
    for name in ("demo-py3.12.other-node.abcd", "demo-py3.12.abcdefgh"):
        last_changed(folder / name, 1.1)
    assert clear_cache() == ["demo-py3.12.abcdefgh", "demo-py3.12.other-node.abcd"]
    assert folders(folder) == [kept.name]


def test_tokens_go_when_unused_and_each_use_counts(folder: Path) -> None:
    for name in ("tokens-old", "rows-old", "tokens-used", "tokens-new", "demo-model"):
        make(folder, name)
    for name in ("tokens-old", "rows-old", "tokens-used", "demo-model"):
        last_changed(folder / name, UNUSED_DAYS + 1)
        last_changed(folder / f"{name}.lock", UNUSED_DAYS + 1)
    make(folder, "tokens-used")  # it is there: it is used
    last_changed(folder / "tokens-new", UNUSED_DAYS - 1)
    assert clear_cache() == ["rows-old", "tokens-old"]
    assert folders(folder) == ["demo-model", "tokens-new", "tokens-used"]


def test_a_folder_that_another_builder_finished_first_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes whose locks don't reach each other."""

    def build(scratch: Path) -> None:
        (scratch / "file").write_text("second")
        (folder / "tokens-a").mkdir()
        (folder / "tokens-a" / "file").write_text("first")
        seal(folder / "tokens-a")

    assert (build_once(folder / "tokens-a", build) / "file").read_text() == "first"
    assert folders(folder) == ["tokens-a"]


def test_a_cache_that_can_only_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(folder, "tokens-a")

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(os, "utime", refuse)
    assert make(folder, "tokens-a").exists()


def test_a_builder_is_waited_for_as_long_as_it_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a word, after a while; once it was an error after an hour."""
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.2)
    begun = threading.Event()

    def build(scratch: Path) -> None:
        begun.set()
        time.sleep(1)
        (scratch / "file").write_text("first")

    builder = threading.Thread(target=build_once, args=(folder / "tokens-b", build))
    builder.start()
    assert begun.wait(10)
    assert (make(folder, "tokens-b") / "file").read_text() == "first"
    assert capsys.readouterr().out == f"waiting for another process that makes {folder}/tokens-b\n"
    builder.join()
