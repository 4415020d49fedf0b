"""From a plan to a finished run: launch it on Ray Train, print how far it is, end it cleanly, say what went wrong."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

from tp2d_helpers import startup
from tp2d_helpers.cgroups import out_of_memory_kills
from tp2d_helpers.checkpoint.files import WRITER, lock_run, read_json
from tp2d_helpers.checkpoint.run_folder import last_step, newest_checkpoint
from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.preflight.plan import Plan
from tp2d_helpers.train import train_func
from tp2d_helpers.training.deaths import describe_failures
from tp2d_helpers.training.elastic import GridTrainer
from tp2d_helpers.training.metrics import newest_step
from tp2d_helpers.training.samples import FILE, read_samples
from tp2d_helpers.training.trackers import Trackers

RAY_METRICS = "RAY_TRAIN_METRICS_ENABLED"
MOST_LINES = 30  # of progress in one launch, however long the run


class TrainingFailed(RuntimeError):
    """The run ended with an error. The message has that of the worker at fault, and where its log is."""

    _render_traceback_ = ConfigError._render_traceback_


class TrainingInterrupted(KeyboardInterrupt):
    """The reader stopped the run. The message says at which step, and how to continue."""

    _render_traceback_ = ConfigError._render_traceback_


def launch(plan: Plan, train_func: Callable[[dict[str, Any]], None] = train_func) -> ray.train.Result:
    """Train as planned, from the run's newest checkpoint if it has one.

    Args:
        plan: what `preflight` returned.
        train_func: what each worker runs, called with the settings; one defined in a notebook will do.
    """
    config = plan.config
    trainer = GridTrainer(
        train_func,
        train_loop_config=config.model_dump(),
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker=plan.resources_per_worker,
        ),
        run_config=RunConfig(
            name=config.experiment_name,
            storage_path=config.storage_path,
            checkpoint_config=CheckpointConfig(config.checkpoints_to_keep, **plan.checkpoint_score),
            failure_config=FailureConfig(config.max_failures, controller_failure_limit=2),
            worker_runtime_env=plan.worker_runtime_env,
        ),
    )
    if whole := plan.model.part_of:
        print(f"the text model of {whole} alone is trained: what takes images or sound is left out", flush=True)
    with follow(config, plan.steps_per_epoch), ray_metrics(config.experiment_name.isascii()):
        return trainer.fit()


@contextlib.contextmanager
def ray_metrics(possible: bool) -> Iterator[None]:
    """Within it, a launch leaves out Ray Train's own metrics unless they are possible: of a name in ASCII alone."""
    before = os.environ.get(RAY_METRICS)
    if not possible:
        os.environ[RAY_METRICS] = "0"
    try:
        yield
    finally:
        os.environ.pop(RAY_METRICS, None)
        os.environ |= {} if before is None else {RAY_METRICS: before}


@contextlib.contextmanager
def follow(config: Config, steps_per_epoch: int) -> Iterator[None]:
    """Print the progress of the run that the body launches: a line per `log_interval`, at most `MOST_LINES`.

    And one for each prompt at each evaluation (`sample_prompts`).

    The run's folder is locked meanwhile.

    Raises:
        ConfigError: if another process is writing to the run's folder.
        TrainingFailed: in place of the launch's own error, whose trace has hundreds of lines.
        TrainingInterrupted: after Ctrl-C, or "Interrupt" in Jupyter.
    """
    path, total = config.run_dir / "metrics.jsonl", last_step(config, steps_per_epoch)
    interrupt = signal.getsignal(signal.SIGINT)  # Ray Train takes it over and does not give it back
    with lock_run(config), Trackers(config) as trackers:
        (config.run_dir / "stalled.json").unlink(missing_ok=True)  # of an earlier launch
        done = newest_step(path)
        every = math.ceil((total - done) / config.log_interval / MOST_LINES) * config.log_interval or 1
        steps = f"steps {done + 1} to {total}" if done < total else f"all {total} steps are done"
        workers = f"{config.num_workers} worker{'s' * (config.num_workers > 1)}"
        print(f"{workers}, {steps}; logs: {config.run_dir / 'logs'}", flush=True)
        finished, began, killed_before = threading.Event(), time.time(), out_of_memory_kills()
        arguments = (path, done, total, every, began, finished, trackers)
        thread = threading.Thread(target=_print_progress, args=arguments, daemon=True)
        thread.start()
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as error:  # Ray Train answers Ctrl-C by sys.exit(0)
            _kill_actors(error)
            raise TrainingInterrupted(_describe_interrupt(config, total)) from None
        except Exception as error:
            raise TrainingFailed(_describe(error, config, killed_before)) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, interrupt)
            finished.set()
            thread.join()
            (config.run_dir / WRITER).unlink(missing_ok=True)  # the workers are gone
    print(f"finished in {time.time() - began:.0f} s")


