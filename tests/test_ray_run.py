"""The notebook's launch on a real Ray cluster of this machine: a killed worker, a resumed run, an export, a failure.

Each launch takes most of a minute on two cores, so the tests follow one run through its life. What it must equal comes
from `run_grid`, which trains the same without Ray and without disturbance in seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from grid import notebook_definitions, run_grid
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp2d_helpers.config import Config, make_config
from tp2d_helpers.display import TrainingFailed
from tp2d_helpers.engine import meta_model
from tp2d_helpers.export import export_checkpoint
from tp2d_helpers.metrics import read_metrics
from tp2d_helpers.preflight import Plan, preflight

STEPS = 6  # per epoch


def whole_weights(engine: Any, tp_group: dist.ProcessGroup, dp_group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """The model's whole weights, gathered over the TP group."""
    shapes = {name: parameter.shape for name, parameter in meta_model(engine.module.config).named_parameters()}
    weights = {}
    for name, parameter in engine.module.named_parameters():
        parts = [torch.empty_like(parameter) for _ in range(dist.get_world_size(tp_group))]
        dist.all_gather(parts, parameter.detach().contiguous(), group=tp_group)
        cut = [dim for dim, size in enumerate(shapes[name]) if parameter.shape[dim] != size]
        weights[name] = torch.cat(parts, dim=cut[0]) if cut else parts[0]
    return {name: weight.clone() for name, weight in weights.items()}


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """One run: an epoch in which a worker is killed, then a second epoch in new processes. And its undisturbed twin."""
    folder = tmp_path_factory.mktemp("runs")
    settings = dict(
        model_name="demo", dataset_name="demo", use_gpu=False, seq_length=64, batch_size_per_gpu=2, learning_rate=1e-3,
        debug_steps=STEPS, log_interval=1, checkpoint_interval=2, storage_path=str(folder),
    )  # fmt: skip
    plan = preflight(make_config(**settings, experiment_name="disturbed"))
    twin = plan.config.change(experiment_name="twin", num_epochs=2)
    weights = run_grid(twin.model_dump(), after=whole_weights)[0]
    names = notebook_definitions("imports", "train-func", "launch-function")

    killer = Killer(plan.config, after_step=3)
    killer.start()
    first = names["launch"](plan)
    after_first = read_metrics(plan.config.run_dir / "metrics.jsonl")
    killer.join(timeout=1)

    more = preflight(plan.config.change(num_epochs=2))
    second = names["launch"](more)
    yield SimpleNamespace(
        config=more.config, killed=killer.killed, first=first, after_first=after_first, second=second, names=names,
        records=read_metrics(more.config.run_dir / "metrics.jsonl"), twin=read_metrics(twin.run_dir / "metrics.jsonl"),
        twin_weights=weights, settings=settings,
    )  # fmt: skip
    ray.shutdown()


class Killer(threading.Thread):
    """SIGKILLs one training worker once the run has logged `after_step` steps."""

    def __init__(self, config: Config, after_step: int) -> None:
        super().__init__(daemon=True)
        self.path, self.after_step, self.killed = config.run_dir / "metrics.jsonl", after_step, 0

    def run(self) -> None:
        while not any(record["step"] >= self.after_step for record in read_metrics(self.path)):
            time.sleep(0.02)
        workers = [
            p for p in psutil.process_iter(["name", "cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"])
        ]
        workers[-1].kill()
        self.killed = workers[-1].pid


def test_a_killed_worker_costs_nothing(life: SimpleNamespace) -> None:
    assert life.killed, "no worker was killed: the test shows nothing"
    assert [record["step"] for record in life.after_first] == list(range(1, STEPS + 1))
    assert life.first.error is None


def test_a_resumed_run_equals_an_uninterrupted_one(life: SimpleNamespace) -> None:
    """Killed once and continued once, in other processes, against one run of two epochs: bit for bit."""
    assert [record["step"] for record in life.records] == list(range(1, 2 * STEPS + 1))
    for name in ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens"):
        assert [record[name] for record in life.records] == [record[name] for record in life.twin], name


def test_metrics_are_as_promised(life: SimpleNamespace) -> None:
    names = {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "step_seconds", "tokens_per_second",
             "mfu", "peak_memory_gib"}  # fmt: skip
    for record in life.records:
        assert set(record) == names
        assert record["tokens"] == life.config.global_batch_size * life.config.seq_length
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["step_seconds"])
        assert record["mfu"] is None and 0 < record["peak_memory_gib"] < 24
    assert life.records[-1]["loss"] < life.records[0]["loss"] - 0.3


def test_the_run_leaves_what_it_promises(life: SimpleNamespace) -> None:
    kept = sorted(path.name for path in life.config.run_dir.glob("checkpoint_*") if path.is_dir())
    assert kept == [f"checkpoint_{step:08d}" for step in (10, 12)], "checkpoints_to_keep is 2"
    logs = sorted(path.name for path in (life.config.run_dir / "logs").iterdir())
    assert logs == [f"rank_{rank}.log" for rank in range(4)]


def test_the_export_is_the_trained_model(life: SimpleNamespace, tmp_path: Path) -> None:
    folder = export_checkpoint(life.second.checkpoint.path, life.config.model_name, tmp_path / "export")
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
    exported = AutoModelForCausalLM.from_pretrained(folder)
    weights = dict(exported.named_parameters())
    assert weights.keys() == life.twin_weights.keys()
    unequal = [name for name, weight in weights.items() if not torch.equal(weight, life.twin_weights[name])]
    assert not unequal
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    untrained = AutoModelForCausalLM.from_pretrained(life.config.model_name)
    assert not torch.equal(untrained.lm_head.weight, exported.lm_head.weight)
    assert AutoTokenizer.from_pretrained(folder)("a b").input_ids


def test_a_failed_run_says_why(life: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A loss that isn't finite ends the run before it is saved, with a message of a few lines."""
    broken = AutoModelForCausalLM.from_pretrained(life.config.model_name)
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(life.config.model_name).save_pretrained(tmp_path)
    settings = {**life.settings, "model_name": str(tmp_path), "experiment_name": "fails", "max_failures": 0}
    plan: Plan = preflight(make_config(**settings, tp_size=1, dp_size=1))
    with pytest.raises(TrainingFailed) as caught:
        life.names["launch"](plan)
    message = str(caught.value)
    assert "loss of step 1 is not finite" in message and "rank 0" in message and "rank_0.log" in message
    assert len(message.splitlines()) <= 4
    assert not list(plan.config.run_dir.glob("checkpoint_0*"))
    assert len(capfd.readouterr().out.splitlines()) <= 40
