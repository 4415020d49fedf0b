"""What a precision costs in loss: runs that differ in it alone, on text, from the same random weights.

    python ci/benchmark/losses.py --runs qwen2.5-0.5b:0:8:512,qwen2-7b:8:2:1024 --out losses.json --plot losses.png

A run is shape:layers:micro-batch:sequence (0 layers: the shape's own), on `--tp` GPUs, at a constant rate. A precision
may name another number of GPUs, as `bf16:1`: how far apart are runs that differ in the order of their sums alone?
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs import Job
from results import now

LAST = 50  # steps whose mean loss is compared
COLORS = {"bf16": "tab:blue", "fp16": "tab:orange", "fp8": "tab:red"}


def job_of(run: dict[str, Any], precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """A job for `candidate.py`."""
    precision, _, gpus = precision.partition(":")
    return dict(
        name="losses", kind="ours", tp=int(gpus or options.tp), dp=1, zero=1, seq=run["seq"],
        optimizations="auto", sync="last", precision=precision, gradients="fp32", lora_rank=0,
        activation_checkpointing="none", packing="plain",
        shape=run["shape"], steps=options.steps, warmup=0, profile=False, micro_batch=run["micro_batch"],
        accumulation=1, learning_rate=options.learning_rate, model=run["model"],
        text=str(options.scratch / "text" / "train.jsonl"),
    )  # fmt: skip


def difference(losses: dict[str, list[float]], precision: str) -> dict[str, float]:
    """Of the mean loss over the last steps from bf16's, and the largest of such means over the run."""
    pairs = list(zip(losses[precision], losses["bf16"], strict=True))
    means = [
        sum(now - then for now, then in pairs[at : at + LAST]) / LAST for at in range(0, len(pairs) - LAST + 1, LAST)
    ]
    return dict(last=means[-1], largest=max(means, key=abs))


def draw(report: dict[str, Any], path: Path) -> None:
    """Two panels per run: the losses, and their differences from bf16's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(report["runs"]), figsize=(5.5 * len(report["runs"]), 6), squeeze=False,
                                    sharey="row")  # fmt: skip
    for run, (top, bottom) in zip(report["runs"], panels.T, strict=True):
        for precision, losses in run["losses"].items():
            name, _, gpus = precision.partition(":")
            name, color = name + f", tp {gpus}" * bool(gpus), COLORS.get(precision, "tab:gray")
            top.plot(range(1, len(losses) + 1), losses, color, label=name, lw=1)
            if precision != "bf16":
                off = [now - then for now, then in zip(losses, run["losses"]["bf16"], strict=True)]
                bottom.plot(range(1, len(off) + 1), off, color, lw=0.8, label=f"{name} less bf16")
        layers = f", {run['layers']} layers" * bool(run["layers"])
        title = f"{run['shape']}{layers}, {run['micro_batch']} × {run['seq']} tokens per step"
        top.set_title(f"{title}\ntp {report['tp']}, {run['date']}", fontsize=10)
        top.set_ylabel("loss")
        bottom.set_ylabel("difference")
        bottom.axhline(0, color="black", lw=0.5)
        bottom.set_xlabel("step")
        top.legend(frameon=False)
        bottom.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--runs", type=names, required=True, help="shape:layers:micro-batch:sequence, with commas")
    parser.add_argument("--precisions", type=names, default=["bf16", "fp8"], help="bf16 first")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--time-limit", type=float, default=200, help="seconds for one run")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm/losses"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="draw the curves into this PNG")
    options = parser.parse_args()
    options.scratch = options.scratch.absolute()
    env = {"TP2D_CACHE": str(options.scratch / "cache"), "HF_DATASETS_CACHE": str(options.scratch / "datasets")}
    report: dict[str, Any] = dict(
        date=now(), steps=options.steps,
        tp=options.tp, learning_rate=options.learning_rate, compared=f"mean of the last {LAST} steps", runs=[],
    )  # fmt: skip
    for text in options.runs:
        shape, *numbers = text.split(":")
        run: dict[str, Any] = dict(zip(("layers", "micro_batch", "seq"), map(int, numbers), strict=True), shape=shape)
        run["date"] = now()
        run["model"] = str(options.scratch / f"{shape}-{run['layers'] or 'all'}")
        inputs = dict(models={shape: run["model"]}, layers={shape: run["layers"]}, text=str(options.scratch / "text"))
        making = Job("inputs.py", inputs, 1, options.scratch / "jobs" / f"inputs-{shape}", env)
        if error := making.wait(240):
            raise SystemExit(f"the inputs could not be made: {error}")
        report |= making.found()
        run |= dict(losses={}, grad_norms={}, last_loss={}, step_ms={}, peak_gib={})
        for precision in options.precisions:
            settings = job_of(run, precision, options)
            folder = options.scratch / "jobs" / f"{shape}-{settings['precision']}-{settings['tp']}"
            job = Job("candidate.py", settings, settings["tp"], folder, env)
            job.release()
            if error := job.wait(options.time_limit):
                raise SystemExit(f"{text} in {precision}: {error}")
            found = job.found()
            run["losses"][precision] = found["losses"]
            run["grad_norms"][precision] = found["grad_norms"]
            if "loss_scales" in found:  # of a step that was left out, the norm isn't finite
                scales, norms = found["loss_scales"], found["grad_norms"]
                left_out = [step for step, norm in enumerate(norms, 1) if norm is None]
                run["loss_scale"] = dict(first=scales[0], last=scales[-1], lowest=min(scales), left_out=left_out)
            run["last_loss"][precision] = sum(found["losses"][-LAST:]) / LAST
            run["step_ms"][precision] = sorted(found["step_ms"])[len(found["step_ms"]) // 2]
            run["peak_gib"][precision] = found["peak_gib"]
        run["difference"] = {name: difference(run["losses"], name) for name in options.precisions[1:]}
        del run["model"]
        report["runs"].append(run)
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(text, *(run.get(name) for name in ("difference", "step_ms", "peak_gib", "loss_scale")), flush=True)
    if options.plot:
        draw(report, options.plot)


if __name__ == "__main__":
    main()
