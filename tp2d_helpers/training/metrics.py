"""Loss, gradient norm, tokens/s, MFU and memory of every optimizer step, without stopping the GPU to ask for them.

A step leaves its loss on the device and its time as a pair of CUDA events. `flush` fetches a block of steps at once:
one all-reduce for their losses, one synchronisation for their times.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from tp2d_helpers import heartbeat, startup
from tp2d_helpers.checkpoint.files import read_json_lines, write_json
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.lora import Adapter
from tp2d_helpers.speed import graphs
from tp2d_helpers.speed.devices import device_named
from tp2d_helpers.speed.optimizer import loss_scale


def log_to_file(run_dir: str | Path, rank: int) -> None:
    """Send all that this worker prints, its libraries and their C++ parts included, to `<run>/logs/rank_<rank>.log`."""
    path = Path(run_dir) / "logs" / f"rank_{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    startup.mark("imports")
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


class StepMetrics:
    """Collects one record per optimizer step and writes `metrics.jsonl` in blocks.

    A record has `step`, `epoch`, `loss` (mean over all targets of the global batch), `grad_norm` (before clipping),
    `learning_rate`, `tokens` (real ones), `step_seconds`, `tokens_per_second`, `mfu` (None where the peak is unknown),
    `peak_memory_gib` (the highest of all ranks: GPU memory allocated, or on CPU the resident set of the process) and
    `eval_loss` (of the held-out samples after the step, None where they weren't evaluated). In fp16 also `loss_scale`,
    after the step. A number that isn't finite is written as null, such as the norm of a step that was left out.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        dp_group: dist.ProcessGroup,
        run_dir: str | Path,
        seq_length: int,
        log_interval: int = 1,
        done: int = 0,
    ) -> None:
        """Begin after `done` steps: records of later steps, left by a run that was cut off, are dropped."""
        self.engine, self.dp_group, self.interval = engine, dp_group, log_interval
        self.path = Path(run_dir) / "metrics.jsonl"
        self.cuda = engine.device.type == "cuda"
        self.waiting: list[dict[str, Any]] = []
        self.compared = False
        self.newest_loss = math.nan
        self.newest_eval_loss: float | None = None
        device = device_named(torch.cuda.get_device_name()) if self.cuda else None
        adapters = sum(module.size for module in engine.module.modules() if isinstance(module, Adapter))
        flops = ModelFacts.of(engine.module.config).flops_per_token(seq_length, adapters)
        self.mfu_per_rate = flops / device.peak / dist.get_world_size() if device else None
        if dist.get_rank() == 0:
            keep_until(self.path, done)
        self.learning_rate = engine.get_lr()[0]
        startup.mark("checkpoint")  # which was loaded before this
        engine.register_forward_hook(lambda *_: heartbeat.pulse())  # a step of many micro-batches is no hang
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave the time since the last step out of the next step's (after a checkpoint, for one)."""
        self.last = self._now()

    def record(self, step: int, epoch: int, loss: torch.Tensor, tokens: int) -> None:
        """Note a step that was just launched.

        Args:
            step: 1-based over the whole run.
            epoch: 0-based.
            loss: this rank's mean over its micro-batches, a 0-dim tensor that stays on its device.
            tokens: real tokens of the global batch.
        """
        if not startup.finished():
            if self.cuda:
                torch.cuda.synchronize()
            startup.mark("first step")
            start = startup.finish()
            if dist.get_rank() == 0:
                write_json(self.path.parent / "start.json", start)
        now = self._now()
        # fp16 learns late that a step was left out, and that the next one's rate is the same.
        rate = self.learning_rate = getattr(self.engine.optimizer, "rate", self.learning_rate)
        self.waiting.append(
            dict(step=step, epoch=epoch, loss=loss, grad_norm=self.engine.get_global_grad_norm(),
                 learning_rate=rate, tokens=tokens, step_seconds=(self.last, now), eval_loss=None)
        )  # fmt: skip
        if self.engine.fp16_enabled():
            self.waiting[-1]["loss_scale"] = loss_scale(self.engine)
        if not self.compared and self.learning_rate > 0:  # 0: the first step of a warm-up, which moves nothing
            self.engine.whole_weights.compare()
            self.compared, now = True, self._now()
        self.last, self.learning_rate = now, self.engine.get_lr()[0]

    def record_evaluation(self, loss: float) -> None:
        """Add the held-out loss after the newest step, and leave the time it took out of the next step's."""
        self.newest_eval_loss = self.waiting[-1]["eval_loss"] = loss
        self.restart_clock()

    def flush_due(self) -> bool:
        """True where `log_interval` asks for a flush: the same steps on every rank."""
        return bool(self.waiting) and self.waiting[-1]["step"] % self.interval == 0

    def flush(self) -> None:
        """Fetch and write what is waiting. Collective.

        Raises:
            FloatingPointError: if a loss isn't finite, or the gradients of all steps since the last flush aren't, after
                writing the records.
        """
        if not self.waiting:
            return
        losses = torch.stack([record["loss"].float() for record in self.waiting])
        dist.all_reduce(losses, group=self.dp_group)  # identical within a TP group, so the sum is over DP alone
        losses = (losses / dist.get_world_size(self.dp_group)).tolist()
        memory = torch.tensor(self._peak_memory(), device=self.engine.device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        for record, loss in zip(self.waiting, losses, strict=True):
            start, end = record["step_seconds"]
            seconds = start.elapsed_time(end) / 1000 if self.cuda else end - start
            rate = record["tokens"] / seconds
            record.update(
                loss=loss,
                grad_norm=None if record["grad_norm"] is None else float(record["grad_norm"]),
                step_seconds=seconds,
                tokens_per_second=rate,
                mfu=rate * self.mfu_per_rate if self.mfu_per_rate else None,
                peak_memory_gib=memory.item(),
            )
            if "loss_scale" in record:
                record["loss_scale"] = float(record["loss_scale"])
        if dist.get_rank() == 0:
            append(self.path, self.waiting)
        flushed, self.waiting, self.newest_loss = self.waiting, [], losses[-1]
        self._check_finite(flushed)

    def _check_finite(self, records: list[dict[str, Any]]) -> None:
        bad = [record["step"] for record in records if not math.isfinite(record["loss"])]
        if bad:
            raise FloatingPointError(f"the loss of step {bad[0]} is not finite; the checkpoint before it is kept")
        norms = [record["grad_norm"] for record in records if record["grad_norm"] is not None]
        # The optimizer leaves such a step out. That is how fp16 finds its loss scale; else it is a fault, if it lasts.
        if norms and not self.engine.fp16_enabled() and not any(map(math.isfinite, norms)):
            first, last = records[0]["step"], records[-1]["step"]
            raise FloatingPointError(
                f"the gradients of steps {first} to {last} are not finite, and none of these steps was taken; "
                "the checkpoint before them is kept"
            )

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _peak_memory(self) -> float:
        if self.cuda:
            return graphs.peak_memory() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; an incomplete last line, of a process that was killed, is left out."""
    return read_json_lines(Path(path))


def newest_step(path: str | os.PathLike[str]) -> int:
    """The last step of a `metrics.jsonl`, 0 if there is none."""
    return max((record["step"] for record in read_metrics(path)), default=0)


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Add records to a `metrics.jsonl`, numbers that aren't finite as null, and see that they reach the disk."""
    finite = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in finite)
        file.flush()
        os.fsync(file.fileno())


def keep_until(path: Path, step: int) -> None:
    """Drop the records after `step`, in one atomic replacement."""
    records = [record for record in read_metrics(path) if record["step"] <= step]
    scratch = path.with_suffix(".tmp")
    scratch.unlink(missing_ok=True)
    append(scratch, records)
    scratch.replace(path)
