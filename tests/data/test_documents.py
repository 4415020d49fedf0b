"""Samples of whole documents: which share one, what is in it, and that a model looks at each by itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, masking_utils

from tp2d_helpers.data.dataloader import create_dataloader, global_batches
from tp2d_helpers.data.dataset import IGNORED, TokenDataset
from tp2d_helpers.data.packing import best_fit, collate
from tp2d_helpers.data.tokens import prepare_tokens
from tp2d_helpers.speed import documents

# Which documents share a sample.


def bins_of(lengths: list[int], capacity: int) -> list[list[int]]:
    order, bounds = best_fit(np.array(lengths, dtype=np.int64), capacity)
    return [order[begin:end].tolist() for begin, end in itertools.pairwise(bounds)]


@pytest.mark.parametrize("lengths, bins", [
    ([], []),
    ([10], [[0]]),
    ([3, 10, 7], [[0, 2], [1]]),
    ([4, 6, 5, 5], [[0, 1], [2, 3]]),  # in the order they come in, 4 and 5 would share one
    ([2, 7, 6, 3, 2], [[0, 2, 4], [1, 3]]),  # 3 goes to 7, where it fits best
    ([1, 1, 1, 9, 9, 8], [[0, 3], [1, 4], [2, 5]]),
    ([3, 3, 3, 3, 3, 3, 3], [[0, 1, 2], [3, 4, 5], [6]]),
    ([6, 6, 2, 2, 2, 2], [[0, 2, 3], [1, 4, 5]]),
])  # fmt: skip
def test_best_fit_decreasing_by_hand(lengths: list[int], bins: list[list[int]]) -> None:
    found = bins_of(lengths, 10)
    assert [sorted(lengths[i] for i in items) for items in found] == [sorted(lengths[i] for i in b) for b in bins]
    assert found == sorted(map(sorted, found)) and sorted(itertools.chain(*found)) == list(range(len(lengths)))


def spaces_of(lengths: list[int], capacity: int) -> list[int]:
    """What the rule leaves free in each bin, item by item."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else capacity) - length)
    return sorted(spaces)


def test_best_fit_decreasing_of_any_lengths() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        capacity = int(draw.integers(2, 50))
        lengths = np.minimum(draw.geometric(draw.uniform(0.05, 0.5), size=draw.integers(1, 100)), capacity).tolist()
        found = bins_of(lengths, capacity)
        assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
        assert sorted(capacity - sum(lengths[i] for i in items) for items in found) == spaces_of(lengths, capacity)


# What is in a sample.


@pytest.fixture(params=["text", "chats"])
def data(request: pytest.FixtureRequest, chat_model: Path, chats: str, short_documents: str) -> TokenDataset:
    name, seq_length = {"text": (short_documents, 64), "chats": (chats, 128)}[request.param]
    return TokenDataset(prepare_tokens(str(chat_model), name), seq_length, "documents", eval_samples=5)


def test_each_document_is_whole_in_one_sample(data: TokenDataset) -> None:
    folder, size = Path(data.tokens.filename).parent, data.seq_length
    every, offsets, found, lost = TokenDataset(folder, size, "documents"), np.load(folder / "offsets.npy"), [], 0
    expected, has_loss = [], every.mask if every.mask is not None else np.ones(len(every.tokens))
    for begin, end in itertools.pairwise(offsets):
        cut = slice(begin, min(end, begin + size))
        if has_loss[cut][1:].any():
            expected.append((tuple(every.tokens[cut].tolist()), tuple((has_loss[cut] > 0).tolist())))
            lost += max(0, end - begin - size)
    for i in range(len(every)):
        ids, labels, positions = (every[i][name] for name in ("input_ids", "labels", "position_ids"))
        assert ids.shape == labels.shape == positions.shape == (size,) and positions.dtype == torch.int64
        starts = [*(positions == 0).nonzero().flatten().tolist(), size]
        assert positions.tolist() == [p for n in np.diff(starts) for p in range(n)]
        real = int(every.lengths[i])
        assert real in starts and (labels[real:] == IGNORED).all() and (ids[real:] == every.pad).all()
        assert (labels[1:] != IGNORED).sum() == every.targets[i] > 0
        for begin, end in itertools.pairwise(starts):
            if end <= real:
                learnt = labels[begin:end] != IGNORED
                assert not learnt[0] and (labels[begin:end] == ids[begin:end])[learnt].all()
                found.append((tuple(ids[begin:end].tolist()), tuple(learnt.tolist())))
    first_has_none = [(ids, (False, *mask[1:])) for ids, mask in expected]  # nothing predicts it
    assert sorted(found) == sorted(first_has_none) and every.cut_off == lost > 0
    assert len(every) < 0.9 * len(found) and every.lengths.sum() / (size * len(every)) > 0.85


