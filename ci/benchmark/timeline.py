"""Where the time of one optimizer step goes: a trace by torch.profiler, and arithmetic on its intervals.

An interval is (begin, end). Times are microseconds in traces and milliseconds in summaries.
"""

from __future__ import annotations

import collections
import contextlib
import gzip
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Interval = tuple[float, float]
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a Chrome trace
TOP = 15  # kernels in a summary


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


def exposed(intervals: Iterable[Interval], cover: Iterable[Interval]) -> float:
    """Time within `intervals` that no interval of `cover` covers: |A or B| − |B|."""
    cover = list(cover)
    return length([*intervals, *cover]) - length(cover)


def is_communication(name: str) -> bool:
    """True for the kernels of collectives, and for the copies between GPUs and the waits of `PeerCopies`."""
    return any(part in name for part in ("nccl", "PtoP", "wait_signal"))


def summarize(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a Chrome trace of one step says about the GPU, in ms.

    `communication_exposed_ms` runs while no compute kernel does, the rest of it is hidden; `idle_ms` is the time
    between the first kernel and the last in which none runs. Copies and fills count as compute kernels.
    """
    compute, communication, per_kernel = [], [], collections.defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.get("cat") not in ON_GPU or event.get("ph") != "X":
            continue
        interval = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        (communication if is_communication(event["name"]) else compute).append(interval)
        per_kernel[event["name"]][0] += event["dur"]
        per_kernel[event["name"]][1] += 1
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


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, gzipped."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        return json.load(file)["traceEvents"]


class Clock:
    """Marks in time without a wait for the GPU: CUDA events there, `perf_counter` on a CPU."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Note now, in the order of what was launched."""
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Time from each mark to the next. Waits for the GPU."""
        synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [a.elapsed_time(b) if self.cuda else (b - a) * 1e3 for a, b in pairs]


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def wrapped(target: Any, name: str, wrapper: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace the method `target.name` by `wrapper(method)` for a while."""
    method = getattr(target, name)
    setattr(target, name, wrapper(method))
    try:
        yield
    finally:
        delattr(target, name)


def update_milliseconds(step: Callable[[], Any], update: tuple[Any, str]) -> float:
    """Time of the last call of the update within one step: the optimizer's, as the others only accumulate."""
    clock = Clock()

    def timed(method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            clock.mark()
            result = method(*args, **kwargs)
            clock.mark()
            return result

        return call

    with wrapped(*update, timed):
        step()
    return clock.milliseconds()[-1]


def record(step: Callable[[], Any], update: tuple[Any, str], path: Path) -> dict[str, Any]:
    """Trace one step on rank 0 into `path` (.json.gz) and summarize it. Collective: all ranks call it.

    The step before the traced one runs under the profiler too, which takes its time as it starts.
    """
    found: dict[str, Any] = {"update_ms": update_milliseconds(step, update), "trace": path.name}
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []

    def labelled(method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function("update"):
                return method(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(wrapped(*update, labelled))
        profiler = None
        if dist.get_rank() == 0:
            schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
            save = lambda profiler: profiler.export_chrome_trace(str(path))  # noqa: E731
            profiler = torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=save)
            stack.enter_context(profiler)
        for _ in range(2):
            dist.barrier()
            step()
            synchronize()
            if profiler:
                profiler.step()
    if dist.get_rank() == 0:
        found.update(summarize(read_trace(path)))
    return found
