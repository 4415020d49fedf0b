"""Measure what the planner's times depend on, on this machine: `python -m tp2d_helpers.planning.calibrate`.

It takes about ten seconds on one GPU, and a little more for the links between several, besides the time to import. What
was found is kept in the cache (`constants_of`), and the planner uses it in place of what was fitted on H200.

Each constant is what makes `step_time`'s own formula right for the thing measured. The network between nodes, and how
much of ZeRO's collectives can be hidden, are not measured.
"""

from __future__ import annotations

import json
import math
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from tp2d_helpers.config import ConfigError
from tp2d_helpers.launchers import be_rank
from tp2d_helpers.planning.constants import HOST_LAYER, HOST_STEP, Constants, store
from tp2d_helpers.speed.devices import Device, device_named

MATMUL = (16384, 4096, 8192)  # tokens, inputs, outputs
ATTENTION = (4, 16, 4096, 128)  # samples, heads, tokens, head_dim
COPIED = 2**29  # elements
REDUCED = 4 * 4096 * 3584  # elements, 117 MB: the hidden states of the profile that `Constants.links` was found in
LAYERS = 16  # so narrow that the host is the bound
NARROW = dict(model_type="qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS,
              num_attention_heads=4, num_key_value_heads=2, vocab_size=2048, tie_word_embeddings=True)  # fmt: skip
# An all-reduce beside a matmul shares the memory's bandwidth with it: that of the planner's runs got 0.62 of the links
# where it got 0.67 alone.
BESIDE_MATMULS = 0.62 / 0.67
BLOCKS, BUDGET = 5, 1.0  # a measurement is the median of so many, in about so many seconds
Clock = Callable[[], float]


