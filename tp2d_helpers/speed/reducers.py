"""How tensors are all-reduced over a TP group: by NCCL or Gloo, or between two GPUs by their copy engines.

NCCL's kernels take SMs from the matmuls beside them, and hide nothing (measured: ci/benchmark/README.md, "What bounds
the speed").
"""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from tp2d_helpers.speed.agreement import everywhere, first_trouble

BYTES_TO_COPY = 2**22  # from so many on; before, launching the copies takes longer than a collective


class Collectives:
    """All-reduces by NCCL or Gloo."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.works = group, []

    def now(self, x: torch.Tensor) -> None:
        """All-reduce x, contiguous, in place; the device waits for it."""
        dist.all_reduce(x, group=self.group)

    def begin(self, part: torch.Tensor) -> None:
        """Start to all-reduce `part`, contiguous, in place. It must not be touched before `finish`."""
        self.works.append(dist.all_reduce(part, group=self.group, async_op=True))

    def finish(self) -> None:
        """Let the device wait for the all-reduces."""
        while self.works:
            self.works.pop(0).wait()

    def restart(self) -> None:
        """Begin a pass that knows nothing of those before: one that is a graph, or follows one that was cut off."""
        self.works.clear()


class PeerCopies(Collectives):
    """All-reduces over two GPUs of a node: each writes its part into the other's inbox, by copy engine, and adds.

    There are two inboxes, used in turn. Whoever has received the peer's part of one all-reduce knows that the peer is
    through with the one before it, so the inbox of that one is free.
    """

    def __init__(self, group: dist.ProcessGroup, elements: int, dtype: torch.dtype) -> None:
        """Collective over `group`; `elements` is the size of the largest tensor to all-reduce."""
        super().__init__(group)
        inboxes = symmetric_memory.empty(2 * elements, dtype=dtype, device=torch.device("cuda"))
        self.handle = symmetric_memory.rendezvous(inboxes, group)
        self.rank, self.peer = self.handle.rank, 1 - self.handle.rank
        outboxes = self.handle.get_buffer(self.peer, inboxes.shape, inboxes.dtype)
        self.inboxes, self.outboxes = inboxes.split(elements), outboxes.split(elements)
        self.signals = self.handle.get_signal_pad(self.peer)
        self.channels = self.signals.numel() // 2  # of a signal of each rank
        self.stream, self.turn, self.filled, self.pending = torch.cuda.Stream(), 0, 0, []

    def begin(self, part: torch.Tensor) -> None:
        """As `Collectives.begin`, to which are left small parts, those of another dtype, and what finds no room.

        That is, in the inbox, or among the signals, of which each part needs a channel.
        """
        inbox, outbox = self.inboxes[self.turn], self.outboxes[self.turn]
        channel = 1 + 2 * len(self.pending) + self.turn
        small = part.numel() * part.element_size() < BYTES_TO_COPY
        full = self.filled + part.numel() > inbox.numel() or channel >= self.channels
        if small or full or part.dtype != inbox.dtype:
            super().begin(part)
            return
        place = slice(self.filled, self.filled + part.numel())
        self.filled += part.numel()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outbox[place].copy_(part.view(-1))
            # Written by the stream itself: a kernel would have to wait for an SM. The place is that of
            # `wait_signal`.
            symmetric_memory._SymmetricMemory.stream_write_value32(self.signals, 2 * channel + self.rank, 1)
        self.pending.append((part, inbox[place], channel, self.stream.record_event()))

    def finish(self) -> None:
        """Add what the peer has sent; let the device wait for the rest."""
        for part, received, channel, sent in self.pending:
            torch.cuda.current_stream().wait_event(sent)
            self.handle.wait_signal(self.peer, channel)
            part.view(-1).add_(received)
        if self.pending:
            self.pending, self.filled, self.turn = [], 0, 1 - self.turn
        super().finish()

    def restart(self) -> None:
        """Wait until the peer has read what it was sent: then both inboxes are free, and the first one's turn comes."""
        super().restart()
        self.handle.barrier(channel=0)
        self.pending, self.filled, self.turn = [], 0, 0


# By the group's name: an operator of `reductions`, which a compiler takes as it is, takes numbers and texts only.
REDUCERS: dict[str, Collectives] = {}


def restart(group: dist.ProcessGroup) -> None:
    """Begin a pass whose all-reduces over the group are a graph's, or come after a graph's. Every rank calls it."""
    if group.group_name in REDUCERS:
        REDUCERS[group.group_name].restart()


def copy_between_peers(group: dist.ProcessGroup, elements: int, dtype: torch.dtype) -> str:
    """Let the all-reduces over a group of two GPUs use `PeerCopies`, if all groups' can. Collective over the world.

    Args:
        elements: of the largest tensor to all-reduce; larger ones go by NCCL.

    Returns:
        why they can't, the same on all ranks; "" if they do.
    """
    REDUCERS[group.group_name] = Collectives(group)
    (host, first), (other, second) = everywhere((socket.gethostname(), torch.cuda.current_device()), group)
    copies, trouble = None, ""
    if host != other or first == second or not torch.cuda.can_device_access_peer(first, second):
        trouble = f"GPU {first} of {host} and GPU {second} of {other} can't reach each other's memory"
    if trouble := first_trouble(trouble):
        return trouble
    try:
        copies = PeerCopies(group, elements, dtype)
    except RuntimeError as error:  # a container may forbid what sharing memory needs
        trouble = str(error).splitlines()[0]
    trouble = first_trouble(trouble)
    if not trouble:
        REDUCERS[group.group_name] = copies
    return trouble
