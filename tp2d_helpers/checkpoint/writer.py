"""How a rank's part of a checkpoint gets to the disk: at once, or from a copy while training goes on."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch.utils._pytree import tree_map_only

from tp2d_helpers.checkpoint import run_folder


class CheckpointWriter(TorchCheckpointEngine):
    """DeepSpeed's way to the disk, in two steps: `save` notes what to write, `write` writes it.

    In between, training can go on if `save` took a copy. The copy is in host memory, pinned where there is a GPU, so
    that it is made at the speed of the bus; there is one at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copy, self.copied, self.waiting, self.written = False, None, [], threading.Event()
        self.written.set()

    def begin(self, folder: Path, copy: bool, timeout: float) -> None:
        """Wait until the checkpoint before is written; then collect the files of this one.

        Raises:
            TimeoutError: if that takes longer than `timeout` seconds.
        """
        if not self.written.wait(timeout):
            raise TimeoutError(f"the checkpoint before {folder.name} is not written after {timeout:g} s")
        self.folder, self.copy, self.waiting = folder, copy, []
        self.written.clear()

    def save(self, state_dict: Any, path: str) -> None:
        """Note a file to write; called by DeepSpeed."""
        self.waiting.append((Path(path), host_copy(state_dict) if self.copy else state_dict))
        if self.copy and torch.cuda.is_available():
            self.copied = torch.cuda.Event()
            self.copied.record()

    def write(self, **facts: Any) -> None:
        """Write all files, see that they reach the disk, then this rank's manifest with their sizes."""
        if self.copied:
            self.copied.synchronize()
        files = {}
        while self.waiting:
            path, state = self.waiting.pop(0)
            with open(path, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
                files[str(path.relative_to(self.folder))] = file.tell()
        run_folder.write_manifest(self.folder, dist.get_rank(), files, **facts)
        self.written.set()

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load one file as mapped memory, so that a rank reads only what it takes from it; called by DeepSpeed."""
        return torch.load(path, map_location=map_location, mmap=True, weights_only=True)


def host_copy(state: Any) -> Any:
    """Copy every tensor in a nested structure to host memory; tensors that share memory share their copy."""
    copies: dict[int, torch.UntypedStorage] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's like in the copy of its storage, which is begun if it wasn't."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in copies:
            target = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=tensor.is_cuda)
            target.untyped_storage().copy_(storage, non_blocking=True)
            copies[storage.data_ptr()] = target.untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(copies[storage.data_ptr()], tensor.storage_offset(), tensor.size(), tensor.stride())

    # A torch.Size is a tuple, and would become a plain one.
    return tree_map_only(torch.Tensor, copy, state, is_leaf=lambda part: isinstance(part, torch.Size))
