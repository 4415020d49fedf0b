"""The parts of a launch's start, as the driver prints them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tp2d_helpers import startup
from tp2d_helpers.guard import write_json


def test_parts_add_up(tmp_path: Path) -> None:
    write_json(tmp_path / "start.json", {"began": 105.0, "ends": [("imports", 109.0), ("first step", 111.5)]})
    line = startup.describe(tmp_path, launched=100.0)
    assert line == "first step after 11.5 s: Ray 5.0, imports 4.0, first step 2.5"


def test_an_earlier_launch_does_not_count(tmp_path: Path) -> None:
    assert startup.describe(tmp_path, launched=100.0) is None
    write_json(tmp_path / "start.json", {"began": 80.0, "ends": [("first step", 99.0)]})
    assert startup.describe(tmp_path, launched=100.0) is None


def test_marks_after_the_first_step_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_ends", [])
    monkeypatch.setattr(startup, "_finished", False)
    startup.mark("weights")
    startup.finish(tmp_path)
    startup.mark("data")
    assert startup.finished()
    assert [phase for phase, _ in startup.read_json(tmp_path / "start.json")["ends"]] == ["weights"]
