"""The notebook's launch on a real Ray cluster of this machine, through all that can happen to its processes.

Each start takes most of a minute on two cores, so one run suffers it all, one after the other, and must then equal a
run that was left alone, bit for bit. That one is trained by `run_grid`, without Ray, in seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
from grid import IMPORT_PATH, ROOT, final_weights, run_grid
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.checkpoint.run_folder import checkpoints, problem_of
from tp2d_helpers.config import make_config
from tp2d_helpers.launch import TrainingFailed, launch
from tp2d_helpers.preflight.plan import Plan, preflight
from tp2d_helpers.training.metrics import newest_step, read_metrics

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]  # the first test's includes the whole life
STEPS, EPOCHS = 14, 2
PATIENCE = 240  # seconds for one fault and its recovery; a hang is a failure


class Faults(threading.Thread):
    """Does one thing after the other to the processes of a run, each once the run has recovered from the one before.

    `recovery` has the seconds from each fault to the first step after those that were logged before it.
    """

    def __init__(self, run_dir: Path, driver: subprocess.Popen) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.driver = run_dir, driver
        self.recovery: dict[str, float] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.after("SIGKILL of one worker in mid-step", lambda: self.kill(1))
            self.after("SIGKILL of two workers at once", lambda: self.kill(2))
            self.after("SIGKILL of a worker while a checkpoint is written", self.kill_in_checkpoint)
            self.after("a worker frozen (SIGSTOP) in a collective", lambda: self.kill(1, signal.SIGSTOP))
        except BaseException as error:
            self.error = error
        finally:
            self.driver.kill()  # SIGKILL of the driver

    def after(self, name: str, fault: Callable[[], None]) -> None:
        """Wait for a step, commit the fault, wait for the next step."""
        before = self.newest_step()
        self.wait(lambda: self.newest_step() > before)
        fault()
        began, before = time.monotonic(), self.newest_step()
        self.wait(lambda: self.newest_step() > before)
        self.recovery[name] = time.monotonic() - began

    def kill(self, count: int, how: signal.Signals = signal.SIGKILL) -> None:
        victims = self.workers()[-count:]
        assert len(victims) == count
        for victim in victims:
            victim.send_signal(how)

    def kill_in_checkpoint(self) -> None:
        """Strike between a folder's first file and its last manifest; if that was too late, at the next one."""
        while True:
            known = set(checkpoints(self.run_dir))
            self.wait(lambda known=known: set(checkpoints(self.run_dir)) - known, interval=0)
            self.kill(1)
            (folder,) = set(checkpoints(self.run_dir)) - known
            if problem_of(folder):
                return

    def workers(self) -> list[psutil.Process]:
        """The training workers, children of this driver's Ray."""
        family = psutil.Process(self.driver.pid).children(recursive=True)
        return [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]

    def newest_step(self) -> int:
        return newest_step(self.run_dir / "metrics.jsonl")

    def wait(self, condition: Callable[[], object], interval: float = 0.02) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end or self.driver.poll() is not None:
                raise TimeoutError(f"no progress after {self.newest_step()} steps, driver: {self.driver.poll()}")
            time.sleep(interval)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """One run: all faults, ending in the death of its driver; then it is launched again. And its undisturbed twin."""
    folder = tmp_path_factory.mktemp("runs")
    settings = dict(
        model_name="demo", dataset_name="demo", use_gpu=False, seq_length=64, batch_size_per_gpu=2, learning_rate=1e-3,
        debug_steps=STEPS, num_epochs=EPOCHS, log_interval=1, checkpoint_interval=2, eval_samples=5,
        storage_path=str(folder), max_failures=9, hang_timeout_seconds=20,
    )  # fmt: skip
    disturbed = make_config(**settings, experiment_name="disturbed")
    with open(folder / "driver.log", "wb") as log:
        command = [sys.executable, str(ROOT / "tests/driver.py"), json.dumps(disturbed.model_dump())]
        environment = os.environ | {"PYTHONPATH": IMPORT_PATH}
        driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)
        faults = Faults(disturbed.run_dir, driver)
        faults.start()
        faults.join()
        driver.wait(10)
    stall = json.loads(next(disturbed.run_dir.glob("stalled_*.json")).read_text())  # by now it is survived
    at_death = read_metrics(disturbed.run_dir / "metrics.jsonl")

    plan = preflight(disturbed)
    began = time.monotonic()
    result = launch(plan)
    twin = plan.config.change(experiment_name="twin")
    weights = run_grid(twin.model_dump(), after=final_weights)[0][0]
    yield SimpleNamespace(
        config=plan.config, plan=plan, faults=faults, at_death=at_death, result=result, settings=settings,
        records=read_metrics(plan.config.run_dir / "metrics.jsonl"), twin=read_metrics(twin.run_dir / "metrics.jsonl"),
        stall=stall, twin_weights=weights, seconds=time.monotonic() - began, log=(folder / "driver.log").read_text(),
    )  # fmt: skip
    ray.shutdown()


