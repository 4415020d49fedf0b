"""Rows that can't be read: each with its place and its kind, and the rows around it as they are. Files that can't."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from tp2d_helpers.config import BAD_ROWS, ConfigError
from tp2d_helpers.data import readers
from tp2d_helpers.data.recognise import chat_format
from tp2d_helpers.data.row_file import to_table
from tp2d_helpers.data.text import chats_beside_text, load_text

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def chat(answer: Any = "Hello", **more: Any) -> str:
    return json.dumps({"messages": [CHAT[0], {"role": "assistant", "content": answer}], **more})


def bad(path: Path, *content: str | bytes, **options: Any) -> list[tuple[int, str]]:
    """(row, what is wrong) of the rows that a file of these lines has; the others are good."""
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in content))
    rows = load_text(str(path), **options)
    for row in rows:
        values = [*row.values()]
        assert (values[0] is None) == (values[2] is not None)
        assert values[2] is None or (values[1].endswith(f" of {path}") and values[2].partition(": ")[0] in BAD_ROWS)
    return [(int(row["where"].split()[1]), row["bad"]) for row in rows if row["bad"]]


GOOD = '{"text": "good"}'


@pytest.mark.parametrize("line, why", [
    ('{"text": "cut of', "unreadable: '{\"text\": \"cut of' is no JSON object, as each line must be: "),
    ("nothing", "unreadable: 'nothing' is no JSON object, as each line must be: Expecting value at character 1"),
    ('{"text": "a"} {"text": "b"}', "Extra data at character 15"), ("[1, 2]", "a row must be an object with a field"),
    ('"text"', "must be an object with a field for each column, and is str ('text')"), (b'{"text": "\xe9"}', "utf-8"),
    ("[" * 100_000, "unreadable: '[[[["), ('{"n": ' + "1" * 5000 + "}", "unreadable: '{\"n\": 111"),
    ('{"text": 5}', "not_text: it must hold text, and is int ('5')"),
    ('{"text": ["a"]}', "not_text: it must hold text"),
    ('{"text": NaN}', "not_text: it must hold text, and is float ('nan')"),
    ('{"text": "cut \\ud83d"}', "half_character: half a character at 5, in 'cut \\ud83d'"),
    ('{"text": "\\ude00 cut"}', "half_character: half a character at 1, in '\\ude00 cut'"),
    ('{"text": "é \\ude00\\ud83d"}', "half_character: half a character at 3"),
])  # fmt: skip
def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str | bytes, why: str) -> None:
    """Blank lines count as lines. A line that is cut off at the file's end is one as well."""
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path / "cache"))
    for place, lines in ((3, [GOOD, "", line, GOOD]), (1, [line, GOOD]), (5, [GOOD, GOOD, " ", GOOD, line])):
        if "not_text" in why and place == 1:
            with pytest.raises(ConfigError, match=f"text_column = 'text': line 1 of {tmp_path}/a.jsonl: it must hold"):
                bad(tmp_path / "a.jsonl", *lines)
            continue
        ((number, found),) = bad(tmp_path / "a.jsonl", *lines)
        assert number == place and why in found
    if "not_text" not in why and "half" not in why:  # a file without a good line is another file
        with pytest.raises(ConfigError, match=r"a.jsonl can't be loaded, after 0 rows"):
            bad(tmp_path / "a.jsonl", line)


