"""Fixtures of the tests of data: a tokenizer, an empty cache, a file of documents."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import DOCUMENTS, write

from tp2d_helpers.demo import demo_documents, train_tokenizer


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
