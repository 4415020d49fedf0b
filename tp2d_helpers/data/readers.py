"""A local file → the values of its text column, as they are written.

No value is taken for a number, a date or a missing one. A row is held as a whole, and so is a `.json` file that is one
array; all other files are read a few rows at a time.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.data.files import format_of, is_lfs_pointer

OPEN: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, mode: pyarrow.input_stream(path, compression="zstd"),
}


def read_rows(files: list[str], text_column: str, how: str, stamps: list[list[Any]]) -> Iterator[dict[str, str | None]]:
    """The rows of files, one file after the other, each {text_column: its text}.

    Args:
        how: what a row of a `.txt` file is; see `load_text`.
        stamps: not used; they tell a changed file from what the cache of `datasets` has.

    Raises:
        ConfigError: with the file, for one that can't be read, lacks the column or holds something other than text.
    """
    for path in map(Path, files):
        number = 0
        try:
            if is_lfs_pointer(path):
                raise ValueError("a Git LFS pointer and not the file itself: run `git lfs pull`")
            for number, value in enumerate(READERS[format_of(path)](path, text_column, how), 1):
                if value is not None and not isinstance(value, str):
                    kind = type(value).__name__
                    raise ConfigError(
                        f"text_column = {text_column!r}: it must hold text, and in row {number} of {path} it is {kind}"
                    )
                yield {text_column: value}
        except ConfigError:
            raise
        except Exception as error:  # of half a dozen libraries
            raise ConfigError(f"dataset_name: {path} can't be loaded, after {number} rows ({reason(error)})") from error


def no_column(text_column: str, where: str, names: list[str]) -> ConfigError:
    """The error of a file or data set without the text column."""
    return ConfigError(f"text_column = {text_column!r}: {where} has no such column; it has {names}")


def _open(path: Path) -> TextIO:
    file = OPEN.get(path.suffix.lower(), open)(path, "rb")
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")  # line ends as they are


def _read_text(path: Path, text_column: str, how: str) -> Iterator[str]:
    with _open(path) as lines:
        if how == "document":
            yield lines.read()
            return
        for blank, block in itertools.groupby(lines, key=lambda line: not line.strip()):
            if not blank:
                yield "".join(block).rstrip("\r\n")


def _read_json_lines(path: Path, text_column: str, how: str) -> Iterator[Any]:
    with _open(path) as lines:
        yield from _column((json.loads(line) for line in lines if line.strip()), text_column, path)


def _read_json(path: Path, text_column: str, how: str) -> Iterator[Any]:
    """An object per line, or one array of objects or strings, which is read as a whole."""
    with _open(path) as lines:
        first = next((line for line in lines if line.strip()), "")
        try:
            by_line = isinstance(json.loads(first), dict)
        except ValueError:
            by_line = False
        if by_line:
            rows = itertools.chain([first], (line for line in lines if line.strip()))
            yield from _column(map(json.loads, rows), text_column, path)
        elif first:
            whole = json.loads(first + lines.read())
            whole = whole if isinstance(whole, list) else [whole]
            rows = ({text_column: row} if isinstance(row, str) else row for row in whole)
            yield from _column(rows, text_column, path)


def _read_csv(path: Path, text_column: str, how: str) -> Iterator[str | None]:
    csv.field_size_limit(sys.maxsize)
    with _open(path) as lines:
        rows = csv.reader(lines, delimiter="\t" if format_of(path) == ".tsv" else ",", strict=True)
        names = next(rows, [])
        if names and text_column not in names:
            raise no_column(text_column, str(path), names)
        for row in rows:
            if len(row) > len(names):
                raise ValueError(f"{len(row)} fields in line {rows.line_num}, where the header has {len(names)}")
            if row:  # no empty line
                yield dict(zip(names, row, strict=False)).get(text_column)


def _read_parquet(path: Path, text_column: str, how: str) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path) as table:
        if text_column not in table.schema_arrow.names:
            raise no_column(text_column, str(path), table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=16, columns=[text_column]):
            yield from batch.column(0).to_pylist()


def _read_arrow(path: Path, text_column: str, how: str) -> Iterator[Any]:
    """As `Dataset.save_to_disk` writes it."""
    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
        if text_column not in batches.schema.names:
            raise no_column(text_column, str(path), batches.schema.names)
        for batch in batches:
            yield from (value.as_py() for value in batch.column(text_column))


def _column(rows: Iterator[Any], text_column: str, path: Path) -> Iterator[Any]:
    """The values of a column; None in rows without it. Raises `ConfigError` if no row has it."""
    found, names = False, {}
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"a row must be an object with a field for each column, and one is {type(row).__name__}")
        if not found:
            names.update(row)
            found = text_column in row
        yield row.get(text_column)
    if names and not found:
        raise no_column(text_column, str(path), list(names))


READERS: dict[str, Callable[[Path, str, str], Iterator[Any]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".tsv": _read_csv,
    ".arrow": _read_arrow,
}