def test_the_held_out_are_packed_as_well(data: TokenDataset) -> None:
    assert len(data) == data.samples + 5 and data.held_out > 5
    offsets = np.load(Path(data.tokens.filename).parent / "offsets.npy")
    trained = data.starts[: data.bounds[data.samples]]
    assert trained.max() < data.starts[data.bounds[data.samples] :].min()
    assert len(np.unique(data.starts)) == len(data.starts) and set(data.starts) <= set(offsets)


def test_auto(chat_model: Path, chats: str, short_documents: str) -> None:
    for name, packing in ((chats, "documents"), (short_documents, True)):
        assert TokenDataset(prepare_tokens(str(chat_model), name), 64, "auto").packing == packing


def test_a_batch_says_where_documents_begin(chat_model: Path, short_documents: str) -> None:
    settings = dict(seq_length=64, batch_size_per_gpu=3, dp_rank=0, dp_size=1, dataset_percentage=100.0)
    loader = create_dataloader(str(chat_model), short_documents, packing="documents", **settings)
    (batch,), _ = next(global_batches(loader))
    lengths = batch["cu_seq_lens_q"]
    assert lengths.dtype == torch.int32 and lengths[0] == 0 and lengths[-1] == 3 * 64
    assert lengths[:-1].tolist() == (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()


# A model looks at each by itself.


@pytest.fixture(params=["llama", "mistral", "gemma3_text"])
def model(
    request: pytest.FixtureRequest, family: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[transformers.PreTrainedModel]:
    """A tiny model of plain `transformers`; two of the three have sliding windows, shorter than documents."""
    more = {"mistral": dict(sliding_window=6), "gemma3_text": dict(sliding_window=6, num_hidden_layers=6)}
    folder = family(request.param, **more.get(request.param, {}))
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", masking_utils.find_packed_sequence_indices)
    yield AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    documents.set_lengths(None)


def sample_of(*parts: torch.Tensor) -> dict[str, torch.Tensor]:
    """A sample of these documents."""
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    return collate([{"input_ids": torch.cat(parts), "position_ids": positions}])


def parts_of(sizes: tuple[int, ...]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(2048, (size,), generator=draw) for size in sizes]


@pytest.mark.parametrize("by", ["transformers", "mask", "attend"])
def test_one_does_not_depend_on_another(model: transformers.PreTrainedModel, by: str) -> None:
    """Bit for bit, logits and gradients; and as it is by itself. Without positions, they would mix."""
    first, other, second, third = parts_of((11, 11, 14, 7))
    truth = model(input_ids=second[None], use_cache=False).logits[0].detach()
    if by != "transformers":
        documents.skip_search_for_packed_samples(model)
    if by == "attend":
        model.set_attn_implementation(documents.NAME)

    def outcome(batch: dict[str, torch.Tensor], begin: int) -> tuple[torch.Tensor, ...]:
        """The logits of `second`, which begins there, and the gradients of its loss."""
        logits = model(**batch, use_cache=False).logits[0, begin : begin + 14]
        loss = torch.nn.functional.cross_entropy(logits[:-1], second[1:])
        return (logits.detach(), *torch.autograd.grad(loss, list(model.parameters())))

    found = outcome(sample_of(first, second, third), 11)
    changed = outcome(sample_of(other, second, third), 11)
    assert all(torch.equal(*pair) for pair in zip(found, changed, strict=True))
    alone = outcome(sample_of(second), 0)
    torch.testing.assert_close(alone[0], truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())
    for one, by_itself in zip(found, alone, strict=True):
        torch.testing.assert_close(one, by_itself, rtol=1e-4, atol=1e-5 * by_itself.abs().max().item())
    mixed = outcome({"input_ids": sample_of(first, second, third)["input_ids"]}, 11)
    assert (mixed[0] - found[0]).abs().max() > 1e-2 * found[0].abs().max()


def test_losses_are_those_of_documents_one_by_one(chat_model: Path, data: TokenDataset) -> None:
    """The sum over a batch of samples, by plain `transformers`, and that over its documents without any packing."""
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    one = torch.ones(())
    with torch.no_grad():
        batch = collate([data[i] for i in range(6)])
        packed = model(**batch, num_items_in_batch=one, use_cache=False).loss.item()
        losses = []
        for place in range(data.bounds[6]):
            tokens = slice(data.starts[place], data.starts[place] + data.sizes[place])
            ids = torch.from_numpy(data.tokens[tokens].astype(np.int64))
            learnt = torch.ones(len(ids)) if data.mask is None else torch.from_numpy(data.mask[tokens] > 0)
            labels = ids.where(learnt > 0, IGNORED)
            losses.append(model(ids[None], labels=labels[None], num_items_in_batch=one, use_cache=False).loss.item())
    assert packed == pytest.approx(math.fsum(losses), rel=1e-5)
    assert len(losses) > 6 and int(data.targets[:6].sum()) == int((batch["labels"][:, 1:] != IGNORED).sum())
