"""A run continues from its files as if nothing had happened: on the same grid bit for bit, on another in its numbers.

What becomes of checkpoints that were damaged, or that come from elsewhere. Ray's part is in `test_faults.py`.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from grid import Run, assert_equal_runs, final_weights, run_grid
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from tp2d_helpers import heartbeat
from tp2d_helpers.checkpoint.host_copy import HostCopies
from tp2d_helpers.checkpoint.resize import convert
from tp2d_helpers.checkpoint.run_folder import (
    checkpoint_tag,
    mend_ray_snapshot,
    newest_checkpoint,
    problem_of,
)
from tp2d_helpers.checkpoint.settings import record_run
from tp2d_helpers.checkpoint.writer import CheckpointWriter
from tp2d_helpers.config import Config
from tp2d_helpers.training.metrics import keep_until, read_metrics

Train = Callable[..., Run]
EXACT = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
# Two epochs of 6 steps of 4 samples; checkpoints at the steps 4, 6, 8, 12, evaluations there and at 3 and 9.
LIFE = dict(num_epochs=2, debug_steps=6, checkpoint_interval=4, eval_samples=5, eval_interval=3)


def copy_until(run: Run, folder: Path, step: int, logged: int) -> Config:
    """A copy of a run's folder as it was after `logged` steps, with its checkpoints up to `step`."""
    config = Config(**run.config)
    shutil.copytree(config.run_dir, folder / "copy", ignore=shutil.ignore_patterns("logs", "heartbeats"))
    for path in (folder / "copy").glob("checkpoint_*"):
        if int(path.name.partition("_")[2]) > step:
            shutil.rmtree(path)
    keep_until(folder / "copy" / "metrics.jsonl", logged)
    return config.change(storage_path=str(folder), experiment_name="copy")


def assert_continues(config: Config, whole: Run, weights: dict[str, torch.Tensor], exact: bool = True) -> None:
    """Assert that a run which was continued is the whole run: bit for bit, or within 1e-5."""
    records = read_metrics(config.run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [record["step"] for record in whole.records]
    for record, expected in zip(records, whole.records, strict=True):
        for name in EXACT:
            wanted = expected[name] if exact or expected[name] is None else pytest.approx(expected[name], rel=1e-5)
            assert record[name] == wanted, f"step {record['step']}: {name}"
    if exact:
        assert all(torch.equal(weights[name], weight) for name, weight in whole.weights.items())


@pytest.mark.parametrize(
    "model, zero_stage, tp_size, dp_size, settings",
    [
        ("qwen2-untied", 1, 2, 2, {}),
        ("llama", 2, 2, 2, dict(async_checkpoint=False)),
        ("qwen3", 3, 2, 2, {}),
        ("mistral", 2, 2, 1, {}),
        ("qwen2-dropout", 1, 2, 2, {}),
        ("qwen2-tied", 1, 1, 2, dict(precision="fp16")),
    ],
)
def test_resume_in_mid_epoch(
    train: Train, tmp_path: Path, model: str, zero_stage: int, tp_size: int, dp_size: int, settings: dict
) -> None:
    """From step 4 of an epoch of 6, after 5 were logged."""
    whole = train(model, **LIFE, zero_stage=zero_stage, tp_size=tp_size, dp_size=dp_size, **settings)
    config = copy_until(whole, tmp_path, step=4, logged=5)
    weights = run_grid(config.model_dump(), after=final_weights)[0][0]
    assert_continues(config, whole, weights)


# Another grid

CHAIN = [(2, 2), (4, 1), (1, 2), (2, 1), (1, 1), (2, 2)]  # an epoch of 3 steps at each


@pytest.mark.parametrize(
    "model, stages, precision",
    [
        ("qwen2-tied", (1,), "fp32"),
        ("llama", (1, 2), "fp32"),
        ("qwen2-untied", (3,), "fp32"),
        ("qwen3", (3, 1), "fp32"),
        ("mistral", (1,), "fp32"),
        ("qwen3", (2,), "bf16"),
        ("qwen2-tied", (1,), "bf16"),
        pytest.param("qwen2-tied", (1,), "fp16", marks=pytest.mark.slow),
        pytest.param("qwen2-tied", (3, 2), "bf16", marks=pytest.mark.slow),
    ],
)
def test_resume_at_another_grid(train: Train, tmp_path: Path, model: str, stages: tuple, precision: str) -> None:
    """One run that changes its grid after each epoch, and back; with several stages, its ZeRO stage too."""
    life = dict(num_epochs=len(CHAIN), debug_steps=3, eval_samples=5, precision=precision)
    whole = train(model, **life, tp_size=2, dp_size=2, zero_stage=stages[0])
    config = Config(**whole.config).change(storage_path=str(tmp_path), batch_size_per_gpu=1)
    for epoch, (tp_size, dp_size) in enumerate(CHAIN):
        config = config.change(
            num_epochs=epoch + 1, tp_size=tp_size, dp_size=dp_size, gradient_accumulation_steps=4 // dp_size,
            zero_stage=stages[epoch % len(stages)],
        )  # fmt: skip
        if epoch:
            newest, _ = newest_checkpoint(config.run_dir)
            convert(newest)
        weights, *same = run_grid(config.model_dump(), after=final_weights)[0]
    records = read_metrics(config.run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 3 * len(CHAIN) + 1))
    if precision == "fp32":
        assert_equal_runs(Run(config.model_dump(), records, weights, *same), whole)
    tolerance = 1e-5 if precision == "fp32" else 1e-3
    for record, expected in zip(records, whole.records, strict=True):
        for name in ("loss", "eval_loss", "learning_rate", "tokens"):
            wanted = expected[name] and pytest.approx(expected[name], rel=tolerance)
            assert record[name] == wanted, f"step {record['step']}: {name}"


