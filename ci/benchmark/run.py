"""Training speed and memory of this package's engine beside its peers: on the same GPUs, one after the other.

    python ci/benchmark/run.py --shape qwen2-7b --seq 4096 --gpus 2 --out results.json --plot results.png
    python ci/benchmark/run.py --only ours --optimizations none,auto --micro-batch 2,4 --profile ours --out results.json
    python ci/benchmark/run.py --shape demo --seq 64 --global-batch 4 --micro-batch 2 --peer-micro-batch 2 --out x.json

Every candidate runs in processes of its own, one per GPU, and `--out` is written after each, so that a run that is cut
off leaves what it measured. One that fails is recorded with its error, and the others go on. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from jobs import Job
from lineup import ALSO, DEFAULT, SMALL, jobs, scaled
from results import FORMULA, best, now, row, summary, table

# torchtitan/distributed/utils.py, maybe_enable_amp: "Mixed precision training with TP or PP is only supported when
# FSDP/HSDP/CP is enabled", which it is from two FSDP ranks on. 0.3.0 wants a nightly PyTorch and an older `datasets`.
TORCHTITAN = "torchtitan 0.2.2 has no bf16 computation with fp32 masters at dp 1; fsdp2_sp is put together like it"
INPUT_SECONDS = 240  # to write the models and the text
BUILD_SECONDS = 20  # under which it makes no sense to start another candidate


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    names = lambda text: [part.strip() for part in text.split(",") if part.strip()]  # noqa: E731
    add = parser.add_argument
    add("--shape", default="demo", help="of tp2d_helpers.demo.SHAPES")
    add("--small-shape", default="", help="for the published template and what is beside it (default: qwen2.5-0.5b)")
    add("--layers", type=int, default=0, help="instead of the shape's own, for a rehearsal")
    add("--seq", type=int, default=4096)
    add("--gpus", type=int, default=2, help="or processes on a CPU")
    add("--global-batch", type=int, default=16, help="samples per optimizer step")
    add("--micro-batch", type=integers, default=[4], help="of ours: sizes, separated by commas")
    add("--peer-micro-batch", type=integers, default=[2, 4], help="of FSDP2 with tensor parallelism")
    add("--data-parallel-micro-batch", type=integers, default=[2], help="of pure data parallelism")
    add("--accumulation", type=int, default=0, help="of ours, instead of what the global batch asks for")
    add("--tp", type=int, default=0, help="of ours (default: all GPUs)")
    add("--dp", type=int, default=0, help="of ours")
    add("--optimizations", default="auto", help='of ours: "auto", "none" or names joined by +; several by commas')
    add("--activation-checkpointing", default="none", help="of ours")
    add("--lora-rank", type=int, default=16, help="of ours_lora and fsdp2_lora, on all linear layers")
    add("--packing", type=names, default=["plain"], help="of ours: plain, documents, or both, on the same tokens")
    add("--fsdp2-sync", type=names, default=["last"], help="reduce gradients at the last micro-batch, or at each")
    add("--gradients", type=names, default=["fp32"], help="of ours and FSDP2: to accumulate and reduce in; fp32, bf16")
    add("--precision", type=names, default=["bf16"], help="of ours and FSDP2: bf16, fp8")
    add("--only", type=names, default=list(DEFAULT), help=f"of {', '.join(DEFAULT + ALSO)}")
    add("--profile", type=names, default=[], help="candidates to trace one step of")
    add("--template", type=Path, help="the published template's notebook")
    add("--steps", type=int, default=8, help="optimizer steps, the warm-up included")
    add("--warmup", type=int, default=3, help="steps that don't count: compilation, caches")
    add("--time-limit", type=float, default=540, help="seconds for everything")
    add("--candidate-limit", type=float, default=200, help="seconds for one candidate")
    add("--scratch", type=Path, default=Path("/dev/shm/bench"), help="for models, logs and traces")
    add("--out", type=Path, required=True)
    add("--plot", type=Path, help="draw the figure into this PNG")
    options = parser.parse_args(arguments)
    if unknown := sorted({*options.only, *options.profile} - {*DEFAULT, *ALSO}):
        parser.error(f"{unknown}: unknown; there are {', '.join(DEFAULT + ALSO)}")
    if options.steps <= options.warmup:
        parser.error(f"--steps {options.steps} must be more than --warmup {options.warmup}")
    options.optimizations = [",".join(one.split("+")) for one in names(options.optimizations)]
    return options


class Benchmark:
    """The jobs of a run, their order, and what is known so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.end = options, time.monotonic() + options.time_limit
        self.scratch = options.scratch.absolute()
        self.report: dict[str, Any] = dict(
            date=now(),
            shape=options.shape, layers=options.layers or "all", seq=options.seq, gpus=options.gpus,
            global_batch=options.global_batch, formula=FORMULA, peak_flops=None, candidates=[],
        )  # fmt: skip
        self.env = {"TP2D_CACHE": str(self.scratch / "cache"), "HF_DATASETS_CACHE": str(self.scratch / "datasets")}

    def write(self) -> None:
        """Replace `--out` by what is known now."""
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.options.out.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.report, indent=1, ensure_ascii=False) + "\n")
        scratch.replace(self.options.out)

    def prepare(self) -> None:
        """Make the models and the text; note the versions and the GPUs.

        Raises:
            SystemExit: if that fails.
        """
        options, began = self.options, time.monotonic()
        options.small_shape = options.small_shape or ("demo" if options.shape == "demo" else "qwen2.5-0.5b")
        shapes = {options.small_shape if name in SMALL else options.shape for name in options.only}
        models = {shape: str(self.model(shape)) for shape in shapes}
        settings = dict(models=models, layers={options.shape: options.layers}, text=str(self.scratch / "text"))
        job = Job("inputs.py", settings, 1, self.scratch / "jobs" / "inputs", self.env)
        if error := job.wait(min(INPUT_SECONDS, options.time_limit)):
            raise SystemExit(f"the inputs could not be made: {error}")
        self.report |= job.found() | {"input_seconds": time.monotonic() - began}
        on_gpu = self.report["device"] == "cuda"
        if not on_gpu:
            self.env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        options.small = scaled(options.small_shape, on_gpu)
        self.write()

    def model(self, shape: str) -> Path:
        """Folder of a model in the scratch folder."""
        layers = self.options.layers if shape == self.options.shape else 0
        return self.scratch / f"{shape}-{layers or 'all'}"

    def queue(self) -> list[dict[str, Any]]:
        """All jobs; what can't run is recorded at once."""
        found = []
        for name in self.options.only:
            reason = None
            if name == "torchtitan":
                reason = TORCHTITAN if self.report["versions"].get("torchtitan") else f"not installed; {TORCHTITAN}"
            elif name == "template" and not self.options.template:
                reason = "no notebook was named (--template)"
            if reason:
                self.report["candidates"].append(dict(name=name, status="not run", error=reason))
            else:
                found += jobs(name, self.options)
        return found

    def start(self, settings: dict[str, Any]) -> Job:
        """Start the processes of a job; they import their libraries and wait."""
        name = f"{settings['name']}-{len(list((self.scratch / 'jobs').iterdir())):02d}"
        folder = self.scratch / "jobs" / name
        template = settings["kind"] == "template"
        settings = settings | dict(
            model=str(self.model(settings["shape"])),
            text=str(self.scratch / "text" / ("" if template else "train.jsonl")) if settings["text"] else "",
            trace=str(self.scratch / f"{name}.trace.json.gz"),
            notebook=str(self.options.template.absolute()) if self.options.template else "",
        )
        script, processes = ("template.py", 1) if template else ("candidate.py", settings["tp"] * settings["dp"])
        return Job(script, settings, processes, folder, self.env)

    def run(self) -> None:
        """Run all jobs, one at a time."""
        queue, waiting = self.queue(), None
        self.write()
        # The next job's imports go on while this one trains, where there are cores for it.
        ahead = self.report["device"] == "cuda"
        try:
            for number, settings in enumerate(queue):
                left = self.end - time.monotonic()
                if left < BUILD_SECONDS:
                    self.add(settings, None, "the time was over")
                    continue
                job = waiting or self.start(settings)
                job.release()
                more = ahead and number + 1 < len(queue) and left > 2 * BUILD_SECONDS
                waiting = self.start(queue[number + 1]) if more else None
                self.add(settings, job, job.wait(min(self.options.candidate_limit, left)))
        finally:
            if waiting:
                waiting.end()

    def add(self, settings: dict[str, Any], job: Job | None, error: str | None) -> None:
        """Record what a job found."""
        found = job.found() if job else {}
        entry = summary(settings, found, error if job else None)
        if not job:
            entry |= dict(status="not run", error=error)
        self.report["candidates"].append(entry)
        self.report["peak_flops"] = self.report["peak_flops"] or found.get("peak_flops")
        self.report["best"] = best(self.report["candidates"])
        self.write()
        print(row(entry), flush=True)


def main() -> None:
    """Measure, print, draw."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the jobs, by `finally`
    benchmark = Benchmark(options)
    benchmark.prepare()
    benchmark.run()
    print(table(benchmark.report))
    print(benchmark.report["formula"])
    if options.plot:
        from plot import draw

        draw([benchmark.report], options.plot)


if __name__ == "__main__":
    main()
