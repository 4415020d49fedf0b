"""Rows of Parquet and Arrow, and of `datasets`: what was written, not what a column's type made of it."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data import text
from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.parse_arrow import read_arrow, read_parquet, table_rows
from tp2d_helpers.data.parse_text import Wanted
from tp2d_helpers.data.text import load_text

WEATHER, SUM = {"town": "Bern"}, {"first": 2, "second": [3, None]}
CALLS = [
    {"messages": [
        {"role": "user", "content": "Go on"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
    ], "id": number}
    for number, arguments in enumerate((WEATHER, SUM))
]  # fmt: skip


def write(path: Path, table: pyarrow.Table) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path)
    else:
        new = pyarrow.ipc.new_file if path.stem == "file" else pyarrow.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


def read(path: Path, **wanted: Any) -> list[Any]:
    reader = read_parquet if path.suffix == ".parquet" else read_arrow
    return [row for _, row in reader(path, Wanted(**{"others": True, **wanted}))]


def rows(table: pyarrow.Table) -> list[Any]:
    return [row for _, row in table_rows(table.schema, table.to_batches())]


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow", "file.feather", "a.feather", "a.parquet"])
def test_files(tmp_path: Path, name: str) -> None:
    """Of several batches, and as they are read by all of us."""
    texts = ["a", "b", None, "é☃", "e"]
    path = write(tmp_path / name, pyarrow.table({"n": range(5), "text": texts}))
    assert load_text(str(path))["text"] == texts
    chats = write(tmp_path / f"chats-{name}", pyarrow.Table.from_pylist(CALLS))
    assert read(chats) == CALLS
    assert load_text(str(chats)).column_names == ["messages", "where", "bad"]
    other = write(tmp_path / f"other-{name}", pyarrow.table({"body": ["x"], "id": [1]}))
    with pytest.raises(ConfigError, match=r"text_column = 'text': .* has no such column; it has \['body', 'id'\]"):
        load_text(str(other))


def test_columns_that_have_no_text(tmp_path: Path) -> None:
    """A picture beside the messages is there by its name alone, as no template can print it."""
    table = pyarrow.Table.from_pylist(CALLS)
    table = table.append_column("image", pyarrow.array([{"bytes": b"\x89", "path": "a"}] * 2)).append_column(
        "n", [[1, 2]]
    )
    for name in ("a.parquet", "a.arrow"):
        assert read(write(tmp_path / name, table)) == [
            {**row, "n": n, "image (bytes)": ""} for row, n in zip(CALLS, (1, 2), strict=True)
        ]
    table = pyarrow.table({"text": [b"bytes"] * 2})
    with pytest.raises(ConfigError, match=r"row 1 of .*: bytes \(.*\) where text, numbers or lists must be"):
        load_text(str(write(tmp_path / "b.parquet", table)))


# Nulls.


def test_fields_that_a_row_does_not_have() -> None:
    """Arrow fills structs up. Lists keep their length, and an empty one is not a null."""
    written = [
        {"a": {"x": 1}, "b": [{"y": None, "z": [1, None]}, None, {"z": []}]},
        {"a": {"w": {"v": None, "u": {}}}, "b": None},
        {"a": None, "b": []},
    ]
    assert rows(pyarrow.Table.from_pylist(written)) == [
        {"a": {"x": 1}, "b": [{"z": [1, None]}, None, {"z": []}]}, {"a": {"w": {"u": {}}}}, {"b": []}
    ]  # fmt: skip


def test_json_keeps_its_nulls(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "n?"}, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"a": None, "b": [None, {"c": None}]}}}
    ]}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    assert json.loads(load_text(str(tmp_path / "a.jsonl"))["messages"][0])["messages"] == chat


# Types that JSON hasn't.


@pytest.mark.parametrize("kind, value, found", [
    (pyarrow.date32(), datetime.date(2020, 1, 31), "2020-01-31"), 
    (pyarrow.date64(), datetime.date(1, 1, 1), "0001-01-01"),
    (pyarrow.timestamp("s"), datetime.datetime(2020, 1, 1, 2), "2020-01-01T02:00:00"),
    (pyarrow.timestamp("us", "UTC"), datetime.datetime(2020, 1, 1, 2, 3, 4, 5), "2020-01-01T02:03:04.000005+00:00"),
    (pyarrow.timestamp("ns"), 1_577_836_800_000_000_001, "2020-01-01T00:00:00.000000001"),
    (pyarrow.time32("ms"), datetime.time(1, 2, 3, 4000), "01:02:03.004000"),
    (pyarrow.duration("ms"), datetime.timedelta(days=1, milliseconds=-1), "PT86399.999S"),
    (pyarrow.duration("s"), datetime.timedelta(seconds=-3600), "PT-3600S"),
    (pyarrow.decimal128(30, 10), Decimal("1E-10"), "0.0000000001"), (pyarrow.decimal128(4, 2), Decimal("1.5"), "1.50"),
    (pyarrow.decimal128(9, -3), Decimal("1E+6"), "1000000"), (pyarrow.binary(), b"x", None),
    (pyarrow.map_(pyarrow.string(), pyarrow.int64()), [("a", 1), ("b", None)], {"a": 1, "b": None}),
    (pyarrow.map_(pyarrow.string(), pyarrow.date32()), [("a", datetime.date(2020, 1, 31))], {"a": "2020-01-31"}),
    (pyarrow.map_(pyarrow.int64(), pyarrow.int64()), [(1, 1)], None),
    (pyarrow.map_(pyarrow.string(), pyarrow.int64()), [("a", 1), ("a", 2)], None),
    (pyarrow.large_string(), "é", "é"), (pyarrow.string_view(), "a long text " * 9, "a long text " * 9),
    (pyarrow.list_view(pyarrow.date32()), [datetime.date(2020, 1, 31), None], ["2020-01-31", None]),
    (pyarrow.list_(pyarrow.date32(), 1), [datetime.date(2020, 1, 31)], ["2020-01-31"]),
    (pyarrow.uint64(), 2**64 - 1, 2**64 - 1), (pyarrow.float32(), 0.5, 0.5), (pyarrow.bool_(), False, False),
])  # fmt: skip
def test_types(kind: pyarrow.DataType, value: Any, found: Any) -> None:
    """By themselves, and in structs and lists."""
    for around, wrap in (
        (kind, lambda value: value), (pyarrow.struct({"s": kind}), lambda value: {"s": value}),
        (pyarrow.list_(kind), lambda value: [value]),
    ):  # fmt: skip
        (row,) = rows(pyarrow.table({"x": pyarrow.array([wrap(value)], around)}))
        if found is None:
            assert isinstance(row, BadRow) and row.kind == "unreadable"
        else:
            assert row == {"x": wrap(found)} and json.dumps(row)


def test_dictionaries_and_runs(tmp_path: Path) -> None:
    dates = pyarrow.array([datetime.date(2020, 1, 1)] * 3)
    table = pyarrow.table({
        "text": pyarrow.array(["a", "b", "a"]).dictionary_encode(), "dates": dates.dictionary_encode(),
        "runs": pyarrow.compute.run_end_encode(dates),
    })  # fmt: skip
    assert rows(table) == [{"text": text, "dates": "2020-01-01", "runs": "2020-01-01"} for text in "aba"]
    assert load_text(str(write(tmp_path / "a.parquet", table.drop_columns("runs"))))["text"] == ["a", "b", "a"]
    assert load_text(str(write(tmp_path / "a.arrow", table)))["text"] == ["a", "b", "a"]


def test_text_that_is_no_utf_8(tmp_path: Path) -> None:
    """Some writers put bytes into columns of text. The other rows are read."""
    offsets = pyarrow.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 1, 4, 5)))
    array = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"a\xed\xa0\xbdb")])
    for name in ("a.parquet", "a.arrow"):
        found = load_text(str(write(tmp_path / name, pyarrow.table({"text": array}))))
        assert found["text"] == ["a", None, "b"] and found["where"][1].startswith("row 2 of")
        assert found["bad"][1].startswith("unreadable: its text is no UTF-8")


# `Json` of `datasets`, which is for columns of mixed contents.

LEAVES = [
    "hello", 'quoted "so" / é 🙂\n', [{"type": "text", "text": "42"}], {"a": "42", "b": None, "c": [1.5, True, "null"]},
    '{"a": 1}', '[1, 2]', '"é"', '"42"', "{not json", "", None, {}, [],
]  # fmt: skip
LOST = ["42", "null", "true", 42, True, "-1.5", 1e300]


@pytest.mark.parametrize("save", ["parquet", "disk", "datasets"])
def test_json_leaves(tmp_path: Path, save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was put in comes out, or is refused. `datasets` gives 42 for "42", and None for "null"."""
    written = [
        {"messages": [{"role": "user", "content": leaf}, {"role": "x", "content": []}]} for leaf in [*LEAVES, *LOST]
    ]
    made = datasets.Dataset.from_list(written, on_mixed_types="use_json")
    assert made.features["messages"].feature["content"] == datasets.Json()
    if save == "datasets":
        found = rows(made.with_format("arrow")[:])
    elif save == "parquet":
        made.to_parquet(tmp_path / "a.parquet")
        found = read(tmp_path / "a.parquet")
    else:
        made.save_to_disk(tmp_path / "saved")
        found = read(next((tmp_path / "saved").glob("*.arrow")))
    for row, leaf in zip(found, LEAVES, strict=False):
        assert row["messages"][0] == ({"role": "user", "content": leaf} if leaf is not None else {"role": "user"})
    lost = found[len(LEAVES) :]
    assert len(lost) == len(LOST) and all(isinstance(row, BadRow) and row.kind == "ambiguous" for row in lost)


