"""A dataset's text: every file used or named, every value as written, or an error that helps."""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from documents import DOCUMENTS, read, write

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.files import absolute_name, local_files
from tp2d_helpers.data.text import load_text
from tp2d_helpers.data.tokens import prepare_tokens
from tp2d_helpers.demo import END_OF_TEXT, demo_documents

# Sources.


FORMATS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt"]
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": pyarrow.Codec("zstd").compress}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
def test_local_sources(tmp_path: Path, suffix: str, in_folder: bool) -> None:
    halves = DOCUMENTS[:3], DOCUMENTS[3:]
    paths = [write(tmp_path / "data" / f"part-{i}{suffix}", half) for i, half in enumerate(halves)]
    found = load_text(str(tmp_path / "data" if in_folder else paths[0]), text_files="paragraph")
    # In a .txt file, spaces at a line's end are of the text as well.
    assert found["text"] == (DOCUMENTS if in_folder else halves[0])


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_files(tmp_path: Path, suffix: str, compression: str) -> None:
    plain = write(tmp_path / f"documents{suffix}", DOCUMENTS).read_bytes()
    packed = tmp_path / f"documents{suffix}{compression}"
    packed.write_bytes(bytes(COMPRESS[compression](plain)))
    assert load_text(str(packed), text_files="paragraph")["text"] == DOCUMENTS
    if suffix == ".txt":
        assert load_text(str(packed))["text"] == [plain.decode()]
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"documents\..* can't be loaded, after \d+ rows"):
        load_text(str(packed), text_files="paragraph")


@pytest.mark.parametrize("suffix", [".JSONL", ".ndJSON.GZ", ".Json.zst", ".CSV.Gz", ".TSV.ZST", ".Parquet", ".TXT.gz"])
def test_any_case(tmp_path: Path, suffix: str) -> None:
    last = Path(suffix).suffix.lower()
    data = write(tmp_path / f"documents{suffix.lower().removesuffix(last if last in COMPRESS else '')}", DOCUMENTS)
    (tmp_path / "data").mkdir()
    packed = COMPRESS.get(last, bytes)(data.read_bytes())
    (tmp_path / "data" / f"DOCUMENTS{suffix}").write_bytes(bytes(packed))
    assert load_text(str(tmp_path / "data"), text_files="paragraph")["text"] == DOCUMENTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_in_several_pieces(tmp_path: Path, compression: str) -> None:
    """As tools that compress by all cores write, and `cat` of two files."""
    pieces = [bytes(COMPRESS[compression](f'{{"text": "{text}"}}\n'.encode())) for text in ("one", "two")]
    (tmp_path / f"a.jsonl{compression}").write_bytes(b"".join(pieces))
    assert load_text(str(tmp_path / f"a.jsonl{compression}"))["text"] == ["one", "two"]


@pytest.mark.parametrize("suffix, times", [(".txt", 0.3), (".jsonl", 2.5)])
def test_memory_of_a_long_row(tmp_path: Path, suffix: str, times: float) -> None:
    """A text file is mapped; a line of JSON has to be parsed as a whole."""
    path = write(tmp_path / f"long{suffix}", ["a line of text\n" * 1_000_000])
    tracemalloc.start()
    try:
        (document,) = load_text(str(path)).with_format("arrow")[:]["text"]
        assert tracemalloc.get_traced_memory()[1] < times * path.stat().st_size
    finally:
        tracemalloc.stop()
    assert len(document.as_buffer()) == 15_000_000


