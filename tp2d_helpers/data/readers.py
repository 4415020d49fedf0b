"""A local file → its rows: the text of one column, or whole chats, as they are written.

No value is taken for a number, a date or a missing one. A row is held as a whole, and so is a `.json` file that is one
array; all other files are read a few rows at a time.
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
from typing import Any, BinaryIO, TextIO

import pyarrow
import pyarrow.parquet

from tp2d_helpers.cache import is_full
from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chats import to_json
from tp2d_helpers.data.files import format_of, is_lfs_pointer
from tp2d_helpers.data.row_file import one_text

BLOCK = 2**20  # bytes of a text file that are looked at at once
PEEK = 20  # rows that a format is recognised by
OPEN: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, mode: pyarrow.input_stream(path, compression="zstd"),
}
# The columns of a file that are wanted; () are all there are.
Columns = tuple[str, ...]
# A row's number in its file, of a `.jsonl` file the line, and its values by column.
Row = tuple[int, dict[str, Any]]


def read_rows(files: list[str], text_column: str, how: str, stamps: list[list[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of files, one file after the other, each {text_column: its text}, or an Arrow array of just that.

    Args:
        how: what a row of a `.txt` file is; see `load_text`.
        stamps: not used; they tell a changed file from what the cache has.

    Raises:
        ConfigError: with the file, for one that can't be read, lacks the column or holds something other than text.
    """
    for path in map(Path, files):
        for number, (_, row) in enumerate(_read(path, (text_column,), how), 1):
            value = row.get(text_column)
            if value is not None and not isinstance(value, (str, pyarrow.Array)):
                kind = type(value).__name__
                raise ConfigError(
                    f"text_column = {text_column!r}: it must hold text, and in row {number} of {path} it is {kind}"
                )
            yield {text_column: value}


def read_chats(files: list[str], columns: Columns, form: str, stamps: list[list[Any]]) -> Iterator[dict[str, str]]:
    """The chats of files, one file after the other, each {form: its JSON, "where": its file and line}.

    Args:
        columns: those of the format `form` (`chats.FORMATS`).
        stamps: as for `read_rows`.

    Raises:
        ConfigError: as `read_rows`, and with the line for a row that is no chat.
    """
    for path in map(Path, files):
        word = "line" if format_of(path) in (".jsonl", ".ndjson") else "row"
        for number, row in _read(path, columns, "document"):
            where = f"{word} {number} of {path}"
            try:
                yield to_json(row, form, where)
            except BadRow as error:
                yield {form: None, "where": where, "bad": f"{error.kind}: {error.reason}"}


def peek(path: Path) -> list[dict[str, Any]]:
    """The first rows of a file, all columns; none of a text file. What can't be read is left to those who read it."""
    rows: list[dict[str, Any]] = []
    if format_of(path) != ".txt":
        with contextlib.suppress(Exception):  # `_read` says it, with the row
            rows.extend(row for _, row in itertools.islice(READERS[format_of(path)](path, (), ""), PEEK))
    return rows


def _read(path: Path, columns: Columns, how: str) -> Iterator[Row]:
    number = 0
    try:
        if is_lfs_pointer(path):
            raise ValueError("a Git LFS pointer and not the file itself: run `git lfs pull`")
        for row in READERS[format_of(path)](path, columns, how):
            yield row
            number += 1
    except ConfigError:
        raise
    except Exception as error:  # of half a dozen libraries
        if is_full(error):  # nothing else is written while a file is read
            folder = tempfile.gettempdir()
            raise ConfigError(
                f"TMPDIR ({folder}): no room to unpack {path} ({reason(error)}); make room, or set it to another folder"
            ) from error
        raise ConfigError(f"dataset_name: {path} can't be loaded, after {number} rows ({reason(error)})") from error


