"""Tokens: made once, complete, the same whatever the size of a document, in memory that does not grow with it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import DOCUMENTS, read, write
from grid import fork_context
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data import text_tokens
from tp2d_helpers.data import tokens as text_to_tokens
from tp2d_helpers.data.text import load_text
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.data.tokens import prepare_tokens
from tp2d_helpers.demo import END_OF_TEXT, demo_documents

# Tokenise once.


def _prepare_slowly(arguments: tuple[str, str, str, str]) -> str:
    tokenizer, source, cache, calls = arguments
    os.environ["TP2D_CACHE"] = cache
    tokenize = text_to_tokens.tokenize

    def slow(*args: Any, **kwargs: Any) -> None:
        with open(calls, "a") as file:
            file.write("called\n")
        time.sleep(0.5)  # long enough for the others to arrive
        tokenize(*args, **kwargs)

    text_to_tokens.tokenize = slow
    return str(prepare_tokens(tokenizer, source))


def test_processes_that_ask_at_once_tokenise_once(cache: Path, tokenizer: str, source: str, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    with ProcessPoolExecutor(4, mp_context=fork_context()) as pool:
        asked = [(tokenizer, source, str(cache), str(calls))] * 4
        folders = set(pool.map(_prepare_slowly, asked))
    assert calls.read_text() == "called\n"
    assert len(folders) == 1
    assert read(tokenizer, Path(folders.pop())) == [document + END_OF_TEXT for document in DOCUMENTS]


def test_second_call_does_not_load_the_dataset(
    cache: Path, tokenizer: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_tokens(tokenizer, source)
    monkeypatch.setattr(text_to_tokens, "load_text", lambda *_: pytest.fail("the dataset was loaded again"))
    assert prepare_tokens(tokenizer, source) == folder


def test_failed_build_leaves_nothing_behind(cache: Path, tokenizer: str, source: str) -> None:
    def fail(text: Any, tokenizer: Any, folder: Path, *_: Any) -> None:
        (folder / "tokens.bin").write_bytes(b"1234")
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(text_to_tokens, "tokenize", fail)
        with pytest.raises(OSError, match="disk full"):
            prepare_tokens(tokenizer, source)
    assert not [path for path in cache.glob("tokens-*") if path.is_dir()]
    assert len(read(tokenizer, prepare_tokens(tokenizer, source))) == len(DOCUMENTS)


# Special tokens.


def test_what_a_tokenizer_adds_to_a_document(cache: Path, tokenizer: str, source: str, tmp_path: Path) -> None:
    """Llama's and Gemma's, for two, begin every text with a token, and the models have never seen one without."""
    adding = load_tokenizer(tokenizer)
    special = [(END_OF_TEXT, adding.eos_token_id)]
    adding.backend_tokenizer.post_processor = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=special)
    adding.save_pretrained(tmp_path / "adding")
    assert load_tokenizer(str(tmp_path / "adding"))("yield")["input_ids"][0] == adding.eos_token_id
    folder = prepare_tokens(str(tmp_path / "adding"), source)
    assert read(tokenizer, folder) == [END_OF_TEXT + document + END_OF_TEXT for document in DOCUMENTS]


@pytest.mark.parametrize("token", ["eos_token", "pad_token"])
def test_either_special_token_ends_a_document(cache: Path, tokenizer: str, tmp_path: Path, token: str) -> None:
    backend = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(tokenizer).backend_tokenizer)
    backend.add_special_tokens({token: END_OF_TEXT})
    backend.save_pretrained(tmp_path / "one")
    folder = prepare_tokens(str(tmp_path / "one"), str(write(tmp_path / "documents.jsonl", DOCUMENTS)))
    end = backend.convert_tokens_to_ids(END_OF_TEXT)
    ends = np.fromfile(folder / "tokens.bin", dtype=np.uint32)[np.load(folder / "offsets.npy")[1:] - 1]
    assert set(ends.tolist()) == {end} and json.loads((folder / "meta.json").read_text())["pad"] == end


def test_tokenizer_without_special_tokens(cache: Path, tokenizer: str, source: str, tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(tokenizer).backend_tokenizer)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="neither an end-of-text nor a pad token"):
        prepare_tokens(str(tmp_path / "bare"), source)


def test_no_tokenizer(cache: Path, source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_name = .*its tokenizer can't be loaded"):
        prepare_tokens(str(tmp_path), source)


# The size of documents.


@pytest.mark.parametrize("characters", [700, 5_000, 10**9])
def test_a_long_document_is_tokenised_as_a_whole(
    tokenizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, characters: int
) -> None:
    """It is cut for the tokenizer, and nobody can tell where."""
    documents = ["\n".join(demo_documents()[:6]) + "\n\n  é☃ 日本語🙂🙂 \n", "short", " ".join(demo_documents()[6:9])]
    whole, end = load_tokenizer(tokenizer)(documents)["input_ids"], load_tokenizer(tokenizer).eos_token_id
    monkeypatch.setattr(text_tokens, "CHARACTERS", characters)
    text = load_text(str(write(tmp_path / "documents.jsonl", documents)))
    text_to_tokens.tokenize(text, load_tokenizer(tokenizer), tmp_path, progress=False)
    tokens, offsets = np.fromfile(tmp_path / "tokens.bin", dtype=np.uint32), np.load(tmp_path / "offsets.npy")
    assert [tokens[i:j].tolist() for i, j in itertools.pairwise(offsets)] == [[*ids, end] for ids in whole]
    assert json.loads((tmp_path / "meta.json").read_text())["highest"] == tokens.max()


def test_a_tokenizer_that_does_not_say_where_tokens_begin(
    tokenizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It gets whole lines."""
    slow, given = load_tokenizer(tokenizer), []
    monkeypatch.setattr(type(slow), "is_fast", False)
    monkeypatch.setattr(text_tokens, "SLOW", 30)
    call = type(slow).__call__
    monkeypatch.setattr(type(slow), "__call__", lambda self, text, **k: given.append(text) or call(self, text, **k))
    text = load_text(str(write(tmp_path / "documents.jsonl", ["a line of 16 ch\n" * 5 + "x" * 50])))
    text_to_tokens.tokenize(text, slow, tmp_path, progress=False)
    assert given[2:] == ["a line of 16 ch\n"] * 5 + ["x" * 30, "x" * 20]


