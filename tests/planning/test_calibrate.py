"""The planner's constants, measured: the arithmetic by given times, and the rest as it runs without GPUs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tp2d_helpers.model.shard import AllReduces, Matmul, Shard
from tp2d_helpers.planning import calibrate, constants
from tp2d_helpers.planning.constants import HOST_LAYER, HOST_STEP, Constants, constants_of, store
from tp2d_helpers.planning.memory import Setting
from tp2d_helpers.planning.step_time import step_time
from tp2d_helpers.speed.devices import Device, device_named

TINY = Device("tiny", memory=1.0, memory_bandwidth=1e6, link_bandwidth=1e5, peak=1e7)


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """taking(s): each call that is measured takes s seconds, whatever it does."""

    def take(each: float) -> None:
        monkeypatch.setattr(calibrate, "seconds", lambda call, clock=None: (call(), each)[1])

    return take


def ticking(each: float) -> Iterator[Any]:
    """(call, clock): a call takes `each` seconds of that clock, and every tenth ten times as long."""
    now, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1
        now[0] += each * (10 if calls[0] % 10 == 0 else 1)

    return call, lambda: now[0]


def test_seconds_are_a_median() -> None:
    call, clock = ticking(0.19)  # one per block
    assert calibrate.seconds(call, clock) == pytest.approx(0.19)


def matmul_layer(m: int, k: int, n: int) -> tuple[Shard, Setting]:
    """A model that is one matmul, and a micro-batch of m tokens."""
    shard = Shard(1, k, 0, 0, heads=0, vocabulary=0, parameters=0, tied=False, normed_heads=False,
                  layer_matmuls=(Matmul("x", k, n),), all_reduces=AllReduces())  # fmt: skip
    return shard, Setting(seq_length=m)


def test_the_formula_is_right_for_what_was_measured(taking: Callable[[float], None]) -> None:
    """`step_time` of the very matmul, and of the very attention, is what they took."""
    taking(0.5)
    memory = calibrate.memory_share(TINY, elements=1000)
    assert memory == pytest.approx(2 * 2 * 1000 / 0.5 / 1e6)
    m, k, n = 16, 8, 24
    found = Constants(memory=1.0, matmuls=calibrate.matmul_share(TINY, 1.0, (m, k, n)))
    head = 3 * 2 * m * k / 1e6  # reads its input
    assert step_time(*matmul_layer(m, k, n), TINY, constants=found).matmuls == pytest.approx(0.5 + head)
    share = calibrate.attention_share(TINY, (2, 4, 16, 8))
    shard = replace(matmul_layer(m, k, n)[0], query=4 * 8)
    setting = Setting(batch_size_per_gpu=2, seq_length=16)
    assert step_time(shard, setting, TINY, constants=Constants(attention=share)).attention == pytest.approx(0.5)


def test_links_by_hand() -> None:
    """Of 4 ranks, a ring sends 3/2 of 2,000 bytes; the fifth of a second that one number takes is no bandwidth's."""
    found = calibrate.link_constants(TINY, 4, large=1.2, small=0.2, elements=1000)
    assert found["links"] == pytest.approx(1.5 * 2000 / 1.0 / 1e5 * 0.62 / 0.67)
    assert found["latency"] == pytest.approx(0.1)


def test_on_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, but with gloo: two ranks reduce, and one trains, whatever mpirun has said of another world."""
    mpirun = dict(OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="3", TORCHELASTIC_USE_AGENT_STORE="True")
    for name, value in dict(GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", **mpirun).items():
        monkeypatch.setenv(name, value)
    large, small = calibrate.in_processes(partial(calibrate.all_reduce_seconds, elements=1000), 2)
    assert large > 0 and small > 0
    factor = calibrate.in_processes(calibrate.host_factor, 1)
    assert 0.01 < factor * (HOST_LAYER["eager"] * calibrate.LAYERS + HOST_STEP) < 60


def test_without_a_gpu_it_is_refused() -> None:
    run = subprocess.run([sys.executable, "-m", "tp2d_helpers.planning.calibrate"], capture_output=True, text=True,
                         env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin", "HOME": str(Path.home()),
                              "PYTHONPATH": str(Path(__file__).resolve().parents[2])})  # fmt: skip
    assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith("error: there is no GPU here to measure")
    assert not run.stdout


# What is kept.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path))
    return tmp_path


def on_host(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(constants.socket, "gethostname", lambda: name)


def test_kept_by_gpu_and_host(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host's is better than none; of another GPU, none is."""
    h100, nvl = device_named("H100"), device_named("H100 NVL")
    assert constants_of(h100) == Constants()
    for host, share in (("first", 0.5), ("second", 0.6)):
        on_host(monkeypatch, host)
        path = store(replace(Constants(), matmuls=share, source=host), h100)
        assert path.parent == cache and constants_of(h100).source == host
    on_host(monkeypatch, "first")
    assert constants_of(h100).matmuls == 0.5
    on_host(monkeypatch, "driver")
    assert constants_of(h100).source == "second"
    assert constants_of(nvl) == constants_of(device_named("H200")) == Constants()


@pytest.mark.parametrize("text", ['{"matmuls": 0.1}', "{", "[]"])
def test_what_cannot_be_read_does_not_count(cache: Path, text: str) -> None:
    h100 = device_named("H100")
    store(Constants(matmuls=0.5), h100).write_text(text)
    assert constants_of(h100) == Constants()


def test_a_slower_machine_is_predicted_slower() -> None:
    """Every constant counts where its part of the work is."""
    shard, setting = matmul_layer(4096, 64, 64)
    usual = step_time(shard, setting, device_named("H200"))
    assert step_time(shard, setting, device_named("H200"), constants=Constants(host=3.0)).total > 2 * usual.total
    assert step_time(shard, setting, device_named("H200"), constants=Constants(matmuls=0.1)).matmuls > usual.matmuls
