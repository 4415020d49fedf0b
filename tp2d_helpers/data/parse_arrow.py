"""A Parquet or Arrow file, or a dataset of `datasets` → its rows, as JSON would have them.

Arrow has one type for all rows of a column, and writers fit values to it. What they added is taken back: fields of a
struct that are null were not there in that row; and `Json` leaves of `datasets`, which hold text of JSON, are decoded.
Dates, times and decimals become their text.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from pyarrow import types

from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.parse_text import Row, Wanted, no_column

ARROW_FILE = b"ARROW1"  # what a file begins with that is no stream
LISTS = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
BYTES = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
Decode = Callable[[Any], Any]


def read_parquet(path: Path, wanted: Wanted) -> Iterator[Row]:
    """A few rows at a time."""
    with pyarrow.parquet.ParquetFile(path) as table:
        names = _chosen(table.schema_arrow, wanted, path)
        yield from table_rows(table.schema_arrow, table.iter_batches(batch_size=16, columns=names))


def read_arrow(path: Path, wanted: Wanted) -> Iterator[Row]:
    """A stream, as `Dataset.save_to_disk` writes it, or an IPC file (also called Feather). A row at a time."""
    with pyarrow.memory_map(str(path)) as file:
        if file.read(len(ARROW_FILE)) == ARROW_FILE:
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = reader = pyarrow.ipc.open_stream(file)
        names = _chosen(reader.schema, wanted, path)
        slices = (batch.select(names).slice(i, 1) for batch in batches for i in range(batch.num_rows))
        yield from table_rows(reader.schema, slices)


def table_rows(schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[Row]:
    """The rows of batches of a schema; its metadata says what `datasets` made of the columns, if it wrote them.

    A column that is null in a row is left out of it, and so is a field of a struct at any depth. Lists keep their
    length. A column of bytes, such as pictures, which isn't read, is there by its name alone.
    """
    features, number = _features(schema), 0
    unread = {f"{field.name} (bytes)": "" for field in schema if _has_bytes(field.type)}
    decoders = {field.name: _decoder(field.type, features.get(field.name)) for field in schema}
    for batch in batches:
        for row in _rows(batch):
            number += 1
            try:
                yield number, row if isinstance(row, BadRow) else _of_struct(decoders)(row) | unread
            except BadRow as bad:
                yield number, bad


def printable(schema: pyarrow.Schema) -> list[str]:
    """The columns without bytes in them, which no text can have: pictures, for one."""
    return [field.name for field in schema if not _has_bytes(field.type)]


def _chosen(schema: pyarrow.Schema, wanted: Wanted, path: Path) -> list[str]:
    if not set(wanted.columns) <= set(schema.names):
        raise no_column(wanted, str(path), schema.names)
    others = printable(schema) if wanted.others else []
    return [name for name in schema.names if name in wanted.columns or name in others]


def _rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | BadRow]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:  # some writers don't look at what they are given
        if batch.num_rows > 1:
            for number in range(batch.num_rows):
                yield from _rows(batch.slice(number, 1))
        else:
            yield BadRow("unreadable", f"its text is no UTF-8: {error}")


def _features(schema: pyarrow.Schema) -> dict[str, Any]:
    """What `datasets` wrote of its own types for each column."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"] or {}
    except (KeyError, TypeError, ValueError):
        return {}


def _has_bytes(kind: pyarrow.DataType) -> bool:
    kind = getattr(kind, "storage_type", kind)
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return any(is_bytes(kind) for is_bytes in BYTES) or any(map(_has_bytes, inner))


def _decoder(kind: pyarrow.DataType, feature: Any, in_list: bool = False) -> Decode | None:
    """What to do with values of a type; None if they are right as `to_pylist` gives them."""
    if isinstance(kind, pyarrow.JsonType) or (isinstance(feature, dict) and feature.get("_type") == "Json"):
        return _element_from_json if in_list else _from_json
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _decoder(kind.storage_type, None, in_list)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _decoder(kind.value_type, feature, in_list)
    if types.is_map(kind):
        return _of_map(*(_decoder(inner, None) for inner in (kind.key_type, kind.item_type)))
    if any(is_list(kind) for is_list in LISTS):
        decode = _decoder(kind.value_type, _inside(feature), in_list=True)
        return decode and (lambda values: [None if value is None else decode(value) for value in values])
    if types.is_struct(kind):
        feature = _inside(feature) if isinstance(feature, dict) and "_type" in feature else feature
        fields = {
            field.name: _decoder(field.type, feature.get(field.name) if isinstance(feature, dict) else None)
            for field in kind
        }  # fmt: skip
        return _of_struct(fields)
    if types.is_temporal(kind) or types.is_decimal(kind) or any(is_bytes(kind) for is_bytes in BYTES):
        return _as_text
    return None


def _inside(feature: Any) -> Any:
    """The feature of a list's values: of `List`, `LargeList` and `Sequence`, or written as a list of one."""
    return feature.get("feature") if isinstance(feature, dict) else feature[0] if isinstance(feature, list) else None


def _of_struct(fields: dict[str, Decode | None]) -> Decode:
    def decode(struct: dict[str, Any]) -> dict[str, Any]:
        """Its fields that are there."""
        return {
            name: value if (inner := fields[name]) is None else inner(value)
            for name, value in struct.items() if value is not None
        }  # fmt: skip

    return decode


def _of_map(key: Decode | None, item: Decode | None) -> Decode:
    def decode(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        """As an object. A null of a map is one that was written."""
        found = {}
        for name, value in pairs:
            name = key(name) if key else name
            if not isinstance(name, str) or name in found:
                raise BadRow("unreadable", f"a map must have texts as its keys, each once, and one is {name!r}")
            found[name] = item(value) if item and value is not None else value
        return found

    return decode


def _as_text(value: Any) -> str:
    """A date, a time or a decimal as text. `pandas` has the nanoseconds, which Python hasn't, in types of its own."""
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta) and not getattr(value, "nanoseconds", 0):
        seconds = decimal.Decimal(value // datetime.timedelta(microseconds=1)) / 10**6
        return f"PT{seconds.normalize():f}S"  # ISO 8601
    raise BadRow("unreadable", f"{type(value).__name__} ({str(value)[:60]!r}) where text, numbers or lists must be")


def _from_json(text: str) -> Any:
    """What a `Json` leaf of `datasets` was before it became text of JSON; of several that become the same, the likely.

    `datasets` 5.2 takes a text that is JSON for JSON, and writes all else as JSON. So "42" and 42 are both written 42,
    which can't be told; text in quotes is written as the text without them, as which it is read here; and the text of
    an object is told from an object by its spaces, but for one that has none.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if not isinstance(value, (str, list, dict)):
        raise BadRow("ambiguous", f"`datasets` has written {text[:60]}, and not whether that was text or a number or "
                     "null; take the data as .jsonl")  # fmt: skip
    return value if _written(value) == text else text


def _element_from_json(text: str) -> Any:
    """The same of an element of a list. There, objects are objects, whoever wrote them."""
    value = _from_json(text)
    if isinstance(value, str) and text[:1] == "{":
        return json.loads(text)
    return value


def _written(value: Any) -> str | None:
    with contextlib.suppress(OverflowError):  # for an integer of more than 64 bits
        return datasets.Json().encode_example(value)
    return None
