"""Times and a trace of one optimizer step, taken while it runs; `timeline` reads the trace."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timeline import read_trace, summarize


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
