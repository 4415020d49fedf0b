"""Locks: a second writer is refused, and a dead one doesn't count."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grid import fork_context

from tp2d_helpers.checkpoint import files
from tp2d_helpers.checkpoint.files import claim_run, lock_run, read_json, write_json
from tp2d_helpers.config import Config, ConfigError, make_config

LIMIT = 30  # seconds that anything here may take


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Settings of a run in a folder that isn't there yet."""
    return make_config(storage_path=str(tmp_path / "new"), experiment_name="x")


def hold(settings: dict[str, Any], ready: Any) -> None:
    """Lock the run, say so, and keep it."""
    with lock_run(make_config(**settings)):
        ready.set()
        time.sleep(LIMIT)


def test_a_second_process_is_refused_until_the_first_is_dead(config: Config) -> None:
    context = fork_context()
    ready = context.Event()
    process = context.Process(target=hold, args=(config.model_dump(), ready), daemon=True)
    process.start()
    try:
        assert ready.wait(LIMIT)
        with pytest.raises(ConfigError) as caught, lock_run(config):
            pass
        message = str(caught.value)
        assert "experiment_name = 'x'" in message and f"started by pid {process.pid} on " in message
        assert "another experiment_name" in message and "\n" not in message
        with lock_run(config.change(experiment_name="y")):
            pass
    finally:
        process.kill()
        process.join()
    with lock_run(config):
        assert read_json(config.run_dir / ".lock.json")["pid"] == os.getpid()


def test_a_process_may_launch_again(config: Config) -> None:
    for _ in range(2):
        with contextlib.suppress(ZeroDivisionError), lock_run(config):
            raise ZeroDivisionError
        assert not (config.run_dir / ".lock.json").exists()
    with lock_run(config), pytest.raises(ConfigError, match=f"pid {os.getpid()}"), lock_run(config):
        pass


def hold_as_writer(folder: str) -> None:
    """Claim a run as its rank 0, say so by a file, and live on."""
    claim_run(folder, 0)
    Path(folder, "claimed").touch()
    time.sleep(LIMIT)


def test_workers_wait_for_those_of_a_launch_that_was_killed(tmp_path: Path) -> None:
    process = fork_context().Process(target=hold_as_writer, args=(str(tmp_path),), daemon=True)
    process.start()
    end = time.monotonic() + LIMIT
    while not (tmp_path / "claimed").exists() and time.monotonic() < end:
        time.sleep(0.02)
    claim_run(tmp_path, 1)  # other ranks don't wait
    with pytest.raises(RuntimeError, match=r"workers of an earlier launch still write to .* after 0\.5 s"):
        claim_run(tmp_path, 0, seconds=0.5)
    process.kill()
    claim_run(tmp_path, 0, seconds=LIMIT)
    process.join()
    files._HELD.close()


# A network file system without locks, or with one for each node: what another machine writes is all there is to see.


@contextlib.contextmanager
def another_machine(record: Path, alive: bool, clock: float = 0) -> Iterator[None]:
    """A record that another machine wrote a moment ago; if it is alive, it writes it every 0.1 s."""
    done = threading.Event()

    def sign() -> None:
        write_json(record, dict(pid=7, host="far", machine="another", started="today", time=time.time() + clock))

    def go_on() -> None:
        while not done.wait(0.1):
            sign()

    sign()
    thread = threading.Thread(target=go_on, daemon=True)
    if alive:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if alive:
            thread.join()


@pytest.mark.parametrize("clock", [0, -1800, 1800])
def test_a_launch_on_another_machine_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch, clock: int) -> None:
    """Whatever the seconds between the clocks."""
    monkeypatch.setattr(files, "WATCH_SECONDS", 2)
    record = config.run_dir / ".lock.json"
    with (
        another_machine(record, alive=True, clock=clock),
        pytest.raises(ConfigError, match=r"another run is writing to .*started by pid 7 on far at today"),
        lock_run(config),
    ):
        pass
    assert read_json(record)["host"] == "far", "the owner's record stays"
    with another_machine(record, alive=False, clock=clock):
        began = time.monotonic()
        with lock_run(config):
            assert time.monotonic() - began >= 2 and read_json(record)["pid"] == os.getpid()


def test_an_old_record_of_another_machine_is_not_watched(config: Config) -> None:
    write_json(config.run_dir / ".lock.json", dict(pid=7, host="far", machine="another", time=time.time() - 7200))
    began = time.monotonic()
    with lock_run(config):
        assert time.monotonic() - began < 5


def test_an_owner_stays_visible(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record changes as long as it holds the folder; without any lock, that keeps others out."""
    monkeypatch.setattr(files, "SIGN_SECONDS", 0.2)
    monkeypatch.setattr(files, "_acquire", lambda lock: False)
    with lock_run(config):
        first = read_json(config.run_dir / ".lock.json")
        time.sleep(1)
        assert read_json(config.run_dir / ".lock.json") != first
        with pytest.raises(ConfigError, match=f"started by pid {os.getpid()} on"), lock_run(config):
            pass
    assert not (config.run_dir / ".lock.json").exists()
    with lock_run(config):
        pass


def test_workers_wait_for_those_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WATCH_SECONDS", 1)
    with (
        another_machine(tmp_path / ".writer.json", alive=True),
        pytest.raises(RuntimeError, match=r"workers of an earlier launch still write to .* after 1 s"),
    ):
        claim_run(tmp_path, 0, seconds=1)
    claim_run(tmp_path, 0, seconds=LIMIT)
    assert read_json(tmp_path / ".writer.json")["pid"] == os.getpid()
    files._HELD.close()
