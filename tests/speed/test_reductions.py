"""Products with a sum over two processes, against the same products of whole matrices."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tp2d_helpers.speed import reducers, reductions

TOKENS = 3 * reductions.ROWS_TO_HALVE
ROUNDS = 20  # more than there are inboxes, and enough for one process to run ahead of the other


def compare(rank: int, store: str, on_gpu: bool) -> None:
    """The work of one process: exact numbers, as all entries are small integers."""
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    K, N = (256, 512) if on_gpu else (16, 8)
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{store}", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    group = dist.group.WORLD
    reductions.register(group)
    if on_gpu:
        assert reducers.copy_between_peers(group, TOKENS * K, dtype) == ""
    for step in range(ROUNDS):
        tokens = TOKENS if step % 3 else 7  # by copies in two halves, and by a collective
        tokens += TOKENS if step == ROUNDS - 1 else 0  # more than an inbox holds
        torch.manual_seed(step)
        whole = lambda *shape: torch.randint(-1, 2, shape).to(device, dtype)  # noqa: E731
        y, row, x, column, gradient = whole(tokens, K), whole(N, K), whole(tokens, K), whole(N, K), whole(tokens, N)
        half = slice(rank * K // 2, (rank + 1) * K // 2)
        z = torch.ops.tp2d.row_matmul(y[:, half].contiguous(), row[:, half].contiguous(), group.group_name)
        assert torch.equal(z, y @ row.T), f"row product {step}"
        half = slice(rank * N // 2, (rank + 1) * N // 2)
        parts, weights = gradient[:, half].split(N // 4, 1), column[half].split(N // 4)
        dx, dw = torch.ops.tp2d.column_gradients(x, list(parts), list(weights), group.group_name)
        assert torch.equal(dx, gradient @ column), f"input's gradient {step}"
        assert torch.equal(torch.cat(dw), (gradient.T @ x)[half]), f"weights' gradients {step}"
    if on_gpu:
        replay(rank, group, K, N)
    dist.barrier()
    os._exit(0)  # threads of communication libraries may not end by themselves


def replay(rank: int, group: dist.ProcessGroup, K: int, N: int) -> None:
    """The same by copies in a graph: three all-reduces, so that each replay would begin with another inbox."""
    half = slice(rank * K // 2, (rank + 1) * K // 2)
    y, row = (torch.zeros(size, K, dtype=torch.bfloat16, device="cuda") for size in (TOKENS, N))
    parts = [tensor[:, half].contiguous() for tensor in (y, row)]
    product = lambda: torch.ops.tp2d.row_matmul(*parts, group.group_name)  # noqa: E731
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        reducers.restart(group)
        results = [product() for _ in range(3)]
    for step in range(ROUNDS):
        torch.manual_seed(step)
        for whole, part in zip((y, row), parts, strict=True):
            whole.copy_(torch.randint(-1, 2, whole.shape))
            part.copy_(whole[:, half])
        graph.replay()
        assert all(torch.equal(z, y @ row.T) for z in results), f"replay {step}"
        if step % 3 == 0:
            reducers.restart(group)
            assert torch.equal(product(), y @ row.T), f"after replay {step}"


def fall_back(rank: int, store: str) -> None:
    """One of two GPUs that should reach each other's memory can't share it: both go by collectives, and say why."""

    class Refused(reducers.Collectives):
        def __init__(self, group: dist.ProcessGroup, *_: object) -> None:
            if rank == 1:
                raise RuntimeError("pidfd_getfd: not permitted\nframe #0")
            super().__init__(group)

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    device, reach = rank, True
    torch.cuda.current_device, torch.cuda.can_device_access_peer = lambda: device, lambda *_: reach
    reducers.PeerCopies, group = Refused, dist.group.WORLD
    assert reducers.copy_between_peers(group, 1, torch.float32) == "rank 1: pidfd_getfd: not permitted"
    assert type(reducers.REDUCERS[group.group_name]) is reducers.Collectives
    reach = False
    assert reducers.copy_between_peers(group, 1, torch.float32).startswith("rank 0: GPU 0 of ")
    reach, device = True, 0  # each process sees a GPU of its own only
    assert reducers.copy_between_peers(group, 1, torch.float32).endswith("can't reach each other's memory")
    dist.barrier()
    os._exit(0)


def test_without_access_collectives_sum(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(fall_back, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.parametrize("on_gpu", [
    False,
    pytest.param(True, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
])  # fmt: skip
def test_sums_over_two_processes(tmp_path: Path, on_gpu: bool) -> None:
    torch.multiprocessing.spawn(compare, (str(tmp_path / "store"), on_gpu), nprocs=2)


class Pad:
    """Symmetric memory of one process, whose peer does what it does: the handle, its buffers and 8 signals."""

    signals = torch.zeros(8, dtype=torch.uint32)  # of four channels; the first is the barrier's

    def __init__(self, rank: int) -> None:
        self.rank, self.written = rank, []

    def get_buffer(self, peer: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def get_signal_pad(self, peer: int) -> torch.Tensor:
        return self.signals

    def wait_signal(self, peer: int, channel: int) -> None:
        assert 2 * channel + self.rank in self.written

    def write(self, signals: torch.Tensor, place: int, value: int) -> None:
        assert 2 <= place < signals.numel(), "beyond the signals, or the barrier's"
        self.written.append(place)


@pytest.mark.parametrize("rank", [0, 1])
def test_parts_beyond_the_signals_go_by_collectives(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Of three parts, a pass with the first inbox has channels for two, with the second for one; on both ranks."""
    pad, by_collectives = Pad(rank), []
    library = SimpleNamespace(
        empty=lambda *size, dtype, device: torch.zeros(*size, dtype=dtype), rendezvous=lambda *_: pad,
        _SymmetricMemory=SimpleNamespace(stream_write_value32=pad.write),
    )  # fmt: skip
    monkeypatch.setattr(reducers, "symmetric_memory", library)
    monkeypatch.setattr(reducers, "BYTES_TO_COPY", 0)
    monkeypatch.setattr(reducers.Collectives, "begin", lambda self, part: by_collectives.append(part))
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    copies, parts = reducers.PeerCopies(None, 12, torch.float32), [torch.ones(4) for _ in range(3)]
    for left in (parts[2:], parts[1:], parts[2:]):
        for part in parts:
            copies.begin(part)
        copies.finish()
        assert [id(part) for part in by_collectives] == [id(part) for part in left]
        by_collectives.clear()
