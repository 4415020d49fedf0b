"""Tokens → samples of one length, to train on and to hold out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.tokens import prepare_tokens

IGNORED = -100  # the label that PyTorch's cross-entropy skips


class TokenDataset(Dataset):
    """Samples of `seq_length` tokens over a folder of `prepare_tokens`, memory-mapped.

    Packed, sample i is tokens [i·S, (i+1)·S): every position is a real token, and the last, incomplete block is left
    out. Padded, sample i is the first S tokens of document i, and the rest of its S positions is padding; documents
    of one token are left out, as they have nothing to predict.

    Of chats, only the tokens that the folder's mask names are labels, and samples without any are left out.

    The first `samples` are to train on. `eval_samples` more are held out: they are of the last documents, of which
    training sees no part and no copy; or, after `evaluate_on`, of another dataset.

    Raises:
        ConfigError: if the documents are too few, or too much alike, to hold samples out.
    """

    other: TokenDataset | None = None  # that the held-out samples are of, if they are of another one

    def __init__(self, folder: Path, seq_length: int, packing: bool = True, eval_samples: int = 0) -> None:
        self.seq_length, self.packing, self.eval_samples = seq_length, packing, eval_samples
        self.tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
        self.meta = json.loads((folder / "meta.json").read_text())
        self.pad = self.meta["pad"]
        masked = (folder / "mask.bin").exists()
        self.mask = np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r") if masked else None
        offsets = np.load(folder / "offsets.npy")
        sizes = np.diff(offsets)
        self.too_long, self.left_out = int((sizes > seq_length).sum()), 0  # documents; samples without a target
        if not packing:
            usable = self._targets(offsets[:-1], np.minimum(sizes, seq_length)) > 0
            self.left_out = int((~usable).sum())
        trained, held_out = len(sizes), np.zeros(0, dtype=np.int64)
        if eval_samples:
            share, enough = (sizes, eval_samples * seq_length) if packing else (usable, eval_samples)
            trained, held_out = hold_out(np.load(folder / "first.npy"), share, enough, eval_samples)
        if packing:
            self.starts = np.arange(offsets[trained] // seq_length, dtype=np.int64) * seq_length
            self.starts = self.starts[self._targets(self.starts, seq_length) > 0]
            self.lengths = np.full(len(self.starts), seq_length, dtype=np.int64)
            self.samples = len(self.starts)
            self.ends, self.shifts = sizes[held_out].cumsum(), offsets[held_out + 1]
        else:
            documents, held_out = np.flatnonzero(usable[:trained]), held_out[usable[held_out]][:eval_samples]
            self.samples, documents = len(documents), np.concatenate([documents, held_out])
            self.starts, self.lengths = offsets[documents], np.minimum(sizes[documents], seq_length)
        self.held_out = len(held_out)  # documents
        self.targets = self._targets(self.starts, self.lengths)
        held_out_labels = (self[i]["labels"][1:] for i in range(self.samples, len(self)))
        if eval_samples and masked and not any((labels != IGNORED).any() for labels in held_out_labels):
            raise ConfigError(f"eval_samples = {eval_samples}: no answer begins in the held-out samples; take more")

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
        return own | ({"eval": self.other.identity} if self.other else {})

    def __len__(self) -> int:
        return self.samples + self.eval_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`, int64 [seq_length]; the labels of padding, and what has no loss, are `IGNORED`."""
        if self.other and index >= self.samples:
            return self.other[index - self.samples]
        if index < len(self.starts):
            places = slice(self.starts[index], self.starts[index] + self.lengths[index])
        else:  # packed and held out: from documents that need not be neighbours
            places = np.arange(self.seq_length) + (index - self.samples) * self.seq_length
            document = np.searchsorted(self.ends, places, side="right")
            places += self.shifts[document] - self.ends[document]
        tokens = torch.from_numpy(self.tokens[places].astype(np.int64))
        padding = (0, self.seq_length - len(tokens))
        input_ids = torch.nn.functional.pad(tokens, padding, value=self.pad)
        if self.mask is not None:
            tokens = tokens.where(torch.from_numpy(self.mask[places] > 0), IGNORED)
        return {"input_ids": input_ids, "labels": torch.nn.functional.pad(tokens, padding, value=IGNORED)}


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
    packing: bool = True,
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
        same = eval_dataset_name.split(":")[0] == dataset_name.split(":")[0]
        try:
            folder = prepare_tokens(model_name, eval_dataset_name, dataset_config if same else "", **source)
        except ConfigError as error:
            found = str(error).removeprefix(f"dataset_name = {eval_dataset_name!r}: ").removeprefix("dataset_name: ")
            raise ConfigError(f"eval_dataset_name = {eval_dataset_name!r}: {found}") from error
        other = TokenDataset(folder, seq_length, packing)
        if other.samples < eval_samples:
            raise ConfigError(
                f"eval_samples = {eval_samples}: eval_dataset_name = {eval_dataset_name!r} has {other.samples} samples "
                f"of {seq_length} tokens; take at most that many, or more text"
            )
        data.evaluate_on(other, eval_samples)
    return data
