"""Cores of a container on a large machine; what the kernel has killed in it: `training/test_deaths.py`."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tp2d_helpers import cgroups


@pytest.mark.parametrize("groups, files, count", [
    ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
    ("0::/job/step\n", {"job/cpu.max": "350000 100000\n", "job/step/cpu.max": "max 100000\n"}, 4),
    ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    ("2:cpuacct,cpu:/\n", {"cpu/cpu.cfs_quota_us": "800000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
    ("", {}, 64), ("0\n", {}, 64),
])  # fmt: skip
def test_cores(
    control_groups: Callable, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], count: int
) -> None:
    control_groups(groups, files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert cgroups.cores() == count
