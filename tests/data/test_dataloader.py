"""The batches of every rank, epoch and resumption; tokens made once, from every source, or an error that helps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documents import DOCUMENTS, read, write

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.dataloader import GlobalBatchSampler, create_dataloader, global_batches
from tp2d_helpers.data.dataset import IGNORED, Packing, TokenDataset
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.data.tokens import prepare_tokens
from tp2d_helpers.demo import END_OF_TEXT

# (dp_size, micro-batch, accumulation) of one global batch of 8.
SPLITS = [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (2, 1, 4), (1, 2, 4), (8, 1, 1)]


def sampler(split: tuple[int, int, int] = (2, 2, 2), dp_rank: int = 0, samples: int = 43) -> GlobalBatchSampler:
    dp_size, micro_batch, accumulation = split
    return GlobalBatchSampler(samples, micro_batch, accumulation, dp_rank, dp_size, seed=7)


def steps(split: tuple[int, int, int], epoch: int = 0) -> list[list[list[int]]]:
    """The samples of each step by DP rank, as the ranks draw them: [step][dp_rank][samples]."""
    dp_size, _, accumulation = split
    ranks = []
    for dp_rank in range(dp_size):
        mine = sampler(split, dp_rank)
        mine.set_epoch(epoch)
        batches = list(mine)
        assert len(batches) == len(mine) == 5 * accumulation  # 43 samples are 5 global batches of 8
        assert {len(batch) for batch in batches} == {split[1]}
        drawn = iter(batches)
        ranks.append([[*itertools.chain(*step)] for step in zip(*[drawn] * accumulation, strict=True)])
    return [list(step) for step in zip(*ranks, strict=True)]


# The order of samples.


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_dp_ranks_divide_the_same_global_batches(split: tuple[int, int, int]) -> None:
    reference = [set(step[0]) for step in steps((1, 8, 1))]
    for step, expected in zip(steps(split), reference, strict=True):
        drawn = [sample for rank in step for sample in rank]
        assert len(drawn) == len(set(drawn)) == 8  # disjoint
        assert set(drawn) == expected  # together exactly the global batch


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_an_epoch_repeats_nothing_and_the_next_is_shuffled_anew(split: tuple[int, int, int]) -> None:
    epochs = [[sample for step in steps(split, epoch) for rank in step for sample in rank] for epoch in (0, 1)]
    assert all(len(epoch) == len(set(epoch)) == 40 for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert [sample for step in steps(split) for rank in step for sample in rank] == epochs[0]


def test_order_depends_on_the_seed() -> None:
    assert list(GlobalBatchSampler(43, 8, 1, 0, 1, seed=7)) != list(GlobalBatchSampler(43, 8, 1, 0, 1, seed=8))


@pytest.mark.parametrize("done", range(6))
def test_resuming_gives_exactly_the_rest(done: int) -> None:
    whole, resumed = sampler(), sampler()
    whole.set_epoch(3)
    resumed.set_epoch(3, start_step=done)
    assert list(resumed) == list(whole)[done * 2 :]  # 2 micro-batches a step
    assert len(resumed) == len(list(resumed))


def test_resuming_at_another_dp_size_gives_exactly_the_rest() -> None:
    before = {sample for step in steps((2, 2, 2))[:3] for rank in step for sample in rank}
    after = {sample for step in steps((4, 2, 1))[3:] for rank in step for sample in rank}
    assert not before & after and len(before | after) == 40


# Batches.


def loader(tokenizer: str, **settings: Any) -> torch.utils.data.DataLoader:
    defaults = dict(dataset_name="demo", dataset_percentage=10.0, seq_length=32, batch_size_per_gpu=2)
    return create_dataloader(tokenizer, **{**defaults, "dp_rank": 0, "dp_size": 2, **settings})


def test_batches_are_equal_within_a_tp_group_and_disjoint_across_dp(tokenizer: str) -> None:
    one, same, other = (list(loader(tokenizer, dp_rank=rank, debug_steps=5)) for rank in (0, 0, 1))
    assert len(one) == 5
    for a, b, c in zip(one, same, other, strict=True):
        assert a["input_ids"].shape == (2, 32) and a["input_ids"].dtype == a["labels"].dtype == torch.int64
        assert all(torch.equal(a[name], b[name]) for name in ("input_ids", "labels"))
        rows = {tuple(row.tolist()) for row in torch.cat([a["input_ids"], c["input_ids"]])}
        assert len(rows) == 4


def test_length(tokenizer: str) -> None:
    whole = loader(tokenizer, gradient_accumulation_steps=3)
    assert whole.batch_sampler.steps_per_epoch == len(whole.dataset) // 12
    assert len(whole) == len(list(whole)) == whole.batch_sampler.steps_per_epoch * 3
    short = loader(tokenizer, gradient_accumulation_steps=3, debug_steps=2)
    assert len(short) == len(list(short)) == 6
    assert len(list(global_batches(short))) == 2
    assert loader(tokenizer, debug_steps=10**6).batch_sampler.steps_per_epoch == len(whole.dataset) // 4


def test_packing_keeps_every_token_but_the_tail(cache: Path, tokenizer: str, source: str) -> None:
    folder = prepare_tokens(tokenizer, source)
    tokens = torch.from_numpy(np.fromfile(folder / "tokens.bin", dtype=np.uint32).astype(np.int64))
    dataset = TokenDataset(folder, seq_length=8)
    packed = torch.cat([dataset[i]["input_ids"] for i in range(len(dataset))])
    assert torch.equal(packed, tokens[: len(packed)]) and 0 <= len(tokens) - len(packed) < 8
    assert all(torch.equal(dataset[i]["input_ids"], dataset[i]["labels"]) for i in range(len(dataset)))


def test_documents_are_joined_by_the_end_of_text(cache: Path, tokenizer: str, tmp_path: Path) -> None:
    source = write(tmp_path / "documents.jsonl", [DOCUMENTS[0], "", "  \n", *DOCUMENTS[1:]])
    folder = prepare_tokens(tokenizer, str(source))
    assert read(tokenizer, folder) == [document + END_OF_TEXT for document in DOCUMENTS]  # the empty ones are left out
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["documents"] == len(DOCUMENTS) and meta["tokens"] == np.load(folder / "offsets.npy")[-1]


def test_labels_ignore_exactly_the_padding(cache: Path, tokenizer: str, source: str) -> None:
    """The demo pads with its end-of-text token, so the one that ends a document must be told from those that pad."""
    folder = prepare_tokens(tokenizer, source)
    dataset, tokens = TokenDataset(folder, seq_length=16, packing=False), load_tokenizer(tokenizer)
    assert len(dataset) == len(DOCUMENTS)
    for i, document in enumerate(DOCUMENTS):
        expected = [*tokens(document)["input_ids"], tokens.eos_token_id][:16]
        ids, labels = dataset[i]["input_ids"].tolist(), dataset[i]["labels"].tolist()
        assert ids == expected + [tokens.pad_token_id] * (16 - len(expected))
        assert labels == expected + [IGNORED] * (16 - len(expected))
        assert dataset.lengths[i] == len(expected)


@pytest.mark.parametrize("packing", [True, False, "documents"])
@pytest.mark.parametrize("dp_size, micro_batch, accumulation", [(1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 1, 4)])
def test_mean_of_micro_batches_is_the_mean_of_all_targets(
    cache: Path, tokenizer: str, source: str, packing: Packing, dp_size: int, micro_batch: int, accumulation: int
) -> None:
    """A micro-batch's loss is its sum over targets / num_items_in_batch; DeepSpeed takes the mean of them all."""
    split = dict(batch_size_per_gpu=micro_batch, gradient_accumulation_steps=accumulation, dp_size=dp_size)
    data = dict(dataset_name=source, dataset_percentage=100.0, seq_length=8, packing=packing, **split)
    weigh = torch.rand(5000, generator=torch.Generator().manual_seed(0))  # a made-up loss per target token
    ranks = [list(global_batches(loader(tokenizer, dp_rank=rank, **data))) for rank in range(dp_size)]
    assert len(ranks[0]) >= 1
    for step in zip(*ranks, strict=True):
        batches = [batch for micro_batches, _ in step for batch in micro_batches]
        assert len(batches) == dp_size * accumulation
        targets = [batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORED] for batch in batches]
        means = [weigh[t].sum() / b["num_items_in_batch"] for t, b in zip(targets, batches, strict=True)]
        assert torch.stack(means).mean() == pytest.approx(weigh[torch.cat(targets)].mean().item(), rel=1e-6)
        real = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        # Packed documents have no label on their first tokens; padding may be one of those that are counted.
        firsts = sum(int((batch.get("position_ids", torch.ones(1)) == 0).sum()) for batch in batches)
        assert real <= step[0][1] <= real + firsts and (firsts or real == step[0][1])
        assert len({tokens for _, tokens in step}) == 1


def test_less_than_a_global_batch(tiny_model: Callable[[str], Path]) -> None:
    """An epoch without a step would never end."""
    with pytest.raises(ConfigError, match="samples are fewer than one global batch of 100000"):
        create_dataloader(str(tiny_model("llama")), "demo", 64, 100_000, dp_rank=0, dp_size=1)