def no_column(columns: Columns, where: str, names: list[str]) -> ConfigError:
    """The error of a file or data set without the column of its text, or those of its chats."""
    wanted = f"text_column = {columns[0]!r}" if len(columns) == 1 else f"columns {' and '.join(columns)}"
    chats = "" if len(columns) > 1 else ". Chats are in a column messages or conversations, or in prompt and completion"
    return ConfigError(f"{wanted}: {where} has no such column; it has {names}{chats}")


def _open(path: Path) -> TextIO:
    file = OPEN.get(path.suffix.lower(), open)(path, "rb")
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")  # line ends as they are


def _read_text(path: Path, columns: Columns, how: str) -> Iterator[Row]:
    if how == "document":
        yield 1, {columns[0]: _map_text(path)}
        return
    with _open(path) as lines:
        blocks = itertools.groupby(lines, key=lambda line: not line.strip())
        for number, block in enumerate((block for blank, block in blocks if not blank), 1):
            yield number, {columns[0]: "".join(block).rstrip("\r\n")}


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


def _json_lines(lines: Iterator[str], first: int = 1) -> Iterator[Row]:
    number = first - 1  # not by `enumerate`, which keeps a line that it has given until the next one
    for line in lines:
        number += 1
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(f"line {number} of the file: {error.msg}", error.doc, error.pos) from None
            del line  # it may be large
            yield number, row


def _read_json_lines(path: Path, columns: Columns, how: str) -> Iterator[Row]:
    with _open(path) as lines:
        yield from _with_columns(_json_lines(lines), columns, path)


def _read_json(path: Path, columns: Columns, how: str) -> Iterator[Row]:
    """An object per line, or one array of objects or strings, which is read as a whole."""
    with _open(path) as lines:
        first = next((line for line in lines if line.strip()), "")
        try:
            by_line = isinstance(json.loads(first), dict)
        except ValueError:
            by_line = False
        if by_line:
            yield from _with_columns(_json_lines(itertools.chain([first], lines)), columns, path)
        elif first:
            whole = json.loads(first + lines.read())
            whole = whole if isinstance(whole, list) else [whole]
            rows = ({(columns or ("text",))[0]: row} if isinstance(row, str) else row for row in whole)
            yield from _with_columns(enumerate(rows, 1), columns, path)


def _read_csv(path: Path, columns: Columns, how: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with _open(path) as lines:
        rows = csv.reader(lines, delimiter="\t" if format_of(path) == ".tsv" else ",", strict=True)
        names = next(rows, [])
        if names and not set(columns) <= set(names):
            raise no_column(columns, str(path), names)
        for number, row in enumerate(rows, 1):
            if len(row) > len(names):
                raise ValueError(f"{len(row)} fields in line {rows.line_num}, where the header has {len(names)}")
            if row:  # no empty line
                yield number, dict(zip(names, row, strict=False))


def _read_parquet(path: Path, columns: Columns, how: str) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as table:
        if not set(columns) <= set(table.schema_arrow.names):
            raise no_column(columns, str(path), table.schema_arrow.names)
        batches = table.iter_batches(batch_size=16, columns=list(columns) or None)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _read_arrow(path: Path, columns: Columns, how: str) -> Iterator[Row]:
    """As `Dataset.save_to_disk` writes it."""
    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
        names = batches.schema.names
        if not set(columns) <= set(names):
            raise no_column(columns, str(path), names)
        slices = (batch.select(list(columns or names)).slice(i, 1) for batch in batches for i in range(batch.num_rows))
        yield from enumerate((row for one in slices for row in one.to_pylist()), 1)


def _with_columns(rows: Iterator[Row], columns: Columns, path: Path) -> Iterator[Row]:
    """The rows as they are. Raises `ConfigError` if none of them has a value in each of the columns."""
    found, names = False, {}
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"a row must be an object with a field for each column, and one is {type(row).__name__}")
        if not found:
            names.update(row)
            found = set(columns) <= set(names)
        yield number, row
    if names and not found:
        raise no_column(columns, str(path), list(names))


READERS: dict[str, Callable[[Path, Columns, str], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".tsv": _read_csv,
    ".arrow": _read_arrow,
}
