"""How a rank's part of a checkpoint gets to the disk: at once, or from a copy while training goes on."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from tp2d_helpers import heartbeat
from tp2d_helpers.checkpoint import run_folder
from tp2d_helpers.checkpoint.files import flush_folder
from tp2d_helpers.checkpoint.host_copy import HostBuffer, host_copy

CHUNK = 64 * 2**20  # bytes that reach the disk before the next ones are written: each is a sign of progress


class CheckpointWriter(TorchCheckpointEngine):
    """DeepSpeed's way to the disk, in two steps: `save` notes what to write, `write` writes it.

    In between, training can go on if `save` took a copy. The copy is in host memory, pinned where there is a GPU, so
    that it is made at the speed of the bus; there is one at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copy, self.copied, self.waiting, self.written = False, None, [], threading.Event()
        self.buffers: list[HostBuffer] = []  # one per file, for this checkpoint and the next
        self.chunks = 0
        self.written.set()

    def finish(self) -> None:
        """Wait until the checkpoint before is written, as long as that takes: each chunk of it is progress."""
        heartbeat.mark("the write of the checkpoint before")
        seen = self.chunks
        while not self.written.wait(1):
            if self.chunks != seen:
                heartbeat.pulse()
            seen = self.chunks
        heartbeat.mark("the next checkpoint")

    def begin(self, folder: Path, copy: bool) -> None:
        """Collect the files of a checkpoint; after `finish`."""
        heartbeat.mark(folder.name)
        self.folder, self.copy, self.waiting = folder, copy, []
        self.written.clear()

    def save(self, state_dict: Any, path: str) -> None:
        """Note a file to write; called by DeepSpeed."""
        if self.copy:
            number = len(self.waiting)
            state_dict, buffer = host_copy(state_dict, self.buffers[number] if number < len(self.buffers) else None)
            self.buffers[number:] = [buffer, *self.buffers[number + 1 :]]
            if torch.cuda.is_available():
                self.copied = torch.cuda.Event()
                self.copied.record()
        self.waiting.append((Path(path), state_dict))
        heartbeat.pulse()

    def write(self, **facts: Any) -> None:
        """Write all files, see that they reach the disk, then this rank's manifest with their sizes."""
        if self.copied:
            self.copied.synchronize()
        files = {}
        while self.waiting:
            path, state = self.waiting.pop(0)
            with open(path, "wb") as file:
                chunks = _Chunks(file, self)
                torch.save(state, chunks)
                chunks.reach_disk()
                files[str(path.relative_to(self.folder))] = file.tell()
        for folder in {self.folder / Path(name).parent for name in files} | {self.folder, self.folder.parent}:
            flush_folder(folder)
        run_folder.write_manifest(self.folder, dist.get_rank(), files, **facts)
        self.written.set()

    def done(self) -> None:
        """A chunk is on the disk. Of what is written in the background, the thread that trains tells, if it waits."""
        self.chunks += 1
        if not self.copy:
            heartbeat.pulse()

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load one file as mapped memory, so that a rank reads only what it takes from it; called by DeepSpeed."""
        return torch.load(path, map_location=map_location, mmap=True, weights_only=True)


class _Chunks:
    """A file for `torch.save` that writes what it is given in chunks, each of which has reached the disk."""

    def __init__(self, file: BinaryIO, writer: CheckpointWriter) -> None:
        self.file, self.writer, self.fresh = file, writer, 0

    def write(self, data: Any) -> int:
        """Write a buffer whole."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            self.fresh += self.file.write(view[start : start + CHUNK])
            if self.fresh >= CHUNK:
                self.reach_disk()
        return len(view)

    def flush(self) -> None:
        """`torch.save` asks for it at its end, where `reach_disk` follows."""

    def reach_disk(self) -> None:
        """See that the disk has all that was written."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.fresh = 0
        self.writer.done()
