"""Locks: a second writer is refused, and a dead one doesn't count."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from grid import fork_context

from tp2d_helpers.checkpoint.files import claim_run, lock_run, read_json
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
