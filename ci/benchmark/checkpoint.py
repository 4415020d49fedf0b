"""How long a checkpoint blocks training, written at once and in the background, and what an export costs.

    python ci/benchmark/checkpoint.py --shape qwen2-7b --tp 2 --storage /tmp/benchmark

Prints one JSON object and writes it to `<storage>/checkpoint.json`, also after each part, so that a run that is cut off
leaves what it measured. Seconds are the slowest rank's. The storage needs room for the model and one checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ray
import torch
import torch.distributed as dist
from load import Peak
from ray.train import RunConfig, ScalingConfig

from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.config import make_config
from tp2d_helpers.demo import SHAPES, build_model
from tp2d_helpers.model import ModelFacts
from tp2d_helpers.preflight.cluster import check_resources
from tp2d_helpers.preflight.connection import connect
from tp2d_helpers.preflight.plan import Plan
from tp2d_helpers.training.elastic import GridTrainer


def build(shape: str, layers: int, folder: Path) -> None:
    """Write a model of a shape of `SHAPES` with random weights, made on the GPU if there is one, and a tokenizer."""
    fields = dict(SHAPES[shape])
    fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        build_model(fields, folder)


def measure(config: dict[str, Any]) -> None:
    """On each worker: the time of steps, and of `save_checkpoint`, in both ways."""
    from tp2d_helpers.checkpoint.save_load import save_checkpoint
    from tp2d_helpers.model.engine import setup_model_with_autotp
    from tp2d_helpers.training.metrics import log_to_file

    context, run_dir = ray.train.get_context(), Path(config["storage_path"], config["experiment_name"])
    rank, world_size, found = context.get_world_rank(), context.get_world_size(), {}
    log_to_file(run_dir, rank)
    engine, *_ = setup_model_with_autotp(
        config["model_name"], config["tp_size"], config["dp_size"], rank, world_size, config
    )
    shape = (config["batch_size_per_gpu"], config["seq_length"])
    ids = torch.arange(shape[0] * shape[1], device=engine.device).view(shape) % 2048
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def slowest(seconds: float) -> float:
        value = torch.tensor(seconds, device=engine.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()

    def timed(action: Any) -> float:
        synchronize()
        dist.barrier()
        began = time.perf_counter()
        action()
        synchronize()
        return slowest(time.perf_counter() - began)

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    def save(number: int, background: bool) -> None:
        save_checkpoint(engine, 0, number, 0.0, run_dir=run_dir, background=background)

    def note(**measured: Any) -> None:
        found.update(measured)
        if rank == 0:
            (run_dir / "measured.json").write_text(json.dumps(found))

    def remove(number: int) -> None:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(run_dir / f"checkpoint_{number:08d}")
        dist.barrier()

    note(step_seconds=statistics.median([timed(step) for _ in range(6)][2:]))
    note(sync_blocked_seconds=timed(lambda: save(1, background=False)))
    if rank == 0:
        files = (run_dir / "checkpoint_00000001").rglob("*.pt")
        note(checkpoint_gb=sum(path.stat().st_size for path in files) / 1e9)
    remove(1)
    began = time.perf_counter()
    note(async_first_blocked_seconds=timed(lambda: save(2, background=True)))
    writer, during = engine.checkpoint_engine, []
    while slowest(float(not writer.disk.idle.is_set())):
        during.append(timed(step))
    note(async_write_seconds=time.perf_counter() - began)
    note(step_seconds_during_write=statistics.median(during) if during else None, steps_during_write=len(during))

    def copy_again() -> None:  # the pinned memory is there now; nothing is written, the disk may be full
        writer.begin(run_dir / "checkpoint_00000003", copy=True)
        engine.save_checkpoint(str(run_dir / "checkpoint_00000003"), tag="step_00000003")

    note(async_blocked_seconds=timed(copy_again))
    writer.waiting = []
    writer.disk.end()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--layers", type=int, default=0, help="instead of the shape's own")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--storage", type=Path, default=Path("outputs/benchmark"))
    options = parser.parse_args()
    storage = options.storage.absolute()
    shutil.rmtree(storage, ignore_errors=True)
    build(options.shape, options.layers, storage / "model")
    settings = dict(model_name=str(storage / "model"), dataset_name="demo", tp_size=options.tp, dp_size=options.dp,
                    seq_length=options.seq, use_gpu=torch.cuda.is_available(), storage_path=str(storage),
                    experiment_name="run")  # fmt: skip
    config = make_config(**settings)
    resources = connect()
    plan = Plan(config, ModelFacts.read(config.model_name), check_resources(config, resources), 0)
    trainer = GridTrainer(
        measure, train_loop_config=config.model_dump(),
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=config.use_gpu,
                                     resources_per_worker=plan.resources_per_worker),
        run_config=RunConfig(name="run", storage_path=str(storage), worker_runtime_env=plan.worker_runtime_env),
    )  # fmt: skip
    report: dict[str, Any] = {name: str(value) for name, value in vars(options).items()}
    try:
        trainer.fit()
    finally:
        report.update(json.loads((config.run_dir / "measured.json").read_text()))
        (storage / "checkpoint.json").write_text(json.dumps(report, indent=2))
    report.update(measure_export(config.run_dir / "checkpoint_00000002", config.model_name, storage / "export"))
    (storage / "checkpoint.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))


def measure_export(checkpoint: Path, model: str, folder: Path) -> dict[str, float]:
    """Seconds, size, and the most anonymous memory that the export had at a time, above what was there before."""
    began = time.perf_counter()
    with Peak() as peak:
        export_checkpoint(checkpoint, model, folder)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return dict(export_seconds=seconds, export_gb=size / 1e9, export_peak_memory_gb=peak.peak[0] / 1e9)


if __name__ == "__main__":
    main()