def test_every_fault_was_survived(life: SimpleNamespace, outcomes: list) -> None:
    if life.faults.error:
        raise AssertionError(life.log[-3000:]) from life.faults.error
    assert len(life.faults.recovery) == 4
    for name, seconds in life.faults.recovery.items():
        outcomes.append((name, "equal to an undisturbed run, bit for bit", f"{seconds:.0f} s"))
    outcomes.append(
        ("SIGKILL of the driver; the notebook again", "equal to an undisturbed run, bit for bit", "a launch")
    )
    assert len(life.at_death) < STEPS * EPOCHS, "the driver outlived its run: the test shows nothing"


def test_a_disturbed_run_equals_an_undisturbed_one(life: SimpleNamespace) -> None:
    assert [record["step"] for record in life.records] == list(range(1, EPOCHS * STEPS + 1))
    for name in ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss"):
        assert [record[name] for record in life.records] == [record[name] for record in life.twin], name


def test_the_hang_is_named(life: SimpleNamespace) -> None:
    assert life.stall["ranks"] == [3], life.stall["message"]
    assert "rank 3 does not answer (" in life.stall["message"]
    assert re.search(r"ranks? [0-2, ]+ waits? in '", life.stall["message"]), life.stall["message"]


def test_preflight_names_what_it_goes_on_from(life: SimpleNamespace) -> None:
    (row,) = [row for row in life.plan.rows if row[0] == "checkpoint"]
    assert "goes on from checkpoint_" in row[2]


def test_metrics_are_as_promised(life: SimpleNamespace) -> None:
    names = {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "step_seconds", "tokens_per_second",
             "mfu", "peak_memory_gib", "eval_loss"}  # fmt: skip
    for record in life.records:
        assert set(record) == names
        assert record["tokens"] == life.config.samples_per_step * life.config.seq_length
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["step_seconds"])
        assert record["mfu"] is None and 0 < record["peak_memory_gib"] < 24
    assert life.records[-1]["loss"] < life.records[0]["loss"] - 0.3


def test_the_run_leaves_what_it_promises(life: SimpleNamespace) -> None:
    kept = sorted(path.name for path in life.config.run_dir.glob("checkpoint_*") if path.is_dir())
    assert kept == [f"checkpoint_{step:08d}" for step in (26, 28)], "checkpoints_to_keep is 2"
    logs = sorted(path.name for path in (life.config.run_dir / "logs").iterdir())
    assert logs == [f"rank_{rank}.log" for rank in range(4)]


def test_the_export_is_the_trained_model(life: SimpleNamespace, tmp_path: Path) -> None:
    folder = export_checkpoint(life.result.checkpoint.path, life.config.model_name, tmp_path / "export")
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
    exported = AutoModelForCausalLM.from_pretrained(folder)
    weights = dict(exported.named_parameters(remove_duplicate=False))
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
        launch(plan)
    message = str(caught.value)
    assert "loss of step 1 is not finite" in message and "rank 0" in message and "rank_0.log" in message
    assert len(message.splitlines()) <= 4
    assert not list(plan.config.run_dir.glob("checkpoint_0*"))
    assert len(capfd.readouterr().out.splitlines()) <= 40
