"""A file of text (.jsonl, .json, .csv, .txt) → its rows, as they are written.

No value is taken for a number, a date or a missing one. A row that can't be read is given as a `BadRow` in its place.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.files import format_of
from tp2d_helpers.data.row_file import one_text

BLOCK = 2**20  # bytes of a text file that are looked at at once
OPEN: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, mode: pyarrow.input_stream(path, compression="zstd"),
}
# A row's number in its file, of a `.jsonl` file the line, and its values by column.
Row = tuple[int, "dict[str, Any] | BadRow"]


class Wanted(NamedTuple):
    """What is wanted of a file."""

    columns: tuple[str, ...] = ()  # that it must have
    others: bool = False  # and those beside them, too: of chats
    text_files: str = "document"  # what a row of a `.txt` file is; see `load_text`


def no_column(wanted: Wanted, where: str, names: list[str]) -> ConfigError:
    """The error of a file or data set without the column of its text, or those of its chats."""
    if wanted.others:
        return ConfigError(f"dataset_name: {where} lacks the columns of chats that files before it have "
                           f"({' and '.join(wanted.columns)}); it has {names}")  # fmt: skip
    return ConfigError(
        f"text_column = {wanted.columns[0]!r}: {where} has no such column; it has {names}. Chats are in a column "
        "messages or conversations, or in prompt and completion"
    )


def read_text(path: Path, wanted: Wanted) -> Iterator[Row]:
    """A document, or one for each block between blank lines."""
    if wanted.text_files == "document":
        yield 1, {wanted.columns[0]: _map_text(path)}
        return
    with _open(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="")  # line ends as they are
        blocks = itertools.groupby(lines, key=lambda line: not line.strip())
        for number, block in enumerate((block for blank, block in blocks if not blank), 1):
            yield number, {wanted.columns[0]: "".join(block).rstrip("\r\n")}


def read_json_lines(path: Path, wanted: Wanted) -> Iterator[Row]:
    """An object per line."""
    with _open(path) as lines:
        yield from _with_columns(_json_lines(lines), wanted, path)


def read_json(path: Path, wanted: Wanted) -> Iterator[Row]:
    """An object per line, or one array of objects or strings, which is read as a whole."""
    with _open(path) as lines:
        read: list[bytes] = []  # up to the second line that has something in it
        while sum(not line.isspace() for line in read) < 2 and (line := lines.readline()):
            read.append(line)
        first = [line for line in read if not line.isspace()]
        if first and not first[0].lstrip().startswith(b"[") and any(map(_is_object, first)):
            rows = _json_lines(itertools.chain(read, lines))
        else:
            whole = json.loads(b"".join([*first, lines.read()]).decode()) if first else []
            whole = whole if isinstance(whole, list) else [whole]
            column = (wanted.columns or ("text",))[0]
            whole = [{column: row} if isinstance(row, str) else _as_row(row) for row in whole]
            rows = enumerate(whole, 1)
        yield from _with_columns(rows, wanted, path)


def read_csv(path: Path, wanted: Wanted) -> Iterator[Row]:
    """By RFC 4180: a field for each column in each row. Empty lines are no rows."""
    csv.field_size_limit(sys.maxsize)
    with _open(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
        rows = csv.reader(lines, delimiter="\t" if format_of(path) == ".tsv" else ",", strict=True)
        names = next(rows, [])
        if names and not set(wanted.columns) <= set(names):
            raise no_column(wanted, str(path), names)
        for number in itertools.count(1):
            before = rows.line_num
            try:
                row = next(rows, None)
            except csv.Error as error:
                if rows.line_num > before + 1 or "unexpected end" not in str(error):
                    raise  # what is a row and what is not can't be told from there on
                yield number, BadRow("unreadable", f"the file ends within a field in line {rows.line_num}")
                return
            if row is None:
                return
            if row and len(row) != len(names):
                found = f"{len(row)} fields in line {rows.line_num}, where the header has {len(names)}"
                yield number, BadRow("unreadable", found)
            elif row:
                yield number, dict(zip(names, row, strict=True))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked and without a byte order mark."""
    with OPEN.get(path.suffix.lower(), open)(path, "rb") as packed:
        file = packed if isinstance(packed, io.BufferedReader) else io.BufferedReader(packed, BLOCK)
        if file.peek(3)[:3] == codecs.BOM_UTF8:
            file.read(3)
        yield file


def _map_text(path: Path) -> pyarrow.Array | str:
    """All of a text file, in a view of it: an array of one text."""
    with contextlib.ExitStack() as files:
        file: BinaryIO = files.enter_context(open(path, "rb"))
        if compressed := OPEN.get(path.suffix.lower()):
            file = files.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(files.enter_context(compressed(path, "rb")), file)
            file.flush()
        if not os.fstat(file.fileno()).st_size:
            return ""
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    data = data[3:] if data[:3] == codecs.BOM_UTF8 else data
    decoder = codecs.getincrementaldecoder("utf-8")()
    for begin in range(0, len(data), BLOCK):
        decoder.decode(data[begin : begin + BLOCK], final=begin + BLOCK >= len(data))  # raises if it isn't text
    return one_text(data)


def _json_lines(lines: Iterator[bytes]) -> Iterator[Row]:
    number = 0  # not by `enumerate`, which keeps a line that it has given until the next one
    for line in lines:
        number += 1  # noqa: SIM113
        if not line.isspace():
            try:
                row = line.decode()
            except UnicodeDecodeError as error:
                row = _no_object(line, str(error))
            del line  # it may be large
            row = _parse(row) if isinstance(row, str) else row
            yield number, row


def _parse(text: str) -> dict[str, Any] | BadRow:
    try:
        return _as_row(json.loads(text))
    except json.JSONDecodeError as error:
        return _no_object(text, f"{error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # for a number of thousands of digits, for one
        return _no_object(text, str(error))


def _no_object(line: str | bytes, why: str) -> BadRow:
    return BadRow("unreadable", f"{line[:60].strip()!r} is no JSON object, as each line must be: {why}")


def _as_row(row: Any) -> dict[str, Any] | BadRow:
    if isinstance(row, dict):
        return row
    kind = f"{type(row).__name__} ({str(row)[:60]!r})"
    return BadRow("unreadable", f"a row must be an object with a field for each column, and is {kind}")


def _is_object(line: bytes) -> bool:
    return not isinstance(_parse(line.decode(errors="replace")), BadRow)


def _with_columns(rows: Iterator[Row], wanted: Wanted, path: Path) -> Iterator[Row]:
    """The rows as they are. Raises `ConfigError` if none of them has a value in each of the columns."""
    columns, found, names = set(wanted.columns), False, {}
    for number, row in rows:
        if not found and isinstance(row, dict):
            names.update(dict.fromkeys(row))
            found = columns <= set(names)
        yield number, row
    if names and not found:
        raise no_column(wanted, str(path), list(names))
