"""A disk that fills up while rows are read, text is tokenised, or a dataset is fetched: told by its folder."""

from __future__ import annotations

import functools
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from child import little_room
from documents import write
from transformers import ByT5Tokenizer

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data import pool, text
from tp2d_helpers.data import tokens as text_to_tokens
from tp2d_helpers.data.tokens import prepare_tokens, tokenize

KILOBYTE = 1000
TEXT = "a line of text\n" * 20_000  # 300 kB


def left(cache: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in cache.iterdir() if path.is_dir())


@pytest.fixture
def slow(tmp_path: Path) -> str:
    """A folder with a tokenizer in Python, with a token for each byte: its tokens are four times as large as text."""
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    return str(tmp_path / "slow")


def test_while_rows_are_read(cache: Path, tokenizer: str, tmp_path: Path) -> None:
    source = str(write(tmp_path / "text.jsonl", [TEXT] * 3))
    words = rf"^TP2D_CACHE = '{cache}': no room to make rows-\w+ after .* MB, .* free \(.*File too large"
    with pytest.raises(ConfigError, match=words), little_room(500 * KILOBYTE):
        prepare_tokens(tokenizer, source)
    assert left(cache) == []


@pytest.mark.parametrize("by", ["this process", "others"])
def test_while_it_is_tokenised(
    cache: Path, slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """By others, parts of it were there."""
    source = str(write(tmp_path / "text.jsonl", [TEXT] * 3))
    monkeypatch.setattr(text_to_tokens, "SMALL", 10**9 if by == "this process" else 0)
    monkeypatch.setattr(text_to_tokens, "cores", lambda: 1)
    monkeypatch.setattr(text_to_tokens, "Job", functools.partial(pool.Job, size=200_000))
    words = rf"^TP2D_CACHE = '{cache}': no room to make tokens-\w+ after .* MB, .* free \(.*File too large"
    with pytest.raises(ConfigError, match=words), little_room(1000 * KILOBYTE):
        prepare_tokens(slow, source)
    assert left(cache) == ["rows"]


def test_a_part_that_does_not_fit(cache: Path, slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that finds it is another one."""
    source = str(write(tmp_path / "text.jsonl", [TEXT]))
    monkeypatch.setattr(text_to_tokens, "SMALL", 0)
    monkeypatch.setattr(text_to_tokens, "cores", lambda: 1)
    with (
        pytest.raises(ConfigError, match=rf"^TP2D_CACHE = '{cache}': no room to make tokens-\w+ .*File too large"),
        little_room(400 * KILOBYTE),
    ):
        prepare_tokens(slow, source)
    assert left(cache) == ["rows"]


def test_while_a_file_is_unpacked(cache: Path, tokenizer: str, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "book.txt.gz", "wt") as file:
        file.write(TEXT)
    with (
        pytest.raises(ConfigError, match=rf"^TMPDIR \(.*\): no room to unpack {tmp_path}/book.txt.gz \(OSError:.*too"),
        little_room(200 * KILOBYTE),
    ):
        prepare_tokens(tokenizer, str(tmp_path / "book.txt.gz"))
    assert left(cache) == []


def test_while_a_dataset_is_fetched(cache: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred while generating it") from error

    monkeypatch.setattr(text, "_load_from_hub", load)
    folder = datasets.config.HF_DATASETS_CACHE
    with pytest.raises(
        ConfigError, match=rf"^dataset_name = 'org/set': no room for it in {folder} \(.* free\).*HF_HOME"
    ):
        prepare_tokens(tokenizer, "org/set")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """free(count): that many bytes are free on every disk."""
    return lambda count: monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=count))


@pytest.mark.parametrize("name, needed", [("text.jsonl", 1.0), ("book.txt", 0.9), ("text.csv", 0.9)])
def test_rows_that_will_not_fit(
    cache: Path,
    tokenizer: str,
    tmp_path: Path,
    free: Callable,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    needed: float,
) -> None:
    """It is said before any is read."""
    source = write(tmp_path / name, [TEXT] * 3)
    free(400 * KILOBYTE)
    with pytest.raises(
        ConfigError, match=rf"^TP2D_CACHE = .*: 0.4 MB free, and the rows of {source} need about {needed} MB"
    ):
        prepare_tokens(tokenizer, str(source))
    assert left(cache) == []


def test_columns_that_are_not_read_need_no_room(cache: Path, tokenizer: str, tmp_path: Path, free: Callable) -> None:
    rows = [{"text": "short", "other": TEXT} for _ in range(3)]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "text.jsonl")
    free(400 * KILOBYTE)
    assert prepare_tokens(tokenizer, str(tmp_path / "text.jsonl")).exists()


@pytest.mark.parametrize("parts, needed", [(None, "0.3"), ("x.parts", "0.6")])
def test_tokens_that_will_not_fit(
    cache: Path, slow: str, tmp_path: Path, free: Callable, monkeypatch: pytest.MonkeyPatch, parts: str, needed: str
) -> None:
    monkeypatch.setattr(text_to_tokens, "SMALL", 0)
    rows = text.load_text(str(write(tmp_path / "text.jsonl", [TEXT])))
    free(100 * KILOBYTE)
    words = f"0.1 MB free, and the tokens of 0.3 MB of text need about {needed} MB"
    with pytest.raises(ConfigError, match=words):
        tokenize(rows, text_to_tokens.load_tokenizer(slow), tmp_path, parts=tmp_path / parts if parts else None)
    assert not (tmp_path / "x.parts").exists()