def test_good_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pairs, and what looks like a half in writing."""
    texts = ["🙂", "\\ud83d", "NaN", "Infinity", "\ue000"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert load_text(str(path))["text"] == texts
    path.write_text("".join(chat(text) + "\n" for text in texts))
    found = load_text(str(path))
    assert found["bad"] == [None] * len(texts)
    assert [json.loads(each)["messages"][1]["content"] for each in found["messages"]] == texts


@pytest.mark.parametrize("size", [10, 2_000_000])
def test_half_a_character_in_a_long_text(tmp_path: Path, size: int) -> None:
    """Of which the others are written by themselves."""
    long = "word " * (size // 5)
    ((number, why),) = bad(
        tmp_path / "a.jsonl", GOOD, json.dumps({"text": long}), json.dumps({"text": long + "\ud83d"})
    )
    assert number == 3 and why.startswith(f"half_character: half a character at {len(long) + 1:}, in 'word")


@pytest.mark.parametrize("row, why", [
    (chat("cut \ud83d"), "half_character"), (chat(name="\ud83d"), "half_character"),
    (chat(tools=[{"function": {"name": "f", "description": "\ude00"}}]), "half_character"),
    (chat(score=float("nan")), "unreadable: NaN, which is no value of JSON"),
    (chat(score=[-1e999]), "unreadable: -Infinity"),
    ('{"messages": [', "unreadable: "), ('{"messages": "no"}', "not_a_chat: messages must be a list of messages"),
    ("{}", "not_a_chat: messages must be a list of messages, and is missing"),
    ("17", "unreadable: a row must be an object"),
])  # fmt: skip
def test_chats(tmp_path: Path, row: str, why: str) -> None:
    for name in ("a.jsonl", "a.json"):
        ((number, found),) = bad(tmp_path / name, chat(), chat("🙂"), row, chat())
        assert number == 3 and found.startswith(why)


def test_several_kinds_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tp2d_helpers.data.row_file.ROWS", 2)  # rows that are written at once
    (tmp_path / "b.jsonl").write_text("\n".join([chat(), "{", chat("\ud83d"), chat(), '{"messages": 1}']))
    (tmp_path / "a.json").write_text(json.dumps([json.loads(chat()), 5, {"messages": []}]))
    rows = load_text(str(tmp_path))
    assert [why and why.partition(":")[0] for why in rows["bad"]] == [
        None, "unreadable", "not_a_chat", None, "unreadable", "half_character", None, "not_a_chat"
    ]  # fmt: skip
    places = [
        *(f"row {i} of {tmp_path}/a.json" for i in (1, 2, 3)),
        *(f"line {i} of {tmp_path}/b.jsonl" for i in range(1, 6)),
    ]
    assert rows["where"] == places


def test_places_of_text_are_those_of_bad_rows(tmp_path: Path) -> None:
    """To save room."""
    assert bad(tmp_path / "a.jsonl", GOOD, "{", GOOD)
    assert load_text(str(tmp_path / "a.jsonl"))["where"] == [None, f"line 2 of {tmp_path}/a.jsonl", None]


# Other formats.


@pytest.mark.parametrize("lines, number, why", [
    (["text,n", "a,1", "b", "c,2"], 2, "1 fields in line 3, where the header has 2"),
    (["text,n", '"a', 'a",1', "all, of this,1", "c,2"], 2, "3 fields in line 4, where the header has 2"),
    (["text,n", "a,1", '"b,2'], 2, "the file ends within a field in line 3"),
])  # fmt: skip
def test_rows_of_csv(tmp_path: Path, lines: list[str], number: int, why: str) -> None:
    assert bad(tmp_path / "a.csv", *lines) == [(number, f"unreadable: {why}")]
    tabs = [line.replace(", ", ",").replace(",", "\t") for line in lines]
    assert bad(tmp_path / "a.tsv", *tabs) == [(number, f"unreadable: {why}")]


@pytest.mark.parametrize("lines", [["text", "a", '"b" c', "d"], ["text", "a", '"b', "c", "d"]])
def test_csv_of_which_the_rows_can_not_be_told(tmp_path: Path, lines: list[str]) -> None:
    """From a quote on that is never closed, or closed within a field, any line may be part of a field."""
    with pytest.raises(ConfigError, match=r"a.csv can't be loaded, after 1 rows \(Error: "):
        bad(tmp_path / "a.csv", *lines)


@pytest.mark.parametrize("lines, found", [
    ([GOOD, "", "{", GOOD], [(3, "unreadable")]), (["{", GOOD, GOOD], [(1, "unreadable")]),
    (['["a", "b", 5,', '{"text": "c"}]'], [(3, "unreadable")]), (["", "", GOOD, GOOD, "5"], [(5, "unreadable")]),
])  # fmt: skip
def test_rows_of_json(tmp_path: Path, lines: list[str], found: list[tuple[int, str]]) -> None:
    assert [(number, why.partition(":")[0]) for number, why in bad(tmp_path / "a.json", *lines)] == found


def test_json_over_several_lines(tmp_path: Path) -> None:
    for rows in ([{"text": "a"}, {"text": "b"}], [{"text": "a", "more": [{}]}]):
        path = tmp_path / "a.json"
        for written in (json.dumps(rows, indent=1), "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"):
            path.write_text(written)
            assert load_text(str(path))["text"] == [row["text"] for row in rows]
        path.write_text(json.dumps(rows[0], indent=1))
        assert load_text(str(path))["text"] == ["a"]


# Files that are another thing.


@pytest.mark.parametrize("name, content, why", [
    ("a.jsonl", b"\n".join([b"nothing"] * 300) + b"\n" + GOOD.encode(), "line 1 of .*a.jsonl: 'nothing' is no JSON"),
    ("a.jsonl", json.dumps([{"text": "a"}], indent=1).encode(), r"'\[' is no JSON object, as each line must be"),
    ("a.jsonl", GOOD.encode("utf-16"), "is no JSON object, as each line must be: 'utf-8' codec"),
    ("a.jsonl.gz", gzip.compress((GOOD + "\n").encode() * 9)[:-9], r"after 9 rows \(EOFError|after 0 rows \(EOFError"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    ("a.json", b'[{"text": "a"}, {"text": "b', "Unterminated string"),
    ("a.jsonl", b'{"body": "a"}\n{', "text_column = 'text'"),
    ("a.jsonl", b'{"text": 1}\n{"text": "a"}', "text_column = 'text': line 1 of .*it must hold text, and is int"),
], ids=["other text", "an array", "UTF-16", "cut off", "LFS pointer", "half an array", "no column", "numbers"],
)  # fmt: skip
def test_files(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=why):
        load_text(str(tmp_path / name))


def test_many_bad_rows_among_good_ones(tmp_path: Path) -> None:
    """They don't make it another file."""
    lines = [*["{"] * (readers.HOPELESS - 1), GOOD, *["{"] * 2 * readers.HOPELESS]
    assert len(bad(tmp_path / "a.jsonl", *lines)) == len(lines) - 1
    with pytest.raises(ConfigError, match=r"can't be loaded, after 0 rows \(ValueError: line 1 of"):
        bad(tmp_path / "a.jsonl", "{", *lines)


