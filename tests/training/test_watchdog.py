"""The watchdog ends a hang and names its cause, the lock keeps a second run out: with processes killed and frozen."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grid import fork_context

from tp2d_helpers import heartbeat
from tp2d_helpers.checkpoint.files import read_json, write_json
from tp2d_helpers.training.watchdog import Watchdog, name_ranks

PATIENCE = 3.0  # seconds
WORLD = 3
LIMIT = 30  # seconds that anything here may take


def worker(
    folder: str, rank: int, sleeper: int | None, stops_at: int | None, steps: int, naps: int, busy: int | None, how: str
) -> None:
    """A training loop with a barrier of files, in which the ranks of a step wait for each other.

    Args:
        sleeper: this rank sleeps for ever in its batch of step `stops_at`; None: nobody.
        stops_at: with no sleeper, no rank comes back from this step; None: all finish.
        naps: a batch takes, in units of 0.3 s.
        busy: this rank takes 2.5 times the patience before its first step; None: nobody.
        how: what it does: "tells" of its progress, "computes" in its start, or "sleeps" in it.
    """
    with Watchdog(folder, rank, WORLD, PATIENCE):
        heartbeat.mark("before the loop", starting=how in ("computes", "sleeps"))
        end = time.monotonic() + 2.5 * PATIENCE
        while rank == busy and time.monotonic() < end:
            if how == "tells":
                heartbeat.pulse()
            if how != "computes":
                time.sleep(0.5)
        for step in range(1, steps + 1):
            heartbeat.mark(f"batch of step {step}")
            for _ in range(naps):
                time.sleep(0.3)
            while rank == sleeper and step == stops_at:
                time.sleep(1)
            heartbeat.mark(f"step {step}")
            Path(folder, f"arrived_{step}_{rank}").touch()
            while len(list(Path(folder).glob(f"arrived_{step}_*"))) < WORLD or (sleeper is None and step == stops_at):
                time.sleep(0.02)


@contextlib.contextmanager
def world(folder: Path, **behaviour: Any) -> Iterator[list[Any]]:
    """The processes of `WORLD` ranks, each running `worker`."""
    settings = dict(sleeper=None, stops_at=None, steps=3, naps=1, busy=None, how="") | behaviour
    context = fork_context()
    processes = [
        context.Process(target=worker, args=(str(folder), rank), kwargs=settings, daemon=True) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_until(true: Callable[[], object]) -> None:
    """Wait for it."""
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end, f"not within {LIMIT} s"
        time.sleep(0.02)


def exit_codes(processes: list[Any]) -> list[int | None]:
    """Wait for the processes."""
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return [process.exitcode for process in processes]


def test_a_late_rank_is_named(tmp_path: Path) -> None:
    with world(tmp_path, sleeper=1, stops_at=2) as processes:
        assert exit_codes(processes) == [1, 1, 1]
    stall = read_json(tmp_path / "stalled.json")
    expected = "no progress for 3 s: rank 1 is still in 'batch of step 2'; ranks 0, 2 wait in 'step 2'"
    assert stall["message"] == expected and stall["ranks"] == [1]
    waited = stall["time"] - (tmp_path / "arrived_2_0").stat().st_mtime
    assert 0.8 * PATIENCE < waited < 3 * PATIENCE
    assert [path.name for path in tmp_path.glob("**/.*")] == [], "scratch files are left"


@pytest.mark.parametrize("frozen", [0, 2])
def test_a_frozen_rank_is_named(tmp_path: Path, frozen: int) -> None:
    with world(tmp_path, steps=1000) as processes:
        wait_until((tmp_path / "arrived_3_0").exists)
        os.kill(processes[frozen].pid, signal.SIGSTOP)
        others = [process for process in processes if process is not processes[frozen]]
        assert exit_codes(others) == [1, 1]
    stall = read_json(tmp_path / "stalled.json")
    assert f"rank {frozen} does not answer (" in stall["message"]
    assert f", pid {processes[frozen].pid}; last seen in" in stall["message"] and "wait in 'step" in stall["message"]
    assert stall["ranks"] == [frozen]


def test_a_dead_rank_is_named(tmp_path: Path) -> None:
    with world(tmp_path, steps=1000) as processes:
        wait_until((tmp_path / "arrived_2_0").exists)
        processes[1].kill()
        assert exit_codes([processes[0], processes[2]]) == [1, 1]
    assert read_json(tmp_path / "stalled.json")["ranks"] == [1]


def test_all_ranks_hang_in_a_collective(tmp_path: Path) -> None:
    with world(tmp_path, stops_at=2) as processes:
        assert exit_codes(processes) == [1, 1, 1]
    message = read_json(tmp_path / "stalled.json")["message"]
    assert message.startswith("no progress for 3 s: ranks 0, 1, 2 wait in 'step 2'; ") and "on any rank" in message


def test_a_slow_run_goes_on(tmp_path: Path) -> None:
    """A step takes a tenth of the patience, the run more than all of it."""
    with world(tmp_path, steps=14) as processes:
        assert exit_codes(processes) == [0, 0, 0]
    assert not (tmp_path / "stalled.json").exists()


@pytest.mark.parametrize("how", ["tells", "computes"])
def test_a_rank_that_works_alone_is_waited_for(tmp_path: Path, how: str) -> None:
    """The others wait for it in a collective, for much longer than the patience, as for a conversion by rank 0."""
    with world(tmp_path, busy=0, how=how) as processes:
        assert exit_codes(processes) == [0, 0, 0]
    assert not (tmp_path / "stalled.json").exists()


def test_a_start_that_hangs_is_ended(tmp_path: Path) -> None:
    """It computes nothing, reads nothing, writes nothing."""
    with world(tmp_path, busy=2, how="sleeps") as processes:
        assert exit_codes(processes) == [1, 1, 1]
    assert read_json(tmp_path / "stalled.json")["message"].startswith(
        "no progress for 3 s: rank 2 is still in 'before the loop'; ranks 0, 1 wait in 'step 1'"
    )


def test_a_paused_machine_goes_on(tmp_path: Path) -> None:
    """All ranks are frozen for longer than the patience, early in a batch, and have most of it to do afterwards."""
    with world(tmp_path, steps=2, naps=5) as processes:
        wait_until((tmp_path / "arrived_1_0").exists)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.kill(process.pid, number)
            time.sleep(1.2 * PATIENCE if number == signal.SIGSTOP else 0)
        assert exit_codes(processes) == [0, 0, 0]


def test_zero_turns_it_off(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 2, 0):
        heartbeat.mark("step 1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [False, True])
def test_heartbeats_of_an_earlier_attempt_do_not_count(tmp_path: Path, missing: bool) -> None:
    """They are further and look fresh; still the late rank is found, or the one that hasn't started."""
    for rank in range(WORLD):
        beat = dict(
            marks=500, place="step 250", seconds_there=0.0, time=time.time() + 3600, host="h", pid=1, closed=True
        )
        write_json(tmp_path / "heartbeats" / f"rank_{rank}.json", beat)
    if missing:
        arguments = (str(tmp_path), 0, None, None, 1, 1, None, "")
        process = fork_context().Process(target=worker, args=arguments, daemon=True)
        process.start()
        assert exit_codes([process]) == [1]
        expected, ranks = "ranks 1, 2 have given no sign of life; rank 0 waits in 'step 1'", [1, 2]
    else:
        with world(tmp_path, sleeper=2, stops_at=1) as processes:
            assert exit_codes(processes) == [1, 1, 1]
        expected, ranks = "rank 2 is still in 'batch of step 1'; ranks 0, 1 wait in 'step 1'", [2]
    stall = read_json(tmp_path / "stalled.json")
    assert (stall["message"], stall["ranks"]) == (f"no progress for 3 s: {expected}", ranks)


def test_long_lists_of_ranks_are_cut() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks(list(range(128))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 120 more"