def test_json_objects_in_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of differing fields: whole messages are `Json`, and all that is in them is kept."""
    made = datasets.Dataset.from_list(CALLS, on_mixed_types="use_json")
    assert made.features["messages"] == datasets.List(datasets.Json())
    made.to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == CALLS
    by_hand = [{"messages": [json.dumps(message) for message in row["messages"]]} for row in CALLS]
    cast = datasets.Dataset.from_list(by_hand).cast(datasets.Features({"messages": datasets.List(datasets.Json())}))
    assert rows(cast.with_format("arrow")[:]) == [{"messages": row["messages"]} for row in CALLS]
    monkeypatch.setattr(text, "_load_from_hub", lambda *_: made)
    chat = json.loads(load_text("org/calls")["messages"][1])
    assert chat["messages"][1]["tool_calls"][0]["function"]["arguments"] == SUM and chat["more"] == {"id": 1}


def test_json_by_the_metadata_alone(tmp_path: Path) -> None:
    """As some programs write files of `datasets` anew: the columns are plain text, and the features still there."""
    made = datasets.Dataset.from_list(CALLS, on_mixed_types="use_json")
    plain = pyarrow.schema([("messages", pyarrow.list_(pyarrow.string())), ("id", pyarrow.int64())])
    table = pyarrow.table(
        [made.data.column(0).combine_chunks().cast(plain.field(0).type), made.data.column(1)],
        schema=plain.with_metadata(made.features.arrow_schema.metadata),
    )
    assert read(write(tmp_path / "a.parquet", table)) == CALLS


# Of `datasets`, and several files.


def test_a_dataset_of_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nulls, dates and pictures as in files; a bad row says which."""
    made = datasets.Dataset.from_list([
        {**CALLS[0], "day": datetime.date(2020, 1, 31), "image": b"\x89"},
        {"messages": None, "day": None, "image": None},
    ])  # fmt: skip
    monkeypatch.setattr(text, "_load_from_hub", lambda *_: made)
    found = load_text("org/calls")
    chat = json.loads(found["messages"][0])
    assert chat["more"] == {"id": 0, "day": "2020-01-31", "image (bytes)": ""} and found["bad"][0] is None
    assert (found["messages"][1], found["where"][1]) == (None, "row 2 of org/calls")
    assert found["bad"][1].startswith("not_a_chat: messages must be a list of messages, and is missing")


def test_each_file_has_its_own_types(tmp_path: Path) -> None:
    columns = {
        "a": [True, False],
        "b": ["x", None],
        "c": [1, 2],
        "d": [{"p": 1}, {"p": 2}],
        "e": [{"q": "é"}, {"p": 1.5}],
    }
    for name, values in columns.items():
        chats = [{"messages": CALLS[0]["messages"], "value": value} for value in values]
        chats = chats if name != "c" else [{"messages": CALLS[0]["messages"]}] * 2
        write(tmp_path / f"{name}.parquet", pyarrow.Table.from_pylist(chats))
    found = [json.loads(chat)["more"].get("value") for chat in load_text(str(tmp_path))["messages"]]
    assert found == [True, False, "x", None, None, None, {"p": 1}, {"p": 2}, {"q": "é"}, {"p": 1.5}]
