"""Where a dataset's rows are divided into parts of bounded size, and a row's text without all of it in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

BLOCK = 1_000_000  # characters of a long text that are looked at at once


class Place(NamedTuple):
    """A row, and a byte in its UTF-8 text, at which a character begins."""

    row: int
    byte: int


class Text:
    """The text of a row as UTF-8, in a view of the file that it is in."""

    def __init__(self, data: memoryview | bytes) -> None:
        self.data = memoryview(data)

    def __len__(self) -> int:
        """Bytes."""
        return len(self.data)

    def __str__(self) -> str:
        return str(self.data, "utf-8")

    def ahead(self, byte: int, characters: int) -> str:
        """Up to so many characters from a place on."""
        return str(self.data[byte : byte + 4 * characters], "utf-8", "ignore")[:characters]

    def before(self, byte: int, characters: int) -> str:
        """Up to so many characters that end there."""
        return str(self.data[max(0, byte - 4 * characters) : byte], "utf-8", "ignore")[-characters:]

    def blocks(self) -> Iterator[str]:
        """All of it."""
        byte = 0
        while byte < len(self):
            yield (block := self.ahead(byte, BLOCK))
            byte += len(block.encode())


def read(rows: datasets.Dataset, begin: int, end: int, column: int = 0) -> Iterator[Text]:
    """A column of the rows from `begin` to before `end`."""
    for first in range(begin, end, 1000):
        table = rows.with_format("arrow")[first : min(end, first + 1000)]  # a view of the file: no text is held yet
        for chunk in table.column(column).cast(pyarrow.large_string()).chunks:
            if len(chunk):  # by its buffers: a scalar of pyarrow is a copy
                _, ends, data = chunk.buffers()
                bounds = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
                known, data = chunk.is_valid().to_pylist(), memoryview(data or b"")
                yield from (Text(data[i:j] if k else b"") for (i, j), k in zip(pairwise(bounds), known, strict=True))


def lengths(rows: datasets.Dataset) -> Iterator[int]:
    """Bytes of text in the first column of each row."""
    for table in rows.with_format("arrow").iter(batch_size=10_000):
        text = table.column(0).cast(pyarrow.large_string())
        yield from pyarrow.compute.binary_length(text).fill_null(0).to_pylist()


def divide(rows: datasets.Dataset, size: int, cuts: Callable[[Text], Iterator[int]]) -> Iterator[tuple[Place, Place]]:
    """(where it begins, where it ends) for parts of up to `size` bytes, or of one row, which together are the rows.

    Args:
        cuts: gives the bytes at which a row that is longer may be divided.
    """
    begin, filled = Place(0, 0), 0
    for row, length in enumerate(lengths(rows)):
        if filled and filled + length > size:
            yield begin, (begin := Place(row, 0))
            filled = 0
        filled += length + 8  # a row costs something, also if it is empty
        if length > size:
            for byte in cuts(next(read(rows, row, row + 1))):
                yield begin, (begin := Place(row, byte))
    if begin.row < len(rows):
        yield begin, Place(len(rows), 0)
