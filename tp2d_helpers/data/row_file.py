"""Rows of files → one Arrow file in the cache, from where they are memory-mapped."""

from __future__ import annotations

import contextlib
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
from tp2d_helpers.data.bad_rows import BadRow

LAYOUT = 2  # of the file, and of the JSON of chats; another one is not taken for it
SIZE, ROWS = 1_000_000, 1000  # characters and rows that are held in memory, or one row
_NOTHING = pyarrow.array([None], pyarrow.large_string())
# A row's text or chat, None if it is bad; where it stands; None, or what is wrong with it: "kind: reason".
Line = tuple["str | pyarrow.Array | None", str, "str | None"]


def map_rows(
    read: Callable[..., Iterator[Line]], name: str, files: list[str], needed: float, places: bool, **options: Any
) -> datasets.Dataset:
    """The rows that `read(files, **options)` gives, in columns [`name`, "where", "bad"] of text.

    Read once for the same arguments. A text with half a character is found here, as it can't be written.

    Args:
        places: whether rows that are not bad say where they stand, too.
        needed: an estimate of the bytes that they take.

    Raises:
        ConfigError: if there are none, or no room for them.
    """
    key = json.dumps([LAYOUT, read.__name__, name, files, options], default=str)
    folder = cache_dir() / f"rows-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def build(scratch: Path) -> None:
        """Read and write the rows; called if the cache hasn't got the folder."""
        check_space(folder, needed, f"the rows of {', '.join(files[:4])}")
        if not _write(read(files, **options), name, scratch / "rows.arrow", places):
            raise ConfigError(f"dataset_name: no rows in {', '.join(files[:4])}")

    return datasets.Dataset.from_file(str(build_once(folder, build) / "rows.arrow"))


def one_text(data: memoryview | bytes) -> pyarrow.LargeStringArray:
    """A view of UTF-8, as an array of one text."""
    ends = pyarrow.py_buffer(struct.pack("=2q", 0, len(data)))
    return pyarrow.LargeStringArray.from_buffers(1, ends, pyarrow.py_buffer(data))


def half_character(text: str) -> BadRow | None:
    """What is wrong with a text that can't be written as UTF-8; None for any other."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 10]
        return BadRow("half_character", f"half a character at {error.start + 1}, in {around!r}")
    return None


def to_table(lines: list[Line], name: str, places: bool = True) -> pyarrow.Table:
    """Rows in columns [`name`, "where", "bad"] of text. One with half a character is bad."""

    def checked(line: Line) -> Line:
        bad = half_character(line[0] or "")
        return (None, line[1], bad.line) if bad else line

    values, where, bad = zip(*lines, strict=True)
    if not places:
        where = (
            [place if why else None for place, why in zip(where, bad, strict=True)] if any(bad) else [None] * len(bad)
        )
    try:
        columns = [pyarrow.array(column, pyarrow.large_string()) for column in (values, where, bad)]
    except UnicodeEncodeError:
        return to_table([checked(line) for line in lines], name, places)
    return pyarrow.table(columns, schema=_schema(name))


def _schema(name: str) -> pyarrow.Schema:
    return pyarrow.schema([(column, pyarrow.large_string()) for column in (name, "where", "bad")])


def _write(lines: Iterator[Line], name: str, path: Path, places: bool) -> int:
    """Write an Arrow file and return how many rows it has."""
    number, size, batch = 0, 0, []
    bar = tqdm(desc="Reading", unit=" rows", mininterval=1, delay=2)
    with bar, pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, _schema(name)) as stream:

        def flush() -> None:
            """Write the rows that are held."""
            if batch:
                stream.write_table(to_table(batch, name, places))
                batch.clear()
                heartbeat.pulse()

        for number, line in enumerate(lines, 1):  # noqa: B007
            bar.update()
            value = line[0]
            if isinstance(value, str) and len(value) > SIZE and not places:
                with contextlib.suppress(UnicodeEncodeError):  # it is said below
                    value = one_text(value.encode())
            if isinstance(value, pyarrow.Array):  # a long text, or one that is mapped from its file
                del line
                flush()
                stream.write_table(pyarrow.table([value, *[_NOTHING] * 2], schema=_schema(name)))
                size = 0
                continue
            batch.append(line)
            size += len(value or "")
            if size > SIZE or len(batch) == ROWS:
                del line, value
                flush()
                size = 0
        flush()
    return number
