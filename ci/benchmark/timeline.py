"""Where the time of one optimizer step goes: a trace that `profiler.record` wrote, and arithmetic on its intervals.

An interval is (begin, end). Times are microseconds in traces and milliseconds in summaries. What a figure needs of a
trace is a small file, made of the trace and of the results that `run.py --profile` wrote beside it:

    python ci/benchmark/timeline.py ours-01.trace.json.gz results.json timeline.json
"""

from __future__ import annotations

import argparse
import collections
import gzip
import itertools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Interval = tuple[float, float]
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a Chrome trace
TOP = 15  # kernels in a summary
# In the names of kernels. Attention goes before matmuls: some of its kernels are CUTLASS's.
ATTENTION = ("flash", "fmha", "sdpa", "cudnn::fusion")
MATMUL = ("nvjet", "gemm", "cutlass", "cublas")
BACKWARD = ("bprop", "bwd", "backward")


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > begin:
            merged.append((begin, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Time that at least one of the intervals covers."""
    return sum(end - begin for begin, end in union(intervals))


def uncovered(intervals: Iterable[Interval], cover: Iterable[Interval]) -> list[Interval]:
    """The parts of `intervals` that no interval of `cover` covers, disjoint and in order."""
    found, holes = [], union(cover)
    for begin, end in union(intervals):
        for left, right in holes:
            if begin < left < end:
                found.append((begin, left))
            if left < end and begin < right:
                begin = min(right, end)
        found.append((begin, end))
    return [(begin, end) for begin, end in found if begin < end]


def exposed(intervals: Iterable[Interval], cover: Iterable[Interval]) -> float:
    """Time within `intervals` that no interval of `cover` covers."""
    return length(uncovered(intervals, cover))


def is_communication(name: str) -> bool:
    """True for the kernels of collectives, and for the copies between GPUs and the waits of `PeerCopies`."""
    return any(part in name for part in ("nccl", "PtoP", "wait_signal"))


def kind(name: str) -> str:
    """What a kernel does, by its name: communication, attention, matmul or other."""
    if is_communication(name):
        return "communication"
    lower = name.lower()
    for found, parts in (("attention", ATTENTION), ("matmul", MATMUL)):
        if any(part in lower for part in parts):
            return found
    return "other"


def on_gpu(events: Iterable[dict[str, Any]]) -> list[tuple[str, Interval]]:
    """(name, interval) of each kernel, copy and fill on the GPU, by their begin."""
    chosen = (event for event in events if event.get("cat") in ON_GPU and event.get("ph") == "X")
    found = [(event["name"], (float(event["ts"]), float(event["ts"]) + float(event["dur"]))) for event in chosen]
    return sorted(found, key=lambda item: item[1])


def summarize(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a Chrome trace of one step says about the GPU, in ms.

    `communication_exposed_ms` runs while no compute kernel does, the rest of it is hidden; `idle_ms` is the time
    between the first kernel and the last in which none runs. Copies and fills count as compute kernels.
    """
    compute, communication, per_kernel = [], [], collections.defaultdict(lambda: [0.0, 0])
    for name, interval in on_gpu(events):
        (communication if is_communication(name) else compute).append(interval)
        per_kernel[name][0] += interval[1] - interval[0]
        per_kernel[name][1] += 1
    everything = union(compute + communication)
    if not everything:
        return {"kernels": 0}
    window = everything[-1][1] - everything[0][0]
    shown = exposed(communication, compute)
    top = sorted(per_kernel.items(), key=lambda item: -item[1][0])[:TOP]
    return dict(
        window_ms=window / 1e3,
        compute_ms=length(compute) / 1e3,
        communication_ms=length(communication) / 1e3,
        communication_exposed_ms=shown / 1e3,
        communication_hidden_ms=(length(communication) - shown) / 1e3,
        idle_ms=(window - length(everything)) / 1e3,
        kernels=len(compute) + len(communication),
        top_kernels=[dict(name=name[:200], ms=ms / 1e3, calls=calls) for name, (ms, calls) in top],
    )


def split(kernels: Iterable[tuple[str, Interval]]) -> dict[str, list[Interval]]:
    """Disjoint intervals: matmul, attention and other compute, and communication that is exposed or hidden."""
    by_kind = collections.defaultdict(list)
    for name, interval in kernels:
        by_kind[kind(name)].append(interval)
    found: dict[str, list[Interval]] = {}
    compute: list[Interval] = []
    for name in ("matmul", "attention", "other"):
        found[name] = uncovered(by_kind[name], compute)
        compute += by_kind[name]
    found["exposed"] = uncovered(by_kind["communication"], compute)
    found["hidden"] = uncovered(by_kind["communication"], found["exposed"])
    return found


def layer(kernels: list[tuple[str, Interval]], backward: bool) -> Interval:
    """From a typical decoder layer's attention to the next one's, in one direction.

    Raises:
        ValueError: if there are fewer than two.
    """
    attention = [
        (name, interval)
        for name, interval in kernels
        if kind(name) == "attention" and any(part in name for part in BACKWARD) == backward
    ]
    total: collections.Counter[str] = collections.Counter()
    for name, (begin, end) in attention:
        total[name] += end - begin
    begins = [interval[0] for name, interval in attention if name == max(total, key=total.__getitem__)]
    pairs = list(itertools.pairwise(begins))
    if not pairs:
        raise ValueError(f"the trace has no two layers' attention {'backward' if backward else 'forward'}")
    middle = statistics.median(end - begin for begin, end in pairs)
    return min(pairs, key=lambda pair: abs(pair[1] - pair[0] - middle))


def reduce(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a figure of a step shows: totals, and one decoder layer forward and backward, in ms from its begin."""
    kernels = on_gpu(events)
    everything = union(interval for _, interval in kernels)
    window = everything[-1][1] - everything[0][0]
    totals = {name: length(intervals) / 1e3 for name, intervals in split(kernels).items()}
    found: dict[str, Any] = {"window_ms": window / 1e3, "idle_ms": (window - length(everything)) / 1e3}
    found["totals_ms"] = totals
    for name in ("forward", "backward"):
        begin, end = layer(kernels, name == "backward")
        inside = [(part, (max(a, begin), min(b, end))) for part, (a, b) in kernels if a < end and b > begin]
        parts = {
            part: [[round((a - begin) / 1e3, 4), round((b - begin) / 1e3, 4)] for a, b in intervals]
            for part, intervals in split(inside).items()
        }
        found[name] = {"ms": (end - begin) / 1e3, **parts}
    return found


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, gzipped."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        return json.load(file)["traceEvents"]


def main() -> None:
    """Write the small file; with the hardware, the versions and the settings of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("results", type=Path, help="of the run that made the trace")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    report = json.loads(options.results.read_text())
    found = [e for e in report["candidates"] if e.get("profile", {}).get("trace") == options.trace.name]
    if not found:
        parser.error(f"{options.results} has no candidate whose trace is {options.trace.name}")
    about = {key: report[key] for key in ("date", "gpu", "gpus", "shape", "layers", "versions")}
    about |= {key: found[0][key] for key in ("name", "grid", "label", "settings")}
    options.out.write_text(json.dumps(about | reduce(read_trace(options.trace)), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
