"""The parts of a launch's start, as the driver prints them."""

from __future__ import annotations

import pytest

from tp2d_helpers import startup


def test_parts_add_up() -> None:
    start = {"began": 105.0, "ends": [("imports", 109.0), ("first step", 111.5)]}
    line = startup.describe(start, launched=100.0)
    assert line == "first step after 11.5 s: Ray 5.0, imports 4.0, first step 2.5"


def test_an_earlier_launch_does_not_count() -> None:
    assert startup.describe({}, launched=100.0) is None
    assert startup.describe({"began": 80.0, "ends": [("first step", 99.0)]}, launched=100.0) is None


def test_marks_after_the_first_step_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_ends", [])
    monkeypatch.setattr(startup, "_finished", False)
    startup.mark("weights")
    start = startup.finish()
    startup.mark("data")
    assert startup.finished()
    assert [phase for phase, _ in start["ends"]] == ["weights"]
