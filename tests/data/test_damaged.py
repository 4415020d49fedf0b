"""Tokens and rows that are damaged in the cache are made anew, and so is the demo's model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tp2d_helpers.data.tokens import prepare_tokens
from tp2d_helpers.demo import demo_model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])


def zero(path: Path) -> None:
    """As many bytes, but the disk never got the second half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def some_chats(folder: Path) -> str:
    rows = [[{"role": role, "content": f"{role} {i}"} for role in ("user", "assistant")] for i in range(9)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(folder / "chats.jsonl")


@pytest.mark.parametrize("harm", [cut, zero])
@pytest.mark.parametrize("kind", ["text", "chats"])
def test_tokens(
    cache: Path, source: str, speaker: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str,
    harm: Callable[[Path], None],
) -> None:  # fmt: skip
    source, tokenizer = source if kind == "text" else some_chats(tmp_path), speaker("chatml")
    folder = prepare_tokens(tokenizer, source)
    whole = contents(folder)
    assert whole.keys() > {"tokens.bin", "offsets.npy", "first.npy", "digests.npy", "meta.json"}
    assert ("mask.bin" in whole) == (kind == "chats")
    for name in whole:
        harm(folder / name)
        assert contents(prepare_tokens(tokenizer, source)) == whole
        assert f"{folder} is damaged ({name} " in capsys.readouterr().out


@pytest.mark.parametrize("harm", [cut, zero])
def test_rows(
    cache: Path, tokenizer: str, source: str, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    folder = prepare_tokens(tokenizer, source)
    whole, rows = contents(folder), next(cache.glob("rows-*/rows.arrow"))
    harm(rows)
    shutil.rmtree(folder)
    assert contents(prepare_tokens(tokenizer, source)) == whole
    assert f"{rows.parent} is damaged (rows.arrow " in capsys.readouterr().out


@pytest.mark.parametrize("harm", [cut, zero, Path.unlink])
def test_the_demo_s_model(cache: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]) -> None:
    whole = contents(demo_model())
    harm(demo_model() / "model.safetensors")
    assert contents(demo_model()) == whole
    assert "is damaged (model.safetensors " in capsys.readouterr().out