@pytest.mark.parametrize("documents, size", [(3000, 100), (30, 10_000), (1, 300_000)])
def test_the_tokenizer_is_given_a_bounded_text(
    tokenizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, documents: int, size: int
) -> None:
    """However the same text is divided into documents: what a tokenizer returns is many times what it is given."""
    given, bounded = [], load_tokenizer(tokenizer)
    call = type(bounded).__call__

    def recording(self: Any, text: Any, **kwargs: Any) -> Any:
        given.append(len(text) if isinstance(text, str) else sum(map(len, text)))
        return call(self, text, **kwargs)

    monkeypatch.setattr(type(bounded), "__call__", recording)
    monkeypatch.setattr(text_tokens, "CHARACTERS", 10_000)
    text = load_text(str(write(tmp_path / "documents.jsonl", ["ten chars " * (size // 10)] * documents)))
    text_to_tokens.tokenize(text, bounded, tmp_path, progress=False)
    assert max(given) <= 10_000 + 4 * text_tokens.CONTEXT
    assert json.loads((tmp_path / "meta.json").read_text())["documents"] == documents


def test_python_memory_does_not_grow_with_documents(tokenizer: str, tmp_path: Path) -> None:
    """The same 600,000 characters as 6 documents and as one, from the rows to the tokens."""
    peaks = []
    for documents, size in ((6, 100_000), (1, 600_000)):
        path = write(tmp_path / f"{size}.jsonl", [f"{i} " + "ten chars " * (size // 10) for i in range(documents)])
        text = load_text(str(path))
        tracemalloc.start()
        text_to_tokens.tokenize(text, load_tokenizer(tokenizer), tmp_path, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_tokens_belong_to_what_made_them(cache: Path, speaker: Callable, tmp_path: Path) -> None:
    """The same contents elsewhere are the same tokens; another template, stop token or date that is written is not."""
    one = Path(speaker("chatml"))
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    first = prepare_tokens(str(one), str(path), chat_date="2026-01-01")
    shutil.copytree(one, tmp_path / "copy")
    assert prepare_tokens(str(tmp_path / "copy"), str(path), chat_date="2026-01-02") == first
    (tmp_path / "copy" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert prepare_tokens(str(tmp_path / "copy"), str(path)) != first
    template = one / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y') }}" + template.read_text())
    dated = prepare_tokens(str(one), str(path), chat_date="2026-01-01")
    assert dated not in (first, prepare_tokens(str(one), str(path), chat_date="2026-01-02"))
    assert prepare_tokens(str(one), str(path), chat_date="2026-01-01") == dated
