"""Tokens → samples of one length, to train on and to hold out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.files import config_of
from tp2d_helpers.data.packing import best_fit, positions_of
from tp2d_helpers.data.tokens import prepare_tokens

Packing = bool | Literal["documents", "auto"]
IGNORED = -100  # the label that PyTorch's cross-entropy skips


class TokenDataset(Dataset):
    """Samples of `seq_length` tokens over a folder of `prepare_tokens`, memory-mapped.

    Packed (True), sample i is tokens [i·S, (i+1)·S): every position is a real token, and the last, incomplete block is
    left out. Padded (False), sample i is the first S tokens of document i, and the rest of its S positions is padding;
    documents of one token are left out, as they have nothing to predict. With "documents", a sample holds the first S
    tokens of as many documents as `best_fit` puts together, each with positions of its own, and little padding.
    "auto" is "documents" for chats and True for text; `packing` has what it came to.

    Of chats, only the tokens that the folder's mask names are labels, and samples (or documents) without any are left
    out.

    The first `samples` are to train on. `eval_samples` more are held out: they are of the last documents, of which
    training sees no part and no copy; or, after `evaluate_on`, of another dataset.

    Raises:
        ConfigError: if the documents are too few, or too much alike, to hold samples out.
    """

    other: TokenDataset | None = None  # that the held-out samples are of, if they are of another one

    def __init__(self, folder: Path, seq_length: int, packing: Packing = True, eval_samples: int = 0) -> None:
        self.folder, self.seq_length, self.eval_samples = folder, seq_length, eval_samples
        self.tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.pad = self.meta["pad"]
        masked = (folder / "mask.bin").exists()
        self.mask = np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r") if masked else None
        self.packing = ("documents" if masked else True) if packing == "auto" else packing
        offsets = np.load(folder / "offsets.npy")
        sizes = np.diff(offsets)
        self.too_long, self.left_out = int((sizes > seq_length).sum()), 0  # documents; samples without a target
        share, enough = sizes, eval_samples * seq_length  # of held-out documents
        if self.packing is not True:
            cut = np.minimum(sizes, seq_length)
            targets = self._targets(offsets[:-1], cut)
            usable = targets > 0
            self.left_out = int((~usable).sum())
            # Whole documents of so many tokens fill no fewer samples.
            share, enough = (usable * cut, enough) if self.packing else (usable, eval_samples)
        trained, held_out = len(sizes), np.zeros(0, dtype=np.int64)
        if eval_samples:
            trained, held_out = hold_out(np.load(folder / "first.npy"), share, enough, eval_samples)
        if self.packing is True:
            self._cut(offsets, trained, held_out)
        else:
            parts = np.flatnonzero(usable[:trained]), held_out[usable[held_out]]
            self._place(offsets, cut, targets, parts)
        held_out_labels = (self[i]["labels"][1:] for i in range(self.samples, len(self)))
        if eval_samples and masked and not any((labels != IGNORED).any() for labels in held_out_labels):
            raise ConfigError(f"eval_samples = {eval_samples}: no answer begins in the held-out samples; take more")

    def _cut(self, offsets: np.ndarray, trained: int, held_out: np.ndarray) -> None:
        """Samples of `seq_length` tokens, whatever documents they are of."""
        self.starts = np.arange(offsets[trained] // self.seq_length, dtype=np.int64) * self.seq_length
        self.targets = self._targets(self.starts, self.seq_length)
        self.starts, self.targets = self.starts[self.targets > 0], self.targets[self.targets > 0]
        self.lengths = np.full(len(self.starts), self.seq_length, dtype=np.int64)
        self.samples, self.held_out = len(self.starts), len(held_out)
        self.ends, self.shifts = np.diff(offsets)[held_out].cumsum(), offsets[held_out + 1]

    def _place(self, offsets: np.ndarray, cut: np.ndarray, targets: np.ndarray, parts: tuple[np.ndarray, ...]) -> None:
        """Samples of a document each, or of those that `best_fit` puts together.

        Sample i holds the documents `bounds[i]` to `bounds[i + 1]`, of which each begins at a place of `starts`.

        Args:
            cut, targets: int64 [documents], the tokens that a sample takes of each, and how many of them have loss.
            parts: the documents to train on, and those to hold out.
        """
        placed, counts = [], []
        for documents, samples in zip(parts, (None, self.eval_samples), strict=True):
            order, bounds = np.arange(len(documents)), np.arange(len(documents) + 1)
            if self.packing:
                order, bounds = best_fit(cut[documents], self.seq_length)
            bounds = bounds[: samples + 1] if samples is not None else bounds
            placed.append(documents[order[: bounds[-1]]])
            counts.append(np.diff(bounds))
        self.samples, self.held_out = len(counts[0]), len(placed[1])
        documents = np.concatenate(placed)
        self.bounds = np.concatenate([[0], *counts]).cumsum()
        self.starts, self.sizes = offsets[documents], cut[documents]
        self.cut_off = int((np.diff(offsets)[documents] - self.sizes).sum())  # tokens
        self.lengths, self.targets = (
            np.add.reduceat(of, self.bounds[:-1]) if len(of) else of for of in (self.sizes, targets[documents])
        )

    def _targets(self, starts: np.ndarray, lengths: np.ndarray | int) -> np.ndarray:
        """int64, how many tokens of each sample have loss: of a text all but the first, which nothing predicts."""
        lengths = np.broadcast_to(lengths, starts.shape)
        if self.mask is None:
            return lengths - 1
        bounds = np.stack([starts + 1, starts + lengths], axis=1).ravel()
        if not len(bounds):
            return bounds
        # The last of all ends with the file, and has no bound.
        return np.add.reduceat(self.mask, bounds[: -1 if bounds[-1] == len(self.mask) else None], dtype=np.int64)[::2]

    def evaluate_on(self, other: TokenDataset, eval_samples: int) -> None:
        """Take the first `eval_samples` of another dataset as held out, in place of none of this one."""
        self.other, self.eval_samples = other, eval_samples

    @property
    def identity(self) -> dict[str, Any]:
        """What was tokenised, whatever it is called and whenever it was written: numbers and a hash.

        With those of the dataset that is evaluated on, under "eval", if it is another one.
        """
        own = {name: self.meta[name] for name in ("documents", "tokens", "sha256")}
        own |= {"date": self.meta["date"]} if self.meta.get("date") else {}
        return own | ({"eval": self.other.identity} if self.other else {})

    def __len__(self) -> int:
        return self.samples + self.eval_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`, int64 [seq_length]; the labels of padding, and what has no loss, are `IGNORED`.

        With "documents" also `position_ids`, which begin at 0 in each document and in the padding, and the label of a
        document's first token is `IGNORED`: nothing of its own document predicts it.
        """
        if self.other and index >= self.samples:
            return self.other[index - self.samples]
        if self.packing is not True:
            return self._documents_of(index)
        if index < len(self.starts):
            places = slice(self.starts[index], self.starts[index] + self.seq_length)
        else:  # packed and held out: from documents that need not be neighbours
            places = np.arange(self.seq_length) + (index - self.samples) * self.seq_length
            document = np.searchsorted(self.ends, places, side="right")
            places += self.shifts[document] - self.ends[document]
        return self._sample(places)

    def _sample(self, places: slice | np.ndarray) -> dict[str, torch.Tensor]:
        """The tokens at these places as inputs and labels, and padding after them."""
        tokens = torch.from_numpy(self.tokens[places].astype(np.int64))
        padding = (0, self.seq_length - len(tokens))
        input_ids = torch.nn.functional.pad(tokens, padding, value=self.pad)
        if self.mask is not None:
            tokens = tokens.where(torch.from_numpy(self.mask[places] > 0), IGNORED)
        return {"input_ids": input_ids, "labels": torch.nn.functional.pad(tokens, padding, value=IGNORED)}

    def _documents_of(self, index: int) -> dict[str, torch.Tensor]:
        documents = slice(self.bounds[index], self.bounds[index + 1])
        sizes, tokens = self.sizes[documents], self.lengths[index]
        positions = positions_of([*sizes, self.seq_length - tokens])
        sample = self._sample(np.repeat(self.starts[documents], sizes) + positions[:tokens])
        if self.packing:
            sample["position_ids"] = torch.from_numpy(positions)
            sample["labels"][sample["position_ids"] == 0] = IGNORED
        return sample


