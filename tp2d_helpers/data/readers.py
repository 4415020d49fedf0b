"""Local files → rows of text or chats. Each row comes with where it stands, and a bad one with what is wrong with it.

A row is held as a whole, and so is a `.json` file that is one array; all other files are read a few rows at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyarrow

from tp2d_helpers.cache import is_full
from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chats import to_json
from tp2d_helpers.data.files import format_of, is_lfs_pointer
from tp2d_helpers.data.parse_arrow import read_arrow, read_parquet
from tp2d_helpers.data.parse_text import Row, Wanted, read_csv, read_json, read_json_lines, read_text
from tp2d_helpers.data.row_file import Line

PEEK = 20  # rows that a format is recognised by
HOPELESS = 100  # rows: if the first ones are all bad, it is the file that is
NO_JSON = ("NaN", "Infinity")  # which Python writes as numbers
READERS: dict[str, Callable[[Path, Wanted], Iterator[Row]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".tsv": read_csv,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}


def read_rows(files: list[str], text_column: str, how: str, stamps: list[list[Any]]) -> Iterator[Line]:
    """The text of files, one file after the other. Rows without text have None, or "".

    Args:
        how: what a row of a `.txt` file is; see `load_text`.
        stamps: not used; they tell a changed file from what the cache has.

    Raises:
        ConfigError: with the file, for one that can't be read, lacks the column or holds something other than text.
    """
    for path in map(Path, files):
        where, some = _places(path), False
        for number, row in _read(path, Wanted((text_column,), text_files=how)):
            value = row.get(text_column) if isinstance(row, dict) else row
            if value is None or isinstance(value, (str, pyarrow.Array)):
                some = some or value is not None
                yield value, where(number), None
                continue
            if not isinstance(value, BadRow):
                value = BadRow("not_text", f"it must hold text, and is {type(value).__name__} ({str(value)[:60]!r})")
                if not some:
                    raise ConfigError(f"text_column = {text_column!r}: {where(number)}: {value.reason}")
            yield None, where(number), value.line


def read_chats(files: list[str], columns: tuple[str, ...], form: str, stamps: list[list[Any]]) -> Iterator[Line]:
    """The chats of files as JSON, one file after the other.

    Args:
        columns: those of the format `form` (`chats.FORMATS`).
        stamps: as for `read_rows`.

    Raises:
        ConfigError: with the file, for one that can't be read or lacks a column.
    """
    for path in map(Path, files):
        where = _places(path)
        for number, row in _read(path, Wanted(columns, others=True)):
            yield chat_line(row, form, where(number))


def chat_line(row: dict[str, Any] | BadRow, form: str, where: str) -> Line:
    """A row of chats as JSON, or what is wrong with it."""
    try:
        if isinstance(row, BadRow):
            raise row
        chat = to_json(row, form, where)[form]
        if any(word in chat for word in NO_JSON):
            _check(chat)
    except BadRow as bad:
        return None, where, bad.line
    return chat, where, None


def _check(chat: str) -> None:
    """Raise `BadRow` for JSON with a number that is none."""

    def refuse(word: str) -> NoReturn:
        raise BadRow("unreadable", f"{word}, which is no value of JSON")

    json.loads(chat, parse_constant=refuse)


def peek(path: Path) -> list[dict[str, Any]]:
    """The first rows of a file that are not bad, all columns; none of a text file.

    What can't be read is left to those who read it.
    """
    rows: list[dict[str, Any]] = []
    if format_of(path) != ".txt":
        with contextlib.suppress(Exception):  # `_read` says it, with the row
            found = (row for _, row in READERS[format_of(path)](path, Wanted(others=True)) if isinstance(row, dict))
            rows.extend(itertools.islice(found, PEEK))
    return rows


def _places(path: Path) -> Callable[[int], str]:
    """What says where a row of a file stands, by its number."""
    word = "line" if format_of(path) in (".jsonl", ".ndjson") else "row"
    name = str(path).encode(errors="replace").decode()  # it may be no UTF-8
    return lambda number: f"{word} {number} of {name}"


def _read(path: Path, wanted: Wanted) -> Iterator[Row]:
    """The rows of a file. Raises `ConfigError` if it can't be read, or if all that is read are bad rows."""
    good, bad = 0, []
    try:
        if is_lfs_pointer(path):
            raise ValueError("a Git LFS pointer and not the file itself: run `git lfs pull`")
        for number, row in READERS[format_of(path)](path, wanted):
            if not good and isinstance(row, BadRow):
                bad.append((number, row))
                if len(bad) == HOPELESS:
                    break
                continue
            if bad:
                yield from bad
                bad.clear()
            yield number, row
            good += 1
        if bad:
            raise ValueError(f"{_places(path)(bad[0][0])}: {bad[0][1].reason}")
    except ConfigError:
        raise
    except Exception as error:  # of half a dozen libraries
        if is_full(error):  # nothing else is written while a file is read
            folder = tempfile.gettempdir()
            raise ConfigError(
                f"TMPDIR ({folder}): no room to unpack {path} ({reason(error)}); make room, or set it to another folder"
            ) from error
        raise ConfigError(f"dataset_name: {path} can't be loaded, after {good} rows ({reason(error)})") from error
