"""How a rank's part of a checkpoint gets to the disk: at once, or from a copy while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from tp2d_helpers.checkpoint import run_folder
from tp2d_helpers.checkpoint.disk import Disk
from tp2d_helpers.checkpoint.files import flush_folder
from tp2d_helpers.checkpoint.host_copy import HostCopies


class CheckpointWriter(TorchCheckpointEngine):
    """DeepSpeed's way to the disk, in two steps: `save` notes what to write, `write` writes it.

    In between, training can go on if `save` took a copy. The copy is in host memory, pinned where there is a GPU, so
    that it is made at the speed of the bus; there is one at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copy, self.copied, self.waiting = False, None, []
        self.disk, self.copies = Disk(), HostCopies()

    def begin(self, folder: Path, copy: bool) -> None:
        """Collect the files of a checkpoint, after the one before is written (`disk.wait`)."""
        self.folder, self.copy, self.waiting = folder, copy, []
        self.copies.restart()
        self.disk.begin(folder.name, background=copy)

    def save(self, state_dict: Any, path: str) -> None:
        """Note a file to write; called by DeepSpeed."""
        self.waiting.append((Path(path), self.copies.copy(state_dict) if self.copy else state_dict))
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
            with self.disk.open(path) as file:
                torch.save(state, file)
                files[str(path.relative_to(self.folder))] = file.tell()
        for folder in {path.parent for path in map(self.folder.joinpath, files)} | {self.folder, self.folder.parent}:
            flush_folder(folder)
        run_folder.write_manifest(self.folder, dist.get_rank(), files, **facts)
        self.disk.end()

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load one file as mapped memory, so that a rank reads only what it takes from it; called by DeepSpeed."""
        return torch.load(path, map_location=map_location, mmap=True, weights_only=True)