@pytest.mark.parametrize("tp_size, dp_size, zero_stage", [(1, 2, 1), (2, 1, 3), (2, 2, 2)])
def test_evaluation_is_the_same_at_every_size(train: Train, tp_size: int, dp_size: int, zero_stage: int) -> None:
    """5 held-out samples, which no number of ranks divides."""
    settings = dict(debug_steps=2, eval_samples=5, eval_interval=1)
    run = train("qwen2-tied", tp_size=tp_size, dp_size=dp_size, zero_stage=zero_stage, **settings)
    reference = train("qwen2-tied", **settings)
    assert [record["eval_loss"] for record in run.records] == pytest.approx(
        [record["eval_loss"] for record in reference.records], rel=1e-6
    )
    assert reference.records[1]["eval_loss"] < reference.records[0]["eval_loss"]


# Damaged checkpoints


def damage(folder: Path, how: str) -> None:
    """Damage one file of a checkpoint in one way: `what file`."""
    what, _, pattern = how.partition(" ")
    path = sorted(folder.rglob(pattern))[0]
    if what == "missing":
        path.unlink()
    elif what == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif what == "empty":
        path.write_bytes(b"")
    else:
        path.write_text("step_99999999")


@pytest.mark.parametrize(
    "how, found",
    [
        ("missing *optim_states.pt", "lacks step_00000008/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("truncated *optim_states.pt", "_optim_states.pt truncated ("),
        ("empty *model_states.pt", "model_states.pt truncated (0 of"),
        ("missing random_1.pt", "lacks random_1.pt"),
        ("missing rank_1.json", "was not finished (rank_1.json is missing)"),
        ("truncated rank_0.json", "has an unreadable manifest"),
        ("missing latest", ""),
        ("elsewhere latest", ""),
    ],
)
@pytest.mark.faults
def test_a_damaged_checkpoint(train: Train, tmp_path: Path, outcomes: list, how: str, found: str) -> None:
    """The newest complete one is used instead, and named. DeepSpeed's `latest` is not needed."""
    whole = train("qwen2-tied", **LIFE, tp_size=1, dp_size=2)
    config = copy_until(whole, tmp_path, step=8, logged=9)
    damage(config.run_dir / "checkpoint_00000008", how)
    newest, skipped = newest_checkpoint(config.run_dir)
    assert newest.name == ("checkpoint_00000006" if found else "checkpoint_00000008")
    assert all(found in line and line.startswith("checkpoint_00000008 ") for line in skipped)
    assert len(skipped) == bool(found)
    weights = run_grid(config.model_dump(), after=final_weights)[0][0]
    assert_continues(config, whole, weights)
    log = (config.run_dir / "logs" / "rank_0.log").read_text()
    assert (f"not used: {skipped[0]}" in log) if found else ("not used" not in log)
    what = f"checkpoint file {how.replace('*', '')}"
    outcomes.append((what, "the newest complete one is used and named; bit for bit", "a launch"))
    replaced = [path.name for path in sorted(config.run_dir.glob("checkpoint_00000008*")) if not problem_of(path)]
    assert len(replaced) == 1


def test_without_any_complete_checkpoint_a_run_begins_anew(train: Train, tmp_path: Path) -> None:
    whole = train("qwen2-tied", **LIFE, tp_size=1, dp_size=2)
    config = copy_until(whole, tmp_path, step=6, logged=7)
    for folder in config.run_dir.glob("checkpoint_*"):
        damage(folder, "empty *optim_states.pt")
    weights = run_grid(config.model_dump(), after=final_weights)[0][0]
    assert_continues(config, whole, weights)


# Errors in the middle of a run


@pytest.mark.faults
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk(train: Train, tmp_path: Path, outcomes: list, background: bool) -> None:
    """The first checkpoint fits, the second doesn't; with more space the run goes on from the first."""
    whole = train("qwen2-tied", **LIFE, tp_size=1, dp_size=2)
    config = Config(**whole.config).change(storage_path=str(tmp_path / "small"), async_checkpoint=background)
    (tmp_path / "small").mkdir()
    newest, _ = newest_checkpoint(Config(**whole.config).run_dir)
    size = sum(path.stat().st_size for path in newest.rglob("*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.7 * size)}", "tmpfs", str(tmp_path / "small")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        with pytest.raises(RuntimeError, match="No space left on device"):
            run_grid(config.model_dump())
        newest, skipped = newest_checkpoint(config.run_dir)
        assert newest.name == "checkpoint_00000004" and "was not finished" in skipped[0]
        subprocess.run([*mount[:3], "-o", f"remount,size={9 * size}", *mount[5:]], check=True)
        assert_continues(config, whole, run_grid(config.model_dump(), after=final_weights)[0][0])
        outcomes.append(("disk full while saving", "stopped with the reason; continued bit for bit", "a launch"))
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def _fail_at_sample_40(names: dict) -> None:
    """A patch for `run_grid`: the 40th sample that a rank asks for can't be read."""
    from tp2d_helpers.data import dataset

    read, count = dataset.TokenDataset.__getitem__, itertools.count(1)

    def reading(self: object, index: int) -> dict:
        if next(count) == 40:
            raise OSError("sample can't be read")
        return read(self, index)

    dataset.TokenDataset.__getitem__ = reading


@pytest.mark.faults
def test_a_data_source_that_fails_in_mid_epoch(train: Train, tmp_path: Path, outcomes: list) -> None:
    whole = train("qwen2-tied", **LIFE, tp_size=1, dp_size=2)
    config = Config(**whole.config).change(storage_path=str(tmp_path))
    with pytest.raises(RuntimeError, match="sample can't be read"):
        run_grid(config.model_dump(), patch=_fail_at_sample_40)
    newest, _ = newest_checkpoint(config.run_dir)
    assert newest is not None and problem_of(newest) is None
    assert_continues(config, whole, run_grid(config.model_dump(), after=final_weights)[0][0])
    outcomes.append(("a data source that raises", "stopped with the reason; continued bit for bit", "a launch"))


# Checkpoints from elsewhere


class Code:
    """Unpickled without care, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_executed(train: Train, tmp_path: Path) -> None:
    whole = train("qwen2-tied", **LIFE, tp_size=1, dp_size=2)
    config = copy_until(whole, tmp_path, step=8, logged=9)
    folder = config.run_dir / "checkpoint_00000008"
    path = next(checkpoint_tag(folder).glob("*model_states.pt"))
    states = torch.load(path, weights_only=False)
    torch.save({**states, "epoch": Code(tmp_path / "executed")}, path)
    manifest = json.loads((folder / "rank_0.json").read_text())
    manifest["files"][str(path.relative_to(folder))] = path.stat().st_size
    (folder / "rank_0.json").write_text(json.dumps(manifest))
    with pytest.raises(RuntimeError, match="checkpoint_00000008 holds code, which is not executed; remove it"):
        run_grid(config.model_dump())
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists(), "it is no code after all"


def test_another_runs_checkpoint_is_refused(train: Train, tmp_path: Path) -> None:
    whole = train("qwen2-tied", **LIFE, tp_size=1, dp_size=2)
    config = copy_until(whole, tmp_path, step=8, logged=9)
    record_run(config)  # which gives the folder an id that its checkpoints don't bear
    with pytest.raises(RuntimeError, match=r"not written by this run.*trust_checkpoint"):
        run_grid(config.model_dump())
    trusting = config.change(trust_checkpoint=True)
    assert_continues(config, whole, run_grid(trusting.model_dump(), after=final_weights)[0][0])


# Parts


def test_host_copy_keeps_what_is_shared() -> None:
    flat = torch.arange(10.0)
    state = {
        "flat": flat,
        "views": [flat[2:6].view(2, 2), flat[::3]],
        "other": torch.ones(2),
        "empty": torch.empty(0),
        "number": 3,
        "shape": torch.Size([2]),
    }
    copies = HostCopies()
    copy = copies.copy(state)
    flat.zero_()
    assert copy["flat"].tolist() == list(range(10)) and copy["number"] == 3 and len(copy["empty"]) == 0
    assert isinstance(copy["shape"], torch.Size)
    assert copy["views"][0].tolist() == [[2, 3], [4, 5]] and copy["views"][1].tolist() == [0, 3, 6, 9]
    assert copy["views"][0].untyped_storage().data_ptr() == copy["flat"].untyped_storage().data_ptr()
    assert copy["other"].untyped_storage().data_ptr() != state["other"].untyped_storage().data_ptr()
    place = copy["flat"].data_ptr()
    copies.restart()
    again = copies.copy({**state, "other": torch.full((2,), 7.0)})
    assert again["other"].tolist() == [7, 7] and again["flat"].tolist() == [0] * 10
    assert again["flat"].data_ptr() == place, "the next checkpoint has the same memory"
    grown, more = copies.copy(torch.ones(3)), copies.copy(torch.ones(1000))
    copies.restart()
    assert copies.copy(torch.zeros(50)).sum() == 0 and grown.sum() == 3 and more.sum() == 1000


def test_host_copies_take_the_bytes_of_the_state_and_no_more() -> None:
    """PyTorch's pinned memory would take the next power of two of each: 96 MiB for these 48. Files stay as small."""
    state = [torch.ones(3 * 2**20), torch.ones(9 * 2**20)]
    copies = HostCopies()
    copy, nbytes = copies.copy(state), sum(tensor.nbytes for tensor in state)
    assert nbytes <= sum(map(len, copies.buffers)) < 1.01 * nbytes
    assert [tensor.untyped_storage().nbytes() for tensor in copy] == [tensor.nbytes for tensor in state]


def test_a_checkpoint_waits_for_the_one_before(tmp_path: Path) -> None:
    """Without a limit; what is written meanwhile counts as progress, and nothing else."""
    writer = CheckpointWriter()
    writer.begin(tmp_path / "first", copy=True)
    waiting = threading.Thread(target=writer.disk.wait)
    waiting.start()
    time.sleep(1.5)
    before = heartbeat.here().pulses
    time.sleep(1.5)
    assert heartbeat.here().pulses == before
    writer.disk.progress()
    time.sleep(1.5)
    assert heartbeat.here().pulses > before and waiting.is_alive()
    writer.disk.end()
    waiting.join(5)
    assert not waiting.is_alive()


def test_rays_list_is_mended(train: Train, tmp_path: Path) -> None:
    """Its own manager then reads it: what is complete, the newest as the latest, the best kept."""
    config = copy_until(train("qwen2-tied", **LIFE, tp_size=1, dp_size=2), tmp_path, step=8, logged=9)
    shutil.rmtree(config.run_dir / "checkpoint_00000006")
    storage = StorageContext(storage_path=config.storage_path, experiment_dir_name=config.experiment_name)
    path = config.run_dir / "checkpoint_manager_snapshot.json"
    for written in (None, '{"ray_version": "2.60.0", "checkp', '{"ray_version": "1.0", "checkpoint_results": []}'):
        if written:
            path.write_text(written)
        mend_ray_snapshot(config)
        manager = CheckpointManager(CheckpointConfig(num_to_keep=2), storage)
        assert [Path(r.checkpoint.path).name for r in manager._checkpoint_results] == [
            "checkpoint_00000004",
            "checkpoint_00000008",
        ]
        assert manager.latest_checkpoint_result.metrics["step"] == 8
    stamp = path.stat().st_mtime_ns
    mend_ray_snapshot(config)
    assert path.stat().st_mtime_ns == stamp, "what is right is left alone"
    shutil.rmtree(config.run_dir / "checkpoint_00000004")
    best_first = config.change(keep_checkpoints_by="eval_loss")
    mend_ray_snapshot(best_first)
    manager = CheckpointManager(CheckpointConfig(2, "eval_loss", "min"), storage)
    assert [r.metrics["step"] for r in manager._checkpoint_results] == [8]
