"""Held-out samples are of documents that training sees no part and no copy of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from documents import write

from tp2d_helpers import demo
from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.dataloader import create_dataloader
from tp2d_helpers.data.dataset import IGNORED, Packing, TokenDataset
from tp2d_helpers.data.evaluation import held_out_batches
from tp2d_helpers.data.tokens import prepare_tokens


@pytest.fixture
def numbered(tmp_path: Path) -> Callable[..., Path]:
    """numbered(sizes, copies): tokens that are the number of their document, or of the one that it is a copy of."""

    def make(sizes: list[int], copies: dict[int, int]) -> Path:
        first = np.array([copies.get(i, i) for i in range(len(sizes))])
        np.repeat(first, sizes).astype(np.uint32).tofile(tmp_path / "tokens.bin")
        np.save(tmp_path / "offsets.npy", np.concatenate([[0], np.cumsum(sizes)]))
        np.save(tmp_path / "first.npy", first)
        (tmp_path / "meta.json").write_text(json.dumps({"pad": 0}))
        return tmp_path

    return make


def documents_in(dataset: TokenDataset) -> tuple[list[int], list[int]]:
    """The documents that samples have tokens of: (those to train on, those held out)."""
    labels = [dataset[index]["labels"] for index in range(len(dataset))]
    parts = labels[: dataset.samples], labels[dataset.samples :]
    return tuple(sorted({int(token) for part in p for token in part[part != IGNORED]}) for p in parts)


# 12 documents of 10 tokens; by number, those that repeat another one.
@pytest.mark.parametrize("packing, eval_samples, copies, trained, held_out", [
    (True, 5, {}, [*range(10)], [10, 11]),  # 5 × 4 tokens
    (True, 6, {}, [*range(9)], [9, 10, 11]),
    (True, 5, {10: 3}, [*range(9)], [9, 11]),  # 10 is seen in training, as number 3
    (True, 5, {11: 10}, [*range(10)], [10]),  # twice among those held out: in both
    (True, 7, {11: 9, 10: 9, 8: 1}, [*range(9)], [9]),
    (False, 3, {}, [*range(9)], [9, 10, 11]),
    (False, 3, {11: 0, 10: 1}, [*range(7)], [7, 8, 9]),
    (False, 2, {11: 10}, [*range(10)], [10]),
])  # fmt: skip
def test_documents(
    numbered: Callable[..., Path], packing: Packing, eval_samples: int, copies: dict, trained: list, held_out: list
) -> None:
    dataset = TokenDataset(numbered([10] * 12, copies), 4, packing, eval_samples)
    assert len(dataset) == dataset.samples + eval_samples
    assert dataset.samples == (len(trained) * 10 // 4 if packing else len(trained))
    assert documents_in(dataset) == (sorted({copies.get(i, i) for i in trained}), held_out)


@pytest.mark.parametrize("packing", [True, False, "documents"])
def test_no_document_is_on_both_sides(numbered: Callable[..., Path], packing: Packing) -> None:
    """Of any sizes and with any copies."""
    random = np.random.default_rng(0)
    for _ in range(50):
        sizes = random.integers(1, 40, size=60)
        copies = {int(i): int(random.integers(0, i)) for i in random.integers(1, 60, size=12)}
        copies = {i: copies.get(of, of) for i, of in copies.items() if copies.get(of, of) not in copies}
        sizes[list(copies)] = sizes[list(copies.values())]
        dataset = TokenDataset(numbered(sizes.tolist(), copies), 8, packing, eval_samples=9)
        trained, held_out = documents_in(dataset)
        assert trained and held_out and not {*trained} & {*held_out}
        assert len(dataset) - dataset.samples == 9
        every = TokenDataset(numbered(sizes.tolist(), copies), 8, packing)
        assert len(every) == every.samples > dataset.samples


@pytest.mark.parametrize("sizes, copies, message", [
    ([1000], {}, "eval_samples = 3: .* none of the 1 .1 different. would be left"),
    ([10] * 9, dict.fromkeys(range(1, 9), 0), "none of the 9 .1 different."),
    ([10] * 2, {}, "Take fewer samples .0 holds none out., or more documents: text_files = 'paragraph'"),
])  # fmt: skip
def test_too_few_different_documents(
    numbered: Callable[..., Path], sizes: list[int], copies: dict[int, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenDataset(numbered(sizes, copies), 4, eval_samples=3)


def test_a_copy_is_known_by_its_text(cache: Path, tokenizer: str, tmp_path: Path) -> None:
    documents = [*(f"document number {i} " * 5 for i in range(9)), " document number 2 " * 0 + "document number 2 " * 5]
    folder = prepare_tokens(tokenizer, str(write(tmp_path / "documents.jsonl", documents)))
    assert np.load(folder / "first.npy").tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 2]


@pytest.mark.parametrize("packing", [True, False, "documents"])
@pytest.mark.parametrize("dp_size, micro_batch", [(1, 4), (2, 2), (4, 1), (3, 4)])
def test_the_same_samples_on_every_grid(tokenizer: str, packing: Packing, dp_size: int, micro_batch: int) -> None:
    settings = dict(
        dataset_percentage=100.0,
        seq_length=32,
        packing=packing,
        eval_samples=7,
        batch_size_per_gpu=micro_batch,
        dp_size=dp_size,
    )
    found = []
    for dp_rank in range(dp_size):
        loader = create_dataloader(tokenizer, "demo", dp_rank=dp_rank, **settings)
        found += [row for batch in held_out_batches(loader) for row in batch["labels"] if (row != IGNORED).any()]
    dataset = loader.dataset
    expected = [dataset[index]["labels"] for index in range(dataset.samples, dataset.samples + 7)]
    assert sorted(row.tolist() for row in found) == sorted(row.tolist() for row in expected)


def repeated_runs(dataset: TokenDataset, length: int = 20) -> float:
    """The share of the held-out samples' runs of `length` tokens that occur in those to train on, too."""

    def runs(first: int, last: int) -> list[tuple[int, ...]]:
        tokens = torch.cat([dataset[index]["input_ids"] for index in range(first, last)]).tolist()
        return [tuple(tokens[i : i + length]) for i in range(len(tokens) - length)]

    trained, held_out = set(runs(0, dataset.samples)), runs(dataset.samples, len(dataset))
    return sum(run in trained for run in held_out) / len(held_out)


@pytest.mark.parametrize("eval_samples, seq_length", [(16, 256), (5, 64), (20, 512)])
def test_the_demo_is_evaluated_on_other_topics(tokenizer: str, cache: Path, eval_samples: int, seq_length: int) -> None:
    """With its topics in the order of their names, half of what is held out would be in the training text."""
    held_out = TokenDataset(prepare_tokens(tokenizer, "demo"), seq_length, eval_samples=eval_samples)
    assert repeated_runs(held_out) == 0
    with mock.patch.object(demo, "HELD_OUT", ()):
        sorted_topics = TokenDataset(
            prepare_tokens(tokenizer, "demo", dataset_percentage=99.99), seq_length, eval_samples=eval_samples
        )
    if repeated_runs(sorted_topics) < 0.2:  # the text of Python 3.11.2, for one
        pytest.skip("in this Python's topics the order makes no difference, so that the test shows nothing")