def seconds(call: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    """Seconds of a call, among others like it that the GPU is given one after the other: the median of `BLOCKS`."""

    def timed(count: int) -> float:
        """Of each of `count` calls."""
        began = clock()
        for _ in range(count):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (clock() - began) / count

    timed(3)  # the first ones choose kernels and allocate
    count = max(1, int(BUDGET / BLOCKS / max(timed(3), 1e-6)))
    return statistics.median(timed(count) for _ in range(BLOCKS))


def memory_share(device: Device, elements: int = COPIED, clock: Clock = time.perf_counter) -> float:
    """Of the memory's bandwidth, what a copy reaches: it reads and writes."""
    source = torch.ones(elements, **_like(device))
    target = torch.empty_like(source)
    moved = 2 * elements * source.element_size()
    return moved / seconds(lambda: target.copy_(source), clock) / device.memory_bandwidth


def matmul_share(
    device: Device, memory: float, sizes: tuple[int, int, int] = MATMUL, clock: Clock = time.perf_counter
) -> float:
    """Of the peak, what the three matmuls of a linear layer reach beside their traffic, as `step_time` counts both.

    The numbers are random: zeros take less power, and a GPU with less to do is faster.
    """
    m, k, n = sizes
    x, weight, gradient = (torch.randn(shape, **_like(device)) for shape in ((m, k), (n, k), (m, n)))
    took = seconds(lambda: (x @ weight.T, gradient @ weight, gradient.T @ x), clock)
    moved = 3 * x.element_size() * (m * k + k * n + m * n)
    return 3 * 2 * m * k * n / device.peak / (took - moved / (memory * device.memory_bandwidth))


def attention_share(
    device: Device, sizes: tuple[int, int, int, int] = ATTENTION, clock: Clock = time.perf_counter
) -> float:
    """Of the peak, what causal attention reaches, forward and backward: 6 · heads · head_dim · tokens each."""
    samples, heads, tokens, head_dim = sizes
    q, k, v = (torch.randn(sizes, **_like(device), requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(q)

    def both_passes() -> None:
        """One forward and one backward pass."""
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), gradient)

    return 6 * heads * head_dim * tokens * (samples * tokens) / device.peak / seconds(both_passes, clock)


def host_factor(rank: int = 0, clock: Clock = time.perf_counter) -> float:
    """How many times as long as `HOST_LAYER` and `HOST_STEP` say this host takes for a step of an eager model.

    One factor for all: compiled layers and graphs would take a minute to compile, and what bounds them is the same,
    Python and the driver on one core. Call it in a process group of one.
    """
    from tp2d_helpers.demo import build_model  # DeepSpeed and all, which the processes that reduce can do without
    from tp2d_helpers.model.engine import setup_model_with_autotp

    with tempfile.TemporaryDirectory() as folder:
        build_model(NARROW, Path(folder))
        settings = dict(tp_size=1, dp_size=1, batch_size_per_gpu=1, seq_length=64, optimizations="none")
        engine, *_ = setup_model_with_autotp(folder, 1, 1, rank, 1, settings)
    tokens = torch.zeros(1, 64, dtype=torch.long, device=engine.device)

    def step() -> None:
        """Forward, backward, optimizer."""
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()

    return seconds(step, clock) / (HOST_LAYER["eager"] * LAYERS + HOST_STEP)


def all_reduce_seconds(rank: int, elements: int = REDUCED) -> tuple[float, float]:
    """(seconds of an all-reduce of so many elements, of one element). Every rank of the group calls it."""
    where = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    large, small = (torch.zeros(count, dtype=torch.float16, device=where) for count in (elements, 1))
    # As many calls on every rank, so with no clock that decides how many.
    found = []
    for tensor in (large, small):
        blocks = []
        for block in range(BLOCKS + 1):
            began = time.perf_counter()
            for _ in range(20):
                dist.all_reduce(tensor)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            blocks += [(time.perf_counter() - began) / 20] * (block > 0)
        found.append(statistics.median(blocks))
    return found[0], found[1]


def link_constants(device: Device, ranks: int, large: float, small: float, elements: int = REDUCED) -> dict[str, float]:
    """`links` and `latency` by what `all_reduce_seconds` found: a ring sends 2·(n−1)/n of a tensor (see `traffic`)."""
    sent = 2 * (ranks - 1) / ranks * 2 * elements
    return {
        "links": BESIDE_MATMULS * sent / max(large - small, 1e-9) / device.link_bandwidth,
        "latency": small / math.log2(ranks),
    }


def in_processes(function: Callable[[int], Any], count: int) -> Any:
    """Call function(rank) in `count` new processes that form a group, each with a GPU if there are any.

    Returns:
        What rank 0's call returned, by way of JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one_process, (function, count, folder), nprocs=count)
        return json.loads(Path(folder, "result").read_text(encoding="utf-8"))


def _one_process(rank: int, function: Callable[[int], Any], count: int, folder: str) -> None:
    be_rank(rank, count)
    kind = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        kind = "nccl"
    dist.init_process_group(kind, f"file://{folder}/store", rank=rank, world_size=count)
    found = function(rank)
    if rank == 0:
        Path(folder, "result").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def calibrate(device: Device, gpus: int) -> Constants:
    """Measure this machine, whose GPUs are `gpus` of `device`."""
    memory = memory_share(device)
    found = dict(memory=memory, matmuls=matmul_share(device, memory), attention=attention_share(device))
    torch.cuda.empty_cache()  # for the processes that follow
    found["host"] = in_processes(host_factor, 1)
    if gpus > 1:
        found |= link_constants(device, gpus, *in_processes(all_reduce_seconds, gpus))
    links = f", {gpus} GPUs" if gpus > 1 else ", its links not measured"
    day = time.strftime("%Y-%m-%d")
    return replace(Constants(), **found, source=f"calibrated on {socket.gethostname()}{links}, {day}")


def _like(device: Device) -> dict[str, Any]:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    return dict(dtype=torch.bfloat16 if device.bf16 else torch.float16, device=where)


def main() -> None:
    """Measure, keep and print. Where that can't be done, one line on stderr says why, and the exit code is 1."""
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU here to measure; the planner predicts times of GPUs alone")
    properties = torch.cuda.get_device_properties(0)
    device = device_named(properties.name, properties.total_memory / 2**30)
    if device is None:
        sys.exit(f"error: {properties.name} is not in the table of GPUs (tp2d_helpers/speed/devices.py): add it there")
    constants = calibrate(device, torch.cuda.device_count())
    try:
        kept = str(store(constants, device))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"device": device.name, "kept in": kept, **asdict(constants)}, indent=2))


if __name__ == "__main__":
    main()
