"""One process of a candidate: build it, train some steps, measure. Started by `run.py`, a process per GPU.

    RANK=0 WORLD_SIZE=2 … python ci/benchmark/candidate.py <job.json>

Rank 0 writes the job's `result` after the build and again after the steps, so that a run that is cut off leaves what it
measured. A rank that fails writes `<result>.error` and ends at once; `run.py` then ends the others.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from profiler import Clock, record, synchronize
from trainer import Trainer, batches, engine_trainer

from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.speed import graphs
from tp2d_helpers.speed.devices import device_named


def build(job: dict[str, Any], rank: int) -> Trainer:
    """The job's candidate. Collective."""
    if job["kind"] == "fsdp2":
        from fsdp2 import fsdp2_trainer

        return fsdp2_trainer(job, rank)
    if job["kind"] == "template_settings":
        from template import settings_trainer

        return settings_trainer(job, rank)
    return engine_trainer(job, rank)


def wait_for_turn(job: dict[str, Any]) -> None:
    """Libraries are imported while the candidate before still trains; the GPU is touched only after this."""
    parent = os.getppid()
    while not Path(job["go"]).exists():
        if os.getppid() != parent:
            sys.exit("the process that started this one is gone")
        time.sleep(0.02)
    os.environ["MASTER_PORT"] = Path(job["go"]).read_text()


def connect() -> torch.device:
    """Join the process group; return this rank's device."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl", timeout=timedelta(seconds=300))
        return torch.device("cuda", local_rank)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    return torch.device("cpu")


def peak_gib(device: torch.device) -> float | None:
    """Most GPU memory allocated since the last reset, the highest of all ranks; None on a CPU. Collective."""
    if device.type == "cpu":
        return None
    peak = torch.tensor(graphs.peak_memory() / 2**30, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return peak.item()


def train(trainer: Trainer, job: dict[str, Any], device: torch.device, began: float) -> dict[str, Any]:
    """Train `steps` optimizer steps; times of all of them in ms, losses, tokens and peak memory."""
    clock, losses, norms, useful, scales = Clock(), [], [], [], []
    source = batches(job, trainer)
    found: dict[str, Any] = {}
    clock.mark()
    for step in range(job["steps"]):
        micro_batches, real = next(source)
        losses.append(trainer.step(micro_batches).float())
        norms.append(trainer.norm())
        scales += [trainer.loss_scale()] if trainer.loss_scale else []
        useful.append(real)
        clock.mark()
        if step == 0:
            synchronize()
            found["first_step_seconds"] = time.time() - began
    milliseconds = clock.milliseconds()
    mean = torch.stack(losses)
    dist.all_reduce(mean)  # identical within a TP group
    per_step = job["micro_batch"] * job["accumulation"] * job["dp"] * job["seq"]
    return found | dict(
        step_ms=milliseconds,
        losses=finite((mean / dist.get_world_size()).tolist()),
        grad_norms=finite([math.nan if norm is None else float(norm) for norm in norms]),
        **({"loss_scales": [float(scale) for scale in scales]} if scales else {}),
        useful_tokens=useful,
        tokens=[per_step] * len(useful),
        peak_gib=peak_gib(device),
    )


def finite(numbers: list[float]) -> list[float | None]:
    """For JSON, which has no others."""
    return [number if math.isfinite(number) else None for number in numbers]


def measure(job: dict[str, Any], rank: int) -> None:
    """The whole of a candidate's run."""
    began = time.time()
    device = connect()

    def write(found: dict[str, Any]) -> None:
        if rank == 0:
            scratch = Path(job["result"] + ".tmp")
            scratch.write_text(json.dumps(found))
            scratch.replace(job["result"])

    trainer = build(job, rank)
    synchronize()
    gpu = device_named(torch.cuda.get_device_name()) if device.type == "cuda" else None
    flops = ModelFacts.of(trainer.config).flops_per_token(job["seq"], trainer.adapters)
    found: dict[str, Any] = dict(
        setup_seconds=time.time() - began,
        init_peak_gib=peak_gib(device),
        state_gib=trainer.state_bytes / 2**30,
        flops_per_token=flops,
        peak_flops=gpu and gpu.peak,
    )
    write(found)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found |= train(trainer, job, device, began)
    write(found)
    if job["profile"]:
        source = batches(job, trainer)
        found["profile"] = record(lambda: trainer.step(next(source)[0]), trainer.update, Path(job["trace"]))
        write(found)
    dist.barrier()


def main() -> None:
    """Run the job; end at once either way: threads of communication libraries may not end by themselves."""
    job, rank, code = json.loads(Path(sys.argv[1]).read_text()), int(os.environ["RANK"]), 0
    wait_for_turn(job)
    faulthandler.register(signal.SIGTERM, chain=True)  # one that hangs leaves in its log where
    try:
        measure(job, rank)
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        note = Path(job["result"] + ".error")
        if not note.exists():  # the first one is the cause
            note.write_text(f"{type(error).__name__}: {lines[0]}"[:400])
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
