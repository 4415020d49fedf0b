"""Combinations of settings, drawn: what preflight accepts equals one process.

The seed is fixed, so each run of the tests draws the same. `python tests/drawn` draws others, as long as it is let.
"""

from __future__ import annotations

import json
import time
from random import Random

import pytest
from combinations import draw, settings_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from outcomes import outcome

SECONDS = 75  # for a new combination to begin


@pytest.fixture(scope="module")
def end() -> float:
    return time.monotonic() + SECONDS


@settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_accepted_equals_one_process(end: float, seed: int) -> None:
    if time.monotonic() < end:
        case = draw(Random(f"short {seed}"))
        found = outcome(case)
        assert not found.fault, f"{found.kind}: {found.message}\nAgain: python tests/drawn --case '{json.dumps(case)}'"


def test_draws_are_sound() -> None:
    """A seed gives one combination; each can be written down, and its batch can be cut."""
    for seed in range(50):
        case = draw(Random(seed), ranks=8, compiles=0.2, resumes=0.2)
        assert json.loads(json.dumps(case)) == draw(Random(seed), ranks=8, compiles=0.2, resumes=0.2)
        assert settings_of(case) and ("resume" not in case or settings_of(case, "resume"))