def _print_progress(
    path: Path, done: int, total: int, every: int, launched: float, finished: threading.Event, trackers: Trackers
) -> None:
    last, tail, start = False, Tail(path), None
    texts, shown = Tail(path.with_name(FILE)), {(text["step"], text["prompt"]) for text in read_samples(path.parent)}
    while not last:
        last = finished.wait(0.5)  # one more look after the end
        if not start and (start := startup.describe(read_json(path.parent / "start.json"), launched)):
            print(start, flush=True)
        trackers.add(records := tail.read())
        for record in records:
            if record["step"] > done and (record["step"] % every == 0 or record["step"] == total):
                print(progress_line(record, total), flush=True)
            done = max(done, record["step"])
        for text in texts.read():
            if (key := (text["step"], text["prompt"])) not in shown:
                shown.add(key)
                print(sample_line(text), flush=True)


class Tail:
    """Reads what is new in a `metrics.jsonl`; all of it again after a restarted run has put another in its place."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.offset = path, (0, 0), 0

    def read(self) -> list[dict[str, Any]]:
        """Records that were written since the last call. A line that isn't complete yet waits for the next one."""
        new = b""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_dev, status.st_ino) != self.file or status.st_size < self.offset:
                self.file, self.offset = (status.st_dev, status.st_ino), 0
            file.seek(self.offset)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self.offset += len(new)
        return [json.loads(line) for line in new.splitlines()]


def progress_line(record: dict[str, Any], total: int) -> str:
    """One record of `metrics.jsonl` in a line."""
    number = "nan" if record["loss"] is None else f"{record['loss']:.4f}"
    norm = "-" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
    mfu = "" if record["mfu"] is None else f"  MFU {record['mfu']:.1%}"
    return (
        f"step {record['step']:>{len(str(total))}}/{total}  epoch {record['epoch']}  loss {number}  grad norm {norm}"
        f"  {record['tokens_per_second']:,.0f} tokens/s{mfu}  peak {record['peak_memory_gib']:.2f} GiB"
    )


def sample_line(sample: dict[str, Any]) -> str:
    """One record of `samples.jsonl` in a line, long texts cut; line breaks are seen as such."""
    return f"step {sample['step']}: {_shorten(sample['prompt'], 40)} → {_shorten(sample['text'], 80)!r}"


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _describe(error: Exception, config: Config, killed_before: int) -> str:
    failures = getattr(error, "worker_failures", {})
    stall = read_json(config.run_dir / "stalled.json")  # of the last attempt: the next one gives it another name
    if stall:
        at = time.strftime("%H:%M:%S", time.localtime(stall["time"]))
        after = "" if failures else f"\nThen: {error}"  # not of a worker: the run could not be started again
        return f"{stall['message']} (at {at})\nWhere the ranks hung: {config.run_dir / 'logs'}{after}"
    if not failures:
        return f"{error}\nWorker logs: {config.run_dir / 'logs'}"
    return describe_failures(failures, config, killed_before)


def _describe_interrupt(config: Config, total: int) -> str:
    step = newest_step(config.run_dir / "metrics.jsonl")
    newest, _ = newest_checkpoint(config.run_dir)
    return (
        f"interrupted after step {step} of {total}; the workers are stopped.\n"
        f"A launch with experiment_name = {config.experiment_name!r} "
        + (f"continues from {newest.name}." if newest else "begins anew: there is no complete checkpoint yet.")
    )


def _kill_actors(error: BaseException) -> None:
    """End what the launch that raised the error has started, as far as Ray Train has not.

    Its controller outlives an interrupt that comes before Ray Train listens for one, or three in a row, and goes on
    training. Nothing but the frames of Ray Train holds a handle to it. With the controller go its workers.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").startswith("ray.train."):
            for value in frame.f_locals.values():
                if isinstance(value, ray.actor.ActorHandle):
                    ray.kill(value)
