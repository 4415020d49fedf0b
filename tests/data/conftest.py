"""Fixtures of the tests of data: a tokenizer, an empty cache, a file of documents."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from documents import DOCUMENTS, write
from tokenizers import Regex, pre_tokenizers

from tp2d_helpers.demo import demo_documents, train_tokenizer

TEMPLATES = Path(__file__).parent / "templates"  # as the models were published with them
# The tokens that a template is written in.
CONTROL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
}
# Llama-3's way to divide text. With GPT-2's, "\n\n" is one token at the end of a text and two before a word.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the demo's tokenizer; tokens need nothing else of a model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(demo_documents()[:10]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> str:
    """`DOCUMENTS` as a jsonl file."""
    return str(write(tmp_path / "documents.jsonl", DOCUMENTS))


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """speaker(template, into): a folder with the demo's tokenizer, the template and the tokens that it is written in.

    Without a folder to add it to, it is one of its own. Without a template, the tokenizer has none.
    """

    def save(template: str = "", into: Path | None = None) -> str:
        fast = train_tokenizer(demo_documents())
        if template:
            control = CONTROL[template.partition("_")[0]]
            begin = {"bos_token": control[0]} if template in ("llama3", "gemma") else {}
            fast.add_special_tokens({"additional_special_tokens": control, **begin})
            if template == "llama3":
                split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
                bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
                fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
            fast.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
        folder = into or tmp_path_factory.mktemp("speaker")
        fast.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A hundred chats of one to three answers, of any length, some longer than a sample."""
    draw, rows = random.Random(0), []
    words = ["the", "loop", "yields", "a", "list", "of", "names", "and", "ends", ";", "return", "None"]
    for _ in range(100):
        messages = [{"role": "system", "content": "Be brief."}] * (draw.random() < 0.3)
        for _ in range(draw.randint(1, 3)):
            for role, most in (("user", 12), ("assistant", 25)):
                messages.append({"role": role, "content": " ".join(draw.choices(words, k=draw.randint(1, most)))})
        rows.append({"messages": messages})
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def chat_model(family: Callable[..., Path], speaker: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with room for ChatML's tokens."""
    folder = tmp_path_factory.mktemp("model") / "chatml"
    shutil.copytree(family("llama", vocab_size=2056), folder)
    speaker("chatml", into=folder)
    return folder


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two hundred texts of 2 to 90 words, of which most share a sample of 64 tokens with others."""
    draw, words = random.Random(1), ["loops", "yield", "names", "and", "values", "of", "a", "list", "as", "they", "end"]
    sizes = [min(90, 2 + int(draw.expovariate(0.06))) for _ in range(200)]
    path = tmp_path_factory.mktemp("short") / "short.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=size))}) + "\n" for size in sizes))
    return str(path)
