"""A copy of a rank's state in host memory, of no more bytes than the state has, and kept for the next checkpoint.

PyTorch's own pinned memory comes in powers of two: up to twice the bytes. Here memory of the exact size is mapped, and
registered with CUDA as pinned.
"""

from __future__ import annotations

import mmap
import sys
import warnings
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

ALIGNMENT = 64  # bytes, of each tensor's memory in a buffer


class HostBuffer:
    """Host memory of one size, pinned where there is a GPU, so that copies from it take the speed of the bus."""

    def __init__(self, nbytes: int) -> None:
        self.pinned = False
        self.memory = mmap.mmap(-1, max(nbytes, 1))  # whole pages, which no other registration shares
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        if torch.cuda.is_available():
            failed = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), len(self.bytes), 0)
            self.pinned = not int(failed)
            if not self.pinned:
                warnings.warn(f"{nbytes:,} bytes of host memory can't be pinned: slow copies", stacklevel=2)

    def __len__(self) -> int:
        return len(self.bytes)

    def part(self, start: int, nbytes: int) -> torch.UntypedStorage:
        """A part of it as a storage of its own: `torch.save` writes whole storages."""
        if not nbytes:
            return torch.UntypedStorage(0)
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=nbytes, offset=start).untyped_storage()

    def __del__(self) -> None:
        if self.pinned and not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())


class HostCopies:
    """Copies of several states, as of a checkpoint's files, each in a buffer that the next checkpoint uses again."""

    def __init__(self) -> None:
        self.buffers: list[HostBuffer] = []
        self.next = 0

    def restart(self) -> None:
        """The copies that were made are not needed any more."""
        self.next = 0

    def copy(self, state: Any) -> Any:
        """Copy every tensor in a nested structure; tensors that share memory share their copy.

        From a GPU, the copy is made in the order of its stream.
        """
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
        storages = {_address(tensor): tensor.untyped_storage() for tensor in tensors}
        starts, end = {}, 0
        for address, storage in storages.items():
            starts[address], end = end, end + -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        buffer = self._buffer(end)
        copies = {address: buffer.part(starts[address], storage.nbytes()) for address, storage in storages.items()}
        for address, storage in storages.items():
            copies[address].copy_(storage, non_blocking=True)

        def like(tensor: torch.Tensor) -> torch.Tensor:
            """The tensor's like in the copy of its storage."""
            empty = torch.empty(0, dtype=tensor.dtype)
            return empty.set_(copies[_address(tensor)], tensor.storage_offset(), tensor.size(), tensor.stride())

        # A torch.Size is a tuple, and would become a plain one.
        return tree_map_only(torch.Tensor, like, state, is_leaf=lambda part: isinstance(part, torch.Size))

    def _buffer(self, nbytes: int) -> HostBuffer:
        """The one that the state of this place had before, unless it has grown."""
        place, self.next = self.next, self.next + 1
        if place < len(self.buffers) and len(self.buffers[place]) < nbytes:
            del self.buffers[place:]  # before the larger one is there
        if place == len(self.buffers):
            self.buffers.append(HostBuffer(nbytes))
        return self.buffers[place]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
