"""The curves of a run where people look at curves: TensorBoard, Weights & Biases, MLflow.

The driver reads `metrics.jsonl` and hands new records on. Threads of their own feed the trackers, so neither training
nor the printed progress waits for one, and one that fails ends nothing but itself. No step is shown twice.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import queue
import shlex
import threading
import time
from typing import Any

from tp2d_helpers.checkpoint.run_folder import recorded
from tp2d_helpers.config import Config, ConfigError, reason

# Names in `metrics.jsonl`, and the section that a tracker shows them in.
CURVES = {"loss": "training", "eval_loss": "training", "grad_norm": "training", "learning_rate": "training",
          "tokens_per_second": "speed", "mfu": "speed", "peak_memory_gib": "speed"}  # fmt: skip
PROJECT = "tp_autotp"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another
PATIENCE = 60  # seconds that the end of a run waits for a tracker


class TensorBoard:
    """Event files in `<run>/tensorboard`, written by tensorboardX, which Ray Train needs as well.

    They are begun anew at each launch, and where steps are done again, so that they have what `metrics.jsonl` has.
    """

    def __init__(self, config: Config) -> None:
        self.folder, self.writer, self.newest = config.run_dir / "tensorboard", None, 0

    def add(self, records: list[dict[str, Any]]) -> None:
        """Write records. Their times are those of training, without pauses, up to now."""
        seconds = list(itertools.accumulate(record["step_seconds"] for record in records))
        began = time.time() - seconds[-1]
        for record, passed in zip(records, seconds, strict=True):
            if self.writer is None or record["step"] <= self.newest:
                self._begin()
            for name, value in curves(record).items():
                self.writer.add_scalar(name, value, record["step"], walltime=began + passed)
            self.newest = record["step"]
        self.writer.flush()

    def _begin(self) -> None:
        from tensorboardX import SummaryWriter

        self.close()
        for file in self.folder.glob("events.out.tfevents.*"):
            file.unlink()
        self.writer = SummaryWriter(str(self.folder))

    def close(self, failed: bool = False) -> None:
        """Write what is in memory."""
        if self.writer:
            self.writer.close()


class WeightsAndBiases:
    """A run of wandb under the run's own id, in the mode and for the account that wandb is set to.

    Offline, each launch leaves the whole curves in `<run>/wandb`. Online, a step that is done again keeps its first
    values: they can't be taken back.
    """

    def __init__(self, config: Config) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity(config),
            name=config.experiment_name,
            dir=config.run_dir,
            config=config.model_dump(),
            allow_val_change=True,
            resume="allow",
            reinit="create_new",
            save_code=False,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.newest = self.run.step - 1

    def add(self, records: list[dict[str, Any]]) -> None:
        """Log those that are new."""
        for record in records:
            if record["step"] > self.newest:
                self.run.log(curves(record), step=record["step"])
                self.newest = record["step"]

    def close(self, failed: bool) -> None:
        """Upload the rest."""
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says. A step that is done again keeps its first values."""

    def __init__(self, config: Config) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client, name = MlflowClient(), _experiment()
        experiment = self.client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self.client.create_experiment(name)
        found = self.client.search_runs([place], f"tags.run_id = '{identity(config)}'", max_results=1)
        if found:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
        else:
            tags = {"run_id": identity(config)}
            found = [self.client.create_run(place, tags=tags, run_name=config.experiment_name)]
            settings = [Param(name, str(value)) for name, value in config.model_dump().items()]
            self.client.log_batch(found[0].info.run_id, params=settings)
        self.id, self.newest = found[0].info.run_id, int(found[0].data.metrics.get("step", 0))

    def add(self, records: list[dict[str, Any]]) -> None:
        """Log those that are new, and with them `step`, by which a resumed run knows them."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [record for record in records if record["step"] > self.newest]
        for i in range(0, len(new), 100):  # a request may have 1,000 metrics
            values = [(curves(record) | {"step": record["step"]}, record["step"]) for record in new[i : i + 100]]
            metrics = [Metric(name, value, now, step) for named, step in values for name, value in named.items()]
            self.client.log_batch(self.id, metrics=metrics)
            self.newest = values[-1][1]

    def close(self, failed: bool) -> None:
        """Mark the run as ended."""
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


# {name: (its class, the module it needs, the package that has it)}
TRACKERS: dict[str, tuple[Any, str, str]] = {
    "tensorboard": (TensorBoard, "tensorboardX", "tensorboardX"),
    "wandb": (WeightsAndBiases, "wandb", "wandb"),
    "mlflow": (MLflow, "mlflow", "mlflow"),
}


class Trackers:
    """Feeds the trackers of a config within a `with`, each in a thread of its own."""

    def __init__(self, config: Config) -> None:
        self.config, self.failed = config, False
        self.waiting = {name: queue.SimpleQueue() for name in tracker_names(config)}
        self.threads = {name: threading.Thread(target=self._feed, args=(name,), daemon=True) for name in self.waiting}

    def add(self, records: list[dict[str, Any]] | None) -> None:
        """Hand on what was read of `metrics.jsonl`, from its beginning on, and return at once. None ends it."""
        for name, waiting in self.waiting.items():
            if self.threads[name].is_alive():  # it has not failed
                waiting.put(records)

    def __enter__(self) -> Trackers:
        for thread in self.threads.values():
            thread.start()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.failed, end = kind is not None, time.monotonic() + PATIENCE
        self.add(None)
        for name, thread in self.threads.items():
            thread.join(max(end - time.monotonic(), 0))
            if thread.is_alive():
                print(f"{name}: not done {PATIENCE} s after the run; what it lacks is in metrics.jsonl", flush=True)

    def _feed(self, name: str) -> None:
        tracker = None
        try:
            while (records := self.waiting[name].get()) is not None:
                if records:
                    tracker = tracker or TRACKERS[name][0](self.config)
                    tracker.add(records)
            if tracker:
                tracker.close(failed=self.failed)
        except Exception as error:
            print(f"{name}: {reason(error)}; the run goes on without it", flush=True)


def tracker_names(config: Config) -> list[str]:
    """Of the trackers that a config asks for."""
    return [name for name in config.trackers.split(",") if name != "none"]


def curves(record: dict[str, Any]) -> dict[str, float]:
    """What is shown of a record of `metrics.jsonl`, where it has a value, by section and name."""
    return {f"{section}/{name}": record[name] for name, section in CURVES.items() if record.get(name) is not None}


def identity(config: Config) -> str:
    """By what a tracker knows the run again: the id in its `config.json`."""
    return recorded(config.run_dir).get("run_id") or config.experiment_name


def check_trackers(config: Config) -> list[tuple[str, str, str]]:
    """Preflight's row: where the curves are; none without trackers.

    Raises:
        ConfigError: for one that isn't installed, wants a key and would ask for it in the middle of the run, or has no
            place for the curves.
    """
    for name in tracker_names(config):
        _, module, package = TRACKERS[name]
        if not importlib.util.find_spec(module):
            raise ConfigError(
                f"trackers = {config.trackers!r}: {name} is not installed; pip install {package}, or take "
                f"{','.join(other for other in tracker_names(config) if other != name) or 'none'!r}"
            )
    if "wandb" in tracker_names(config):
        _check_wandb_key(config)
    mlflow = _place_of_mlflow(config) if "mlflow" in tracker_names(config) else ""
    places = {
        "tensorboard": f"tensorboard --logdir {shlex.quote(config.storage_path)}",
        "wandb": f"wandb, project {os.environ.get('WANDB_PROJECT', PROJECT)}",
        "mlflow": f"MLflow at {mlflow}",
    }
    names = tracker_names(config)
    return [("curves", ", ".join(names), "; ".join(places[name] for name in names))] if names else []


def _experiment() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)


def _place_of_mlflow(config: Config) -> str:
    """Where MLflow keeps the curves. The experiment is asked for there, once, not for minutes as by default."""
    import mlflow

    place = mlflow.get_tracking_uri()
    once = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    once = {name: value for name, value in once.items() if name not in os.environ}
    os.environ.update(once)
    try:
        mlflow.MlflowClient().get_experiment_by_name(_experiment())
    except Exception as error:
        raise ConfigError(
            f"trackers = {config.trackers!r}: MLflow can't keep curves at {place} ({reason(error)}); set "
            "MLFLOW_TRACKING_URI to a server that answers (http://host:port) or to a file (sqlite:////path/mlflow.db)"
        ) from error
    finally:
        for name in once:
            os.environ.pop(name, None)
    return place


def _check_wandb_key(config: Config) -> None:
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings
    known = settings.api_key or settings.identity_token_file or get_netrc_auth(settings.base_url)
    if settings.mode in (None, "online", "shared") and not known:
        raise ConfigError(
            f"trackers = {config.trackers!r}: wandb has no key for {settings.base_url}; run `wandb login` (or set "
            "WANDB_API_KEY), or set WANDB_MODE to offline"
        )