def test_a_file_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.jsonl"
    path.write_text("\n".join([chat(), "{"]))
    assert load_text(str(tmp_path))["where"] == [f"line {i} of {tmp_path}/caf?.jsonl" for i in (1, 2)]


def test_a_column_that_is_taken() -> None:
    for name in ("where", "bad"):
        with pytest.raises(ConfigError, match=f"text_column = '{name}': must have another name"):
            load_text("demo", text_column=name)


def test_a_bad_reason_with_half_a_character() -> None:
    assert to_table([(None, "row 1", "refused: \\ud83d"), ("\ud83d", "row 2", None)], "x")["x"].to_pylist() == [
        None,
        None,
    ]


# Chats or text?

TEXT = {"text": "a"}


@pytest.mark.parametrize("rows, column, form", [
    ([{"text": "a", "messages": CHAT}], "text", None), ([{"text": None, "messages": CHAT}], "text", "messages"),
    ([{"text": None, "prompt": "a", "completion": "b"}, {"prompt": "a"}], "text", "prompt + completion"),
    ([{"text": "", "messages": CHAT}], "text", None), ([{"id": 1}, {"conversations": CHAT}], "text", "conversations"),
    ([{"messages": json.dumps(CHAT)}], "messages", "messages"), ([{"messages": "text"}], "messages", None),
    ([{"messages": "[1]"}], "messages", None), ([{"messages": "[]"}], "messages", None), ([TEXT], "text", None),
    ([{"messages": json.dumps(CHAT), "text": None}], "text", "messages"),
    ([{"messages": CHAT}], "messages", "messages"),
    ([{"prompt": "a text", "completion": "b"}], "prompt", None),
    ([{"messages": None, "text": None}], "text", "messages"),
    ([{"prompt": json.dumps(CHAT[:1]), "completion": json.dumps(CHAT[1:])}], "prompt", "prompt + completion"),
])  # fmt: skip
def test_which_it_is(rows: list[dict[str, Any]], column: str, form: str | None) -> None:
    assert chat_format(rows, column) == form


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_messages_as_json_text(tmp_path: Path, name: str) -> None:
    table = datasets.Dataset.from_list([{"messages": json.dumps(CHAT), "tools": "[]", "text": None}] * 2)
    save = {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[name.partition(".")[2]]
    save(tmp_path / name)
    for column in ("messages", *["text"] * (name != "a.csv")):  # where it is empty text, and no null
        rows = load_text(str(tmp_path / name), text_column=column)
        assert rows.column_names == ["messages", "where", "bad"] and rows["bad"] == [None, None]
        assert json.loads(rows["messages"][1])["messages"] == CHAT


def test_chats_beside_the_text(tmp_path: Path) -> None:
    for row, found in (
        ({"text": "a", "messages": CHAT}, "messages"),
        ({"text": None, "messages": CHAT}, None),
        (TEXT, None),
    ):
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        assert chats_beside_text(str(tmp_path / "a.jsonl"), "", "text") == found
    assert chats_beside_text("demo", "", "text") is None
