"""Curves on the trackers: each step once, in resumed runs too, and no run that waits for one or fails with it."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tp2d_helpers.checkpoint.settings import record_run
from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.launch import follow
from tp2d_helpers.training import trackers
from tp2d_helpers.training.metrics import append, keep_until
from tp2d_helpers.training.trackers import CURVES, Trackers, check_trackers

KEY = "0123456789abcdef0123456789abcdef01234567"  # of the form that wandb wants


def record(step: int, loss: float | None = None) -> dict[str, Any]:
    """As a CPU run writes it: no MFU, and every fourth step is evaluated."""
    return dict(step=step, epoch=0, loss=3.0 / step if loss is None else loss, grad_norm=0.5 * step, learning_rate=1e-3,
                tokens=1024, step_seconds=0.25, tokens_per_second=4096.0, mfu=None, peak_memory_gib=0.5,
                eval_loss=2.5 if step % 4 == 0 else None)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Config]:
    """run(trackers): the config of a run whose settings are in its folder."""

    def make(names: str) -> Config:
        config = make_config(trackers=names, storage_path=str(tmp_path), experiment_name="run")
        record_run(config)
        return config

    return make


def feed(config: Config, *batches: list[dict[str, Any]]) -> None:
    """One launch."""
    with Trackers(config) as tracking:
        for batch in batches:
            tracking.add(batch)


def steps(*numbers: int) -> list[dict[str, Any]]:
    return [record(step) for step in numbers]


# TensorBoard.


def events(config: Config) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of the event files that has ever been written and not removed, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((config.run_dir / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag.split("/")[1], []).append(
                    (event.step, value.tensor.float_val[0], event.wall_time)
                )
    return {tag: sorted(values) for tag, values in found.items()}


def of_record(name: str, found: dict[str, list]) -> list[tuple[int, float]]:
    return [(step, pytest.approx(value)) for step, value, _ in found[name]]


def test_tensorboard(run: Callable[..., Config]) -> None:
    config, before = run("tensorboard"), time.time()
    feed(config, steps(1, 2, 3), [], steps(4, 5))
    found = events(config)
    assert found.keys() == CURVES.keys() - {"mfu"}
    for name in found:
        assert of_record(name, found) == [(r["step"], r[name]) for r in steps(1, 2, 3, 4, 5) if r[name] is not None]
    times = [when for *_, when in found["loss"]]
    assert times[0] == pytest.approx(before - 0.5, abs=2) and times[1] - times[0] == pytest.approx(0.25, abs=1e-3)


def test_tensorboard_of_resumed_runs(run: Callable[..., Config]) -> None:
    """Workers that restart from an older checkpoint; the next launch; one that goes on from an older checkpoint."""
    config = run("tensorboard")
    redone = [record(step, loss=9.0) for step in (3, 4, 5)]
    feed(config, steps(1, 2, 3, 4), steps(1, 2) + redone[:1], redone[1:])
    assert of_record("loss", events(config)) == [(1, 3.0), (2, 1.5), (3, 9.0), (4, 9.0), (5, 9.0)]
    feed(config, steps(1, 2) + redone, steps(6))
    assert of_record("loss", events(config)) == [(1, 3.0), (2, 1.5), (3, 9.0), (4, 9.0), (5, 9.0), (6, 0.5)]
    feed(config, steps(1, 2), steps(3))
    assert of_record("loss", events(config)) == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_follow_feeds_them(run: Callable[..., Config], capsys: pytest.CaptureFixture) -> None:
    """What is in `metrics.jsonl` already, what is added, and what is put in its place."""
    config = run("tensorboard")
    path = config.run_dir / "metrics.jsonl"
    append(path, steps(1, 2, 3))
    with follow(config, 6):
        keep_until(path, 2)
        append(path, [record(3, loss=9.0)])
        time.sleep(1.2)
        keep_until(path, 2)
        append(path, [record(3, loss=8.0), record(4)])
    assert of_record("loss", events(config)) == [(1, 3.0), (2, 1.5), (3, 8.0), (4, 0.75)]


# One that fails, or hangs.


class Broken:
    """Fails at its third batch."""

    def __init__(self, config: Config) -> None:
        self.left = 2

    def add(self, records: list) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("no route to host")


class Slow:
    """Needs longer than anyone waits."""

    def __init__(self, config: Config) -> None:
        time.sleep(30)


def test_one_that_fails_ends_nothing_but_itself(
    run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", (Broken, "json", "json"))
    config = run("wandb,tensorboard")
    feed(config, steps(1), steps(2), steps(3), steps(4))
    said = capsys.readouterr().out.splitlines()
    assert said == ["wandb: ConnectionError: no route to host; the run goes on without it"]
    assert [step for step, *_ in events(config)["loss"]] == [1, 2, 3, 4]


def test_one_that_hangs_holds_nobody_up(
    run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", (Slow, "json", "json"))
    monkeypatch.setattr(trackers, "PATIENCE", 2)
    began, config = time.monotonic(), run("wandb,tensorboard")
    feed(config, steps(1))
    assert time.monotonic() - began < 10
    assert capsys.readouterr().out.startswith("wandb: not done 2 s after the run")
    assert [step for step, *_ in events(config)["loss"]] == [1]


# What is asked for, and isn't there.


def test_one_that_is_not_installed(run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name))
    with pytest.raises(ConfigError) as error:
        check_trackers(run("tensorboard,mlflow"))
    assert str(error.value) == (
        "trackers = 'tensorboard,mlflow': mlflow is not installed; pip install mlflow, or take 'tensorboard'"
    )
    with pytest.raises(ConfigError, match="pip install mlflow, or take 'none'"):
        check_trackers(run("mlflow"))
    config = run("tensorboard")
    assert check_trackers(config) == [("curves", "tensorboard", f"tensorboard --logdir {config.storage_path}")]
    assert check_trackers(run("none")) == []


@pytest.mark.parametrize("text, right", [
    ("tensorbord", "['tensorbord'] unknown; must be 'none', or some of tensorboard, wandb, mlflow"),
    ("", "[''] unknown"), ("none,wandb", "['none'] unknown"),
])  # fmt: skip
def test_unknown(text: str, right: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(trackers=text)
    assert right in str(error.value)
    assert make_config(trackers="mlflow, tensorboard,mlflow").trackers == "mlflow,tensorboard"


# Weights & Biases and MLflow, where they are installed.


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    wandb = pytest.importorskip("wandb")
    for name, value in dict(WANDB_MODE="offline", WANDB_API_KEY=KEY, WANDB_CONFIG_DIR=str(tmp_path / "w")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield wandb
    wandb.teardown()


def offline_history(folder: Path) -> list[dict[str, Any]]:
    """Of an offline run of wandb. The file is a log of LevelDB's form after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data, at, message, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header is left in the block
            at += 32768 - at % 32768
        _, size, kind = struct.unpack_from("<IHB", data, at)
        message, at = message + data[at + 7 : at + 7 + size], at + 7 + size
        if kind not in (1, 4):  # neither whole nor the last part
            continue
        entry, message = wandb_internal_pb2.Record.FromString(message), b""
        if entry.WhichOneof("record_type") == "history":
            found.append({(item.key or item.nested_key[0]): json.loads(item.value_json) for item in entry.history.item})
    return found