def test_every_file_of_a_folder_is_used_or_named(tmp_path: Path) -> None:
    """Whatever the files are called and in what formats; `datasets` would read `train_extra.jsonl` alone."""
    for i, name in enumerate(("train_extra.jsonl", "news.jsonl.gz", "sub/books.csv", "Letters.TXT", "latest.jsonl")):
        path = write(tmp_path / name.removesuffix(".gz"), [f"{i} {j}" for j in range(3)])
        if name.endswith(".gz"):
            (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    for name in ("test.jsonl", "validation/part.jsonl", "README.md", "image.png", ".hidden.jsonl"):
        write(tmp_path / name, ["unwanted"])
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    files = local_files(str(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in files.used] == [
        "Letters.TXT", "latest.jsonl", "news.jsonl.gz", "sub/books.csv", "train_extra.jsonl"
    ]  # fmt: skip
    assert files.left_out == ["README.md", "elsewhere", "image.png", "test.jsonl", "validation/part.jsonl"]
    assert str(files).startswith("files used 5 of 10 (not README.md, elsewhere, image.png, test.jsonl, …)")
    rows = load_text(str(tmp_path), text_files="paragraph")["text"]
    assert rows == [f"{i} {j}" for i in (3, 4, 1, 2, 0) for j in range(3)]


def test_a_file_named_for_another_split_can_be_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", DOCUMENTS)
    assert load_text(str(path))["text"] == DOCUMENTS
    with pytest.raises(ConfigError, match=r"doesn't contain any data files to train on.*it has \['test.jsonl'\]"):
        load_text(str(tmp_path))


def test_files_of_a_folder_may_have_other_columns_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n{"id": 2}\n{"text": null, "id": {"x": 1}}\n')
    (tmp_path / "b.jsonl").write_text('{"id": "three", "more": [1], "text": "two"}\n')
    assert load_text(str(tmp_path))["text"] == ["one", None, None, "two"]
    (tmp_path / "c.jsonl").write_text('{"body": "lost"}\n')
    with pytest.raises(ConfigError, match=r"text_column = 'text': .*c.jsonl has no such column; it has \['body'\]"):
        load_text(str(tmp_path))


def test_values_are_kept_as_they_are_written(tmp_path: Path) -> None:
    """pandas takes seven of these for missing, `007` and `1.50` for numbers; pyarrow takes the date for a date."""
    values = ["NA", "null", "None", "nan", "N/A", "NULL", "-", "007", "1.50", "1e5", "true", "2020-01-01", " a ", '"q"']
    for suffix in (".csv", ".tsv", ".jsonl", ".json"):
        assert load_text(str(write(tmp_path / f"values{suffix}", values)))["text"] == values
        assert load_text(str(write(tmp_path / f"number{suffix}", values[7:8] * 3)))["text"] == ["007"] * 3


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_line_ends_and_byte_order_marks(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"documents{suffix}", ["a\r\nb\n", "c"])
    if suffix == ".txt":
        path.write_bytes(b"a\r\nb\n\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_text(str(path))["text"] == (["a\r\nb\n\r\n"] if suffix == ".txt" else ["a\r\nb\n", "c"])


BOOK = "First line of a paragraph,\nits second line.\n\n  \nNext paragraph.\n"


@pytest.mark.parametrize("text_files, documents", [
    ("document", [BOOK]), ("paragraph", ["First line of a paragraph,\nits second line.", "Next paragraph."]),
])  # fmt: skip
def test_a_text_file_is_a_document(
    cache: Path, tokenizer: str, tmp_path: Path, text_files: str, documents: list[str]
) -> None:
    (tmp_path / "book.txt").write_text(BOOK)
    folder = prepare_tokens(tokenizer, str(tmp_path / "book.txt"), text_files=text_files)
    assert read(tokenizer, folder) == [document + END_OF_TEXT for document in documents]


def test_text_files_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder plays the hub's dataset of .txt files, which `datasets` would cut into lines."""
    (tmp_path / "train.txt").write_text(BOOK)
    for name in ("load_dataset", "load_dataset_builder"):
        load = getattr(datasets, name)
        monkeypatch.setattr(datasets, name, lambda _, *args, load=load, **kwargs: load(str(tmp_path), *args, **kwargs))
    assert load_text("org/books")["text"] == [BOOK]


def test_configs_that_a_folder_declares(tmp_path: Path) -> None:
    """As a clone of a hub dataset does."""
    for name in ("en", "de"):
        write(tmp_path / name / "train.jsonl", [name])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert load_text(str(tmp_path), "de")["text"] == ["de"]
    assert str(local_files(str(tmp_path), "de")) == "files used 1 of 3 (not README.md, en/train.jsonl)"
    with pytest.raises(ConfigError, match=r"Config name is missing.*'en', 'de'"):
        load_text(str(tmp_path))
    with pytest.raises(ConfigError, match="dataset_config = 'de': a local file or folder has none"):
        load_text(str(tmp_path / "de"), "de")


def test_what_datasets_saved_to_disk(tmp_path: Path) -> None:
    text = datasets.Dataset.from_dict({"text": DOCUMENTS})
    datasets.DatasetDict({"train": text, "test": text.select(range(2))}).save_to_disk(tmp_path / "saved")
    assert load_text(str(tmp_path / "saved"))["text"] == DOCUMENTS


def test_a_dataset_saved_to_disk_is_what_it_says(tmp_path: Path) -> None:
    """Whatever its splits are called, and whatever `map` has cached beside it."""
    text = datasets.Dataset.from_dict({"text": DOCUMENTS})
    datasets.DatasetDict({"train": text, "unlabelled": text, "dev": text}).save_to_disk(tmp_path / "splits")
    text.select([4, 2]).save_to_disk(tmp_path / "one")
    datasets.load_from_disk(tmp_path / "one").map(lambda row: {"text": "changed"})
    assert len([*(tmp_path / "one").glob("*.arrow")]) == 2
    assert load_text(str(tmp_path / "splits"))["text"] == DOCUMENTS
    assert load_text(str(tmp_path / "splits" / "dev"))["text"] == DOCUMENTS
    assert load_text(str(tmp_path / "one"))["text"] == [DOCUMENTS[4], DOCUMENTS[2]]
    datasets.DatasetDict({"dev": text}).save_to_disk(tmp_path / "splits")
    with pytest.raises(
        ConfigError, match=r"it has no split 'train' but \['dev'\]; name the folder of one: .*splits/dev"
    ):
        load_text(str(tmp_path / "splits"))


@pytest.fixture
def some_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `data` in the current one, whose files have their own names as text."""
    for name in ("a.jsonl", "b.jsonl", "test.jsonl", "sub/c.jsonl", "notes.csv", "with, comma.jsonl", ".hidden.jsonl"):
        write(tmp_path / "data" / name, [name])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name, used, left_out", [
    ("data/*.jsonl", ["a.jsonl", "b.jsonl", "with, comma.jsonl"], ["test.jsonl"]),
    ("data/**/[a-c].jsonl", ["a.jsonl", "b.jsonl", "sub/c.jsonl"], []),
    ("data/tes?.jsonl", [], ["test.jsonl"]), ("data/test*", ["test.jsonl"], []),
    ("data/b.jsonl, data/a.jsonl", ["b.jsonl", "a.jsonl"], []),
    ("data/test.jsonl,data/sub,data/*.csv", ["test.jsonl", "sub/c.jsonl", "notes.csv"], []),
    ("data/with, comma.jsonl", ["with, comma.jsonl"], []),
])  # fmt: skip
def test_globs_and_lists(some_files: Path, name: str, used: list[str], left_out: list[str]) -> None:
    if not used:
        with pytest.raises(ConfigError, match=r"tes\?.jsonl doesn't match any data files.*it has \['test.jsonl'\]"):
            load_text(name)
        return
    assert load_text(name)["text"] == used
    assert local_files(name).left_out == left_out
    absolute = absolute_name(name)
    assert local_files(absolute).used == [some_files / "data" / file for file in used]


@pytest.mark.parametrize("name, message", [
    ("data/*.parquet", r"data/\*.parquet': .*\.parquet doesn't match any data files"),
    ("data/a.jsonl,data/x.jsonl", "no such file or folder"), ("org/one,org/two", "no such file or folder"),
    ("data/*.jsonl,data/a.jsonl", "it names .*data/a.jsonl more than once"),
])  # fmt: skip
def test_lists_that_lack_something(some_files: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_text(name)


def test_a_glob_with_one_more_file_is_tokenised_again(cache: Path, tokenizer: str, some_files: Path) -> None:
    before = prepare_tokens(tokenizer, "data/*.jsonl")
    write(some_files / "data" / "new.jsonl", ["new"])
    assert len(read(tokenizer, prepare_tokens(tokenizer, "data/*.jsonl"))) == len(read(tokenizer, before)) + 1


def test_a_split_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder plays the hub."""
    asked = []
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", [split])

    def local(load: Callable, hub: str, *args: Any, **kwargs: Any) -> Any:
        asked.append((hub, *args))
        return load(str(tmp_path), **kwargs)

    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, functools.partial(local, getattr(datasets, name)))
    assert load_text("org/books")["text"] == ["train"]
    assert load_text("org/books:validation")["text"] == ["validation"]
    assert load_text("Salesforce/wikitext:validation")["text"] == ["validation"]
    assert set(asked) == {("org/books", None), ("Salesforce/wikitext", "wikitext-2-raw-v1")}
    with pytest.raises(ConfigError, match=r"'org/books:tset': can't be loaded .*Unknown split \"tset\""):
        load_text("org/books:tset")


def test_changed_file_is_tokenised_again(cache: Path, tokenizer: str, tmp_path: Path) -> None:
    path = write(tmp_path / "documents.jsonl", ["one one"])
    before = prepare_tokens(tokenizer, str(path))
    write(path, ["two two"])  # of the same size
    after = prepare_tokens(tokenizer, str(path))
    assert after != before and read(tokenizer, after) == ["two two" + END_OF_TEXT]


def test_text_column(cache: Path, tokenizer: str, tmp_path: Path) -> None:
    path = write(tmp_path / "documents.jsonl", DOCUMENTS, column="body")
    assert len(read(tokenizer, prepare_tokens(tokenizer, str(path), text_column="body"))) == len(DOCUMENTS)
    with pytest.raises(ConfigError, match=r"text_column = 'text': .* has no such column; it has \['body'\]"):
        prepare_tokens(tokenizer, str(path))


@pytest.mark.parametrize("percentage, documents", [(100.0, 200), (25.0, 50), (0.5, 1)])
def test_dataset_percentage(tmp_path: Path, percentage: float, documents: int) -> None:
    path = write(tmp_path / "documents.jsonl", [f"document {i}" for i in range(200)])
    text = load_text(str(path), dataset_percentage=percentage)
    assert text["text"] == [f"document {i}" for i in range(documents)]


def test_percentage_of_the_demo() -> None:
    documents = demo_documents()
    assert load_text("demo")["text"] == documents
    assert load_text("demo", dataset_percentage=10.0)["text"] == documents[: round(len(documents) / 10)]


# Errors.


@pytest.mark.parametrize("documents", [[""], ["", "   ", "\n"]])
def test_no_text(cache: Path, tokenizer: str, tmp_path: Path, documents: list[str]) -> None:
    path = write(tmp_path / "documents.jsonl", documents)
    with pytest.raises(ConfigError, match=f"no text in the {len(documents)} rows of column 'text'"):
        prepare_tokens(tokenizer, str(path))


@pytest.mark.parametrize("name, content, message", [
    ("empty.jsonl", b"", "no rows in .*empty.jsonl"), ("a.csv", b"text\n", "no rows in .*a.csv"),
    ("a.jsonl", b'{"text": "a"}\n{not json', "line 2 of .*a.jsonl: '{not json' is no JSON object"),
    ("a.json", b'{"text": "a"', "a.json can't be loaded, after 0 rows"),
    ("a.jsonl", b'"a"\n', "a row must be an object with a field for each column, and is str .'a'"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2 of .*a.jsonl: it must hold text, and is int .'5'"),
    ("a.csv", b'text,n\na,1\n"b,2\n', "row 2 of .*a.csv: the file ends within a field in line 3"),
    ("a.csv", b"text,n\nall, of this,1\n", "3 fields in line 2, where the header has 2"),
    ("a.csv", b"body,n\na,1\n", r"a.csv has no such column; it has \['body', 'n'\]"),
    ("a.parquet", b"PAR1 not", "a.parquet can't be loaded, after 0 rows"),
    ("a.txt", b"caf\xe9", "a.txt can't be loaded, after 0 rows .UnicodeDecodeError"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer.*git lfs pull"),
])  # fmt: skip
def test_unreadable_file(cache: Path, tokenizer: str, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        prepare_tokens(tokenizer, str(tmp_path / name))


@pytest.mark.parametrize("name, message", [
    ("documents.docx", "must be one of .jsonl"), ("none.jsonl", "no such file"),
    ("table.parquet.gz", r"must be one of .*also with \.gz"), ("documents.zip", "must be one of .jsonl"),
])  # fmt: skip
def test_not_a_dataset(cache: Path, tokenizer: str, tmp_path: Path, name: str, message: str) -> None:
    if name != "none.jsonl":
        (tmp_path / name).write_text("text")
    with pytest.raises(ConfigError, match=message):
        prepare_tokens(tokenizer, str(tmp_path / name))


def test_hub_out_of_reach_offers_the_demo(cache: Path, tokenizer: str) -> None:
    with pytest.raises(ConfigError, match=r'no-such-owner/no-such-dataset.*Without a way to the hub, take "demo"'):
        prepare_tokens(tokenizer, "no-such-owner/no-such-dataset")


@pytest.mark.parametrize("folder", ["a,b", "d[1]", "w*", "q?", "x{y}%s", "s p'\"", "c:d;e", "#h&$!", "p|q(r)^+", "é"])
def test_a_folder_of_any_name(tmp_path: Path, folder: str) -> None:
    """By itself, by a glob in it, by files of it; beside folders that its name would match as a glob."""
    place = tmp_path / folder
    for base in (place, tmp_path / "d1", tmp_path / "wx", tmp_path / "qx"):
        base.mkdir()
        for name in ("one.jsonl", "two.jsonl"):
            (base / name).write_text('{"text": "a"}\n')
    one, two = place / "one.jsonl", place / "two.jsonl"
    for name, files in (
        (place, [one, two]),
        (place / "*.jsonl", [one, two]),
        (one, [one]),
        (f"{two}, {one}", [two, one]),
    ):
        assert local_files(str(name)).used == files
        assert local_files(absolute_name(str(name))).used == files


def test_a_clone_in_a_folder_whose_name_is_a_glob(tmp_path: Path) -> None:
    (tmp_path / "d[1]").mkdir()
    (tmp_path / "d[1]" / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "d[1]" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n"
    )
    with pytest.raises(ConfigError, match=r"its README.md declares configs, .* rename the folder"):
        local_files(str(tmp_path / "d[1]"))