def hold_out(first: np.ndarray, share: np.ndarray, enough: int, eval_samples: int) -> tuple[int, np.ndarray]:
    """Which documents to train on and which to hold out: the last ones, whole, and as few as will do.

    Args:
        first: int64 [documents], for each the first one with the same text.
        share: [documents], how much of the held-out samples each would give.
        enough: how much `eval_samples` of them need.

    Returns:
        n, the number of documents to train on, and which of those after them repeat none of these.

    Raises:
        ConfigError: if nothing would be left to train on.
    """
    # Held out from n on, a document counts if its text comes first at n or later: its share belongs to `first`.
    from_here = np.bincount(first, weights=share, minlength=len(first))[::-1].cumsum()[::-1]
    n = int(np.count_nonzero(from_here >= enough)) - 1
    if n < 1:
        raise ConfigError(
            f"eval_samples = {eval_samples}: held-out samples must come from documents that training does not see, and "
            f"none of the {len(first)} ({len(np.unique(first))} different) would be left to train on. Take fewer "
            "samples (0 holds none out), or more documents: text_files = 'paragraph' divides .txt files"
        )
    return n, n + np.flatnonzero(first[n:] >= n)


def load_samples(
    model_name: str,
    dataset_name: str,
    seq_length: int,
    packing: Packing = True,
    eval_samples: int = 0,
    eval_dataset_name: str = "",
    dataset_percentage: float = 100.0,
    dataset_config: str = "",
    **source: Any,
) -> TokenDataset:
    """Tokenise what a run trains and evaluates on, if this node hasn't yet, and cut it into samples.

    Args:
        eval_dataset_name: where the held-out samples come from; "" takes whole documents of `dataset_name`. All of it
            is tokenised, whatever `dataset_percentage` is, and `dataset_config` counts if it is the same hub dataset.
        source: the other arguments of `prepare_tokens`.

    Raises:
        ConfigError: for a dataset that can't be tokenised, or has too little to hold out.
    """
    folder = prepare_tokens(model_name, dataset_name, dataset_config, dataset_percentage=dataset_percentage, **source)
    data = TokenDataset(folder, seq_length, packing, 0 if eval_dataset_name else eval_samples)
    if eval_dataset_name:
        config = config_of(eval_dataset_name, dataset_name, dataset_config)
        try:
            folder = prepare_tokens(model_name, eval_dataset_name, config, **source)
        except ConfigError as error:
            found = str(error).removeprefix(f"dataset_name = {eval_dataset_name!r}: ").removeprefix("dataset_name: ")
            raise ConfigError(f"eval_dataset_name = {eval_dataset_name!r}: {found}") from error
        other = TokenDataset(folder, seq_length, data.packing)
        if other.samples < eval_samples:
            raise ConfigError(
                f"eval_samples = {eval_samples}: eval_dataset_name = {eval_dataset_name!r} has {other.samples} samples "
                f"of {seq_length} tokens; take at most that many, or more text"
            )
        data.evaluate_on(other, eval_samples)
    return data