def test_wandb_offline(run: Callable[..., Config], wandb_offline: Any, capsys: pytest.CaptureFixture) -> None:
    """Every launch leaves the whole curves, each step once; the key is in no file."""
    config = run("wandb")
    assert check_trackers(config) == [("curves", "wandb", "wandb, project tp_autotp")]
    feed(config, steps(1, 2, 3), steps(1, 2, 3, 4))
    time.sleep(1.1)  # wandb names a folder by the second
    feed(config, steps(1, 2, 3, 4), steps(5))
    folders = sorted((config.run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(trackers.identity(config)) for folder in folders)
    assert [line["_step"] for line in offline_history(folders[0])] == [1, 2, 3, 4]
    lines = offline_history(folders[1])
    assert [line["_step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["training/loss"] for line in lines] == pytest.approx([3.0, 1.5, 1.0, 0.75, 0.6])
    assert [line.get("training/eval_loss") for line in lines] == [None, None, None, 2.5, None]
    files = [path for path in config.run_dir.rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]
    assert capsys.readouterr().out == ""


def test_wandb_without_a_key(run: Callable[..., Config], wandb_offline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would ask for one in the middle of the run."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", "/nowhere")
    wandb_offline.teardown()
    with pytest.raises(ConfigError, match=r"wandb has no key for https://.*; run `wandb login`"):
        check_trackers(run("wandb"))


@pytest.mark.parametrize("place, why", [
    ("file:///nowhere/mlruns", "maintenance mode"), ("http://127.0.0.1:9", "Max retries exceeded"), ("foo://x", "foo://x"),
])  # fmt: skip
def test_mlflow_without_a_place(
    run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, place: str, why: str
) -> None:
    """3.17 takes no folder any more; a server's silence would last as long as its retries."""
    mlflow, began = pytest.importorskip("mlflow"), time.monotonic()
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    mlflow.set_tracking_uri(None)
    with pytest.raises(ConfigError, match=rf"^trackers = 'mlflow': MLflow can't keep curves at {place} \(.*{why}"):
        check_trackers(run("mlflow"))
    assert time.monotonic() - began < 20


def test_where_mlflow_is_asked(run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package: by a stand-in that refuses, and then doesn't."""

    class Client:
        refuses = "no more folders"

        def get_experiment_by_name(self, name: str) -> None:
            assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0" and name == "tp_autotp"
            if self.refuses:
                raise OSError(self.refuses)

    module = types.SimpleNamespace(MlflowClient=Client, get_tracking_uri=lambda: "/runs", __spec__=object())
    monkeypatch.setitem(sys.modules, "mlflow", module)
    with pytest.raises(
        ConfigError, match=r"MLflow can't keep curves at /runs \(.*no more folders\); set MLFLOW_TRACKING"
    ):
        check_trackers(run("mlflow"))
    Client.refuses = ""
    assert check_trackers(run("mlflow")) == [("curves", "mlflow", "MLflow at /runs")]
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow(run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: str) -> None:
    mlflow = pytest.importorskip("mlflow")
    place = f"sqlite:///{tmp_path}/mlflow.db" if store == "sqlite" else f"file://{tmp_path}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(None)
    config = run("mlflow")
    assert check_trackers(config) == [("curves", "mlflow", f"MLflow at {place}")]
    feed(config, steps(1, 2), steps(1, 2, 3))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tp_autotp").experiment_id
    feed(config, steps(1, 2, 3), steps(*range(4, 251)))
    with pytest.raises(KeyError), Trackers(config) as tracking:
        tracking.add(steps(251))
        raise KeyError
    (found,) = client.search_runs([experiment])
    assert found.info.status == "FAILED" and found.info.run_name == "run"
    assert found.data.params["learning_rate"] == "1e-05" and found.data.tags["run_id"] == trackers.identity(config)
    history = client.get_metric_history(found.info.run_id, "training/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [
        (r["step"], r["loss"]) for r in steps(*range(1, 252))
    ]
    assert {name.split("/")[-1] for name in found.data.metrics} == CURVES.keys() - {"mfu"} | {"step"}
