"""Preflight's row about the data says what is used of it, and costs nothing the second time."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tp2d_helpers.cache import build_once, cache_dir
from tp2d_helpers.cache import folders as cache_folders
from tp2d_helpers.cache.clear import DAY, UNUSED_DAYS
from tp2d_helpers.cache.folders import lock_of
from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.preflight.data import check_data


@pytest.fixture
def run(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """run(**settings): the config of a run in a cache of its own."""
    model = str(tiny_model("llama"))
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path / "cache"))
    settings = dict(model_name=model, use_gpu=False, tp_size=1, dp_size=1, seq_length=16)
    return lambda **more: make_config(**{**settings, **more})


def checked(config: Config) -> tuple[int, str, str]:
    steps, _, found, chosen = check_data(config, ModelFacts.read(config.model_name))
    return steps, found, chosen


def write_rows(path: Path, *texts: str | None) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_files_and_rows(run: Callable[..., Config], tmp_path: Path) -> None:
    for i, name in enumerate(("train_extra.jsonl", "b.jsonl", "c.jsonl", "test.jsonl")):
        write_rows(tmp_path / "data" / name, *(f"a line {j} of document {i}, long enough" for j in range(9)), None, " ")
    (tmp_path / "data" / "README.md").write_text("about the data")
    steps, found, chosen = checked(run(dataset_name=str(tmp_path / "data"), eval_samples=2, packing=False))
    assert "data: files used 3 of 5 (not README.md, test.jsonl), rows without text 6 of 33, " in found
    assert "27 padded samples of 16" in found
    assert (
        steps == 25
        and chosen
        == "25 steps per epoch, 1 samples each; documents end in '<|endoftext|>'; 2 samples held out, of 2 documents"
    )


def test_a_single_file(run: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A line.\n" * 60 + "\nAnother paragraph, at the end.\n" * 9)
    for text_files, rows in (("document", 1), ("paragraph", 10)):
        _, found, _ = checked(run(dataset_name=str(tmp_path / "book.txt"), text_files=text_files))
        assert f"book.txt: files used 1 of 1, rows without text 0 of {rows}, " in found
    with pytest.raises(ConfigError, match="eval_samples = 2: held-out samples must come from documents that training"):
        checked(run(dataset_name=str(tmp_path / "book.txt"), eval_samples=2))


def test_long_documents_lose_their_ends(run: Callable[..., Config], tmp_path: Path) -> None:
    """Text is packed across documents unless asked otherwise, and then the row says what that costs."""
    write_rows(tmp_path / "data.jsonl", "a short one", "a long one " * 40, *(f"line {j}" for j in range(9)))
    config = run(dataset_name=str(tmp_path / "data.jsonl"))
    _, found, chosen = checked(config)
    assert "packed samples of 16" in found and chosen.endswith("1 samples each; documents end in '<|endoftext|>'")
    _, found, chosen = checked(config.change(packing="documents"))
    assert re.search(r"; whole documents packed, kept apart by a mask, \d+\.\d% padding; ", chosen)
    tokens, lost = re.search(r"([\d,]+) tokens", found)[1], re.search(r"([\d.]+)% of the tokens lost, as 1 doc", chosen)
    assert (
        float(lost[1]) > 50 and int(tokens) > 16 and " longer than 16 (packing = True keeps them); documents" in chosen
    )
    _, _, chosen = checked(config.change(packing="documents", seq_length=256))
    assert "lost" not in chosen


def test_a_dataset_of_its_own_to_evaluate_on(
    run: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data.jsonl", *(f"a line {j} of the data, long enough" for j in range(9)))
    write_rows(tmp_path / "test.jsonl", *(f"another line, number {j}" for j in range(5)))
    config = run(dataset_name=str(tmp_path / "data.jsonl"), eval_samples=3, packing=False)
    config = config.change(eval_dataset_name=str(tmp_path / "test.jsonl"))
    steps, found, chosen = checked(config)
    assert steps == 9 and "9 padded samples of 16" in found
    assert chosen == (
        "9 steps per epoch, 1 samples each; documents end in '<|endoftext|>'; "
        f"evaluated on 3 of 5 samples of {tmp_path}/test.jsonl"
    )
    with pytest.raises(ConfigError, match=r"eval_samples = 6: eval_dataset_name = '.*' has 5 samples of 16 tokens"):
        checked(config.change(eval_samples=6))
    monkeypatch.setattr(cache_folders, "damage", lambda folder: "")  # else it would be made anew
    for meta in cache_dir().glob("tokens-*/meta.json"):
        if '"rows": 5,' in meta.read_text():
            meta.write_text(json.dumps(json.loads(meta.read_text()) | {"highest": 9999}))
    with pytest.raises(ConfigError, match="its tokenizer gives id 9999, the model has"):
        checked(config)


def test_evaluation_on_what_is_trained_on(run: Callable[..., Config], tmp_path: Path) -> None:
    """Copies of all of it are refused, copies of some are told."""
    texts = [f"a line {j} of the data, long enough" for j in range(9)]
    write_rows(tmp_path / "data.jsonl", *texts)
    write_rows(tmp_path / "some.jsonl", *texts[:2], *(f"another line, number {j}" for j in range(5)))
    write_rows(tmp_path / "all.jsonl", *reversed(texts))
    config = run(dataset_name=str(tmp_path / "data.jsonl"), eval_samples=3, packing=False)
    _, _, chosen = checked(config.change(eval_dataset_name=str(tmp_path / "some.jsonl")))
    assert chosen.endswith(f"3 of 7 samples of {tmp_path}/some.jsonl, of whose 3 documents 2 are trained on, too")
    for name, samples in (("all", 3), ("some", 2)):
        config = config.change(eval_dataset_name=str(tmp_path / f"{name}.jsonl"), eval_samples=samples)
        words = rf"^eval_dataset_name = .*: the text of all {samples} documents that it would be evaluated on is in "
        with pytest.raises(ConfigError, match=words + rf"dataset_name = '{tmp_path}/data.jsonl', too; take a dataset"):
            checked(config)


def test_the_tokens_are_not_read_again(run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest one was noted as they were made; a corpus is many gigabytes."""
    before = checked(run(dataset_name="demo"))
    mapped = np.memmap

    def unread(*args: Any, **kwargs: Any) -> np.ndarray:
        tokens = mapped(*args, **kwargs)
        return np.lib.stride_tricks.as_strided(tokens, strides=(0,), writeable=False)  # as many, all of them the first

    monkeypatch.setattr(np, "memmap", unread)
    assert checked(run(dataset_name="demo")) == before
    monkeypatch.setattr(cache_folders, "damage", lambda folder: "")  # else it would be made anew
    meta = next(cache_dir().glob("tokens-*/meta.json"))
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "highest": 2048}))
    with pytest.raises(ConfigError, match="its tokenizer gives id 2048, the model has 2048 ids"):
        checked(run(dataset_name="demo"))


def test_what_was_removed_is_said(run: Callable[..., Config]) -> None:
    old = build_once(cache_dir() / "tokens-old", lambda folder: None)
    then = time.time() - (UNUSED_DAYS + 1) * DAY
    for path in (old, *old.iterdir(), lock_of(old)):
        os.utime(path, (then, then))
    _, _, chosen = checked(run(dataset_name="demo"))
    assert "removed from the cache, unused for 30 days or abandoned: 1 folders" in chosen
    assert not old.exists()
    assert "removed" not in checked(run(dataset_name="demo"))[2]
