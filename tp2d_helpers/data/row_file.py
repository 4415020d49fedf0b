"""Rows of local files → one Arrow file in the cache, from where they are memory-mapped."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from tqdm import tqdm

from tp2d_helpers import heartbeat
from tp2d_helpers.cache import build_once, cache_dir, check_space
from tp2d_helpers.config import ConfigError

SIZE, ROWS = 1_000_000, 1000  # characters and rows that are held in memory, or one row


def map_rows(
    read: Callable[..., Iterator[dict[str, Any]]], names: list[str], files: list[str], needed: float, **options: Any
) -> datasets.Dataset:
    """The rows that `read(files, **options)` gives, as a dataset of columns of text. Read once for the same arguments.

    Args:
        needed: an estimate of the bytes that they take.

    Raises:
        ConfigError: if there are none, or no room for them.
    """
    key = json.dumps([read.__name__, names, files, options], default=str)
    folder = cache_dir() / f"rows-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def build(scratch: Path) -> None:
        """Read and write the rows; called if the cache hasn't got the folder."""
        check_space(folder, needed, f"the rows of {', '.join(files[:4])}")
        if not _write(read(files, **options), names, scratch / "rows.arrow"):
            raise ConfigError(f"dataset_name: no rows in {', '.join(files[:4])}")

    return datasets.Dataset.from_file(str(build_once(folder, build) / "rows.arrow"))


def one_text(data: memoryview | bytes) -> pyarrow.LargeStringArray:
    """A view of UTF-8, as an array of one text."""
    ends = pyarrow.py_buffer(struct.pack("=2q", 0, len(data)))
    return pyarrow.LargeStringArray.from_buffers(1, ends, pyarrow.py_buffer(data))


def _write(rows: Iterator[dict[str, Any]], names: list[str], path: Path) -> int:
    """Write an Arrow file and return how many rows it has."""
    schema = pyarrow.schema([(name, pyarrow.large_string()) for name in names])
    number, size, batch = 0, 0, []
    bar = tqdm(desc="Reading", unit=" rows", mininterval=1, delay=2)
    with bar, pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:

        def flush() -> None:
            """Write the rows that are held."""
            arrays = [pyarrow.array([row.get(name) for row in batch], pyarrow.large_string()) for name in names]
            stream.write_batch(pyarrow.RecordBatch.from_arrays(arrays, schema=schema))
            batch.clear()
            heartbeat.pulse()

        for number, row in enumerate(rows, 1):  # noqa: B007
            bar.update()
            value = row.get(names[0])
            if names[1:] == [] and isinstance(value, str) and len(value) > SIZE:
                value = one_text(value.encode())
            if isinstance(value, pyarrow.Array):  # a long text, or one that is mapped from its file
                del row
                if batch:
                    flush()
                stream.write_batch(pyarrow.RecordBatch.from_arrays([value], schema=schema))
                size = 0
                continue
            batch.append(row)
            size += len(value or "")
            if size > SIZE or len(batch) == ROWS:
                del row, value
                flush()
                size = 0
        if batch:
            flush()
    return number
