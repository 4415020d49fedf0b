"""The universal form of a checkpoint: made once, made anew when it isn't whole, and never by two at a time.

What a run does with it on another grid is in `test_checkpoint.py`.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from grid import IMPORT_PATH, Run, fork_context, run_grid

from tp2d_helpers import heartbeat
from tp2d_helpers.checkpoint.resize import convert, universal_checkpoint, universal_problem
from tp2d_helpers.checkpoint.run_folder import newest_checkpoint, problem_of
from tp2d_helpers.config import Config
from tp2d_helpers.training.metrics import read_metrics


@pytest.fixture(scope="module")
def run(train: Callable[..., Run]) -> Config:
    """Settings of a run with checkpoints of 1 × 2 ranks; the one that `test_checkpoint.py` has."""
    life = dict(num_epochs=2, debug_steps=6, checkpoint_interval=4, eval_samples=5, eval_interval=3)
    return Config(**train("qwen2-tied", **life, tp_size=1, dp_size=2).config)


@pytest.fixture
def checkpoint(run: Config, tmp_path: Path) -> Path:
    """A copy of the newest checkpoint."""
    newest, _ = newest_checkpoint(run.run_dir)
    return Path(shutil.copytree(newest, tmp_path / newest.name))


def test_a_conversion_is_trusted_only_if_it_is_whole(checkpoint: Path) -> None:
    universal = checkpoint / "universal"
    assert "was not finished" in universal_problem(checkpoint)
    universal.mkdir()  # as an earlier version left it, or a node that lost its power
    assert "was not finished" in universal_problem(checkpoint)
    convert(checkpoint)
    assert universal_problem(checkpoint) is None and problem_of(checkpoint) is None
    assert sorted(path.name for path in checkpoint.glob("*universal*")) == ["universal"]
    weight = sorted(universal.rglob("exp_avg.pt"))[0]
    os.truncate(weight, weight.stat().st_size // 2)
    assert universal_problem(checkpoint) == f"has {weight.relative_to(universal)} missing or truncated"
    weight.unlink()
    assert universal_problem(checkpoint) == f"has {weight.relative_to(universal)} missing or truncated"
    convert(checkpoint)
    assert universal_problem(checkpoint) is None and weight.exists()
    manifest = json.loads((checkpoint / "rank_0.json").read_text())
    (checkpoint / "rank_0.json").write_text(json.dumps({**manifest, "step": 999}))
    assert universal_problem(checkpoint) == "is of another checkpoint"


def test_a_conversion_ends_with_its_worker_and_is_done_again(checkpoint: Path) -> None:
    """Its successor finds nothing in its way, and tells the watchdog of its progress."""
    (checkpoint / "universal.0123.tmp").mkdir()
    worker = fork_context().Process(target=universal_checkpoint, args=(checkpoint,), daemon=True)
    worker.start()
    converting: list[psutil.Process] = []
    end = time.monotonic() + 30
    while not converting and time.monotonic() < end:
        converting = [child for child in psutil.Process(worker.pid).children() if str(checkpoint) in child.cmdline()]
    assert converting
    worker.kill()
    _, alive = psutil.wait_procs(converting, timeout=60)
    assert not alive and not (checkpoint / "universal").exists()
    before = heartbeat.here().pulses
    assert universal_checkpoint(checkpoint) == "universal"
    assert universal_problem(checkpoint) is None and heartbeat.here().pulses > before
    assert sorted(path.name for path in checkpoint.glob("*universal*")) == ["universal"]
    stamp = (checkpoint / "universal").stat().st_mtime_ns
    universal_checkpoint(checkpoint)
    assert (checkpoint / "universal").stat().st_mtime_ns == stamp, "converted twice"


CHILD = """
import subprocess, time
from tp2d_helpers.checkpoint.resize import end_with_parent
end_with_parent()
print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
time.sleep(60)
"""


def test_a_child_ends_with_its_children_when_the_pipe_closes() -> None:
    """Whether or not it has something to print."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    environment = os.environ | {"PYTHONPATH": IMPORT_PATH}
    with subprocess.Popen([sys.executable, "-c", CHILD], env=environment, **pipes) as child:
        family = [psutil.Process(child.pid), psutil.Process(int(child.stdout.readline()))]
        child.stdin.close()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive


def test_what_cannot_be_converted_says_why(checkpoint: Path) -> None:
    shutil.rmtree(next(checkpoint.glob("step_*")))
    with pytest.raises(RuntimeError, match=r"can't be converted: FileNotFoundError: .* has no folder step_"):
        universal_checkpoint(checkpoint)


def _late(names: dict) -> None:
    """A patch for `run_grid`: rank 0 converts, and rank 1 tokenises, for longer than a collective of torch's waits."""
    from tp2d_helpers.checkpoint import save_load

    universal, create = save_load.universal_checkpoint, names["create_dataloader"]

    def converting(folder: Path) -> str:
        time.sleep(5)
        return universal(folder)

    def tokenising(**settings: object) -> object:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=3), dist.group.WORLD)
        time.sleep(5 * int(os.environ["RANK"]))
        return create(**settings)

    save_load.universal_checkpoint, names["create_dataloader"] = converting, tokenising


def test_no_rank_waits_in_a_collective_for_what_another_prepares(run: Config, tmp_path: Path) -> None:
    shutil.copytree(run.run_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("logs", "heartbeats"))
    config = run.change(storage_path=str(tmp_path), experiment_name="copy", tp_size=2, dp_size=1, num_epochs=3)
    config = config.change(gradient_accumulation_steps=2)
    run_grid(config.model_dump(), patch=_late)
    assert [record["step"] for record in read_metrics(config.run_dir / "metrics.jsonl")] == list(range(1, 19))
