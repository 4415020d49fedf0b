"""Whole documents → samples: which of them share one, by best fit decreasing, as in Ding et al. 2024 (section 3).

The longest document is placed first, each in the fullest sample that still has room for it. With documents that are
much shorter than a sample hardly a position stays empty, and none is cut in two.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import default_collate


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items into bins, best fit decreasing. The same for the same lengths; no random number is drawn.

    Items of one length, and bins of one free space, are alike and are handled together: the time grows with the number
    of items, and not with its square. A million take half a second and about 50 bytes each.

    Args:
        lengths: int [items], from 1 to `capacity`.

    Returns:
        (order, bounds), int64 [items] and [bins + 1]: bin b holds the items order[bounds[b] : bounds[b + 1]], in
        ascending order. The bins are in the order of their first items.
    """
    by_length = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    bin_of, placed, bins = np.empty(len(lengths), dtype=np.int64), 0, 0
    free: dict[int, array] = {}  # bins, by the space that they have left
    spaces: list[int] = []  # the keys of `free`, ascending
    for length, left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            place = bisect.bisect_left(spaces, length)
            space = spaces[place] if place < len(spaces) else capacity
            each = space // length  # items until such a bin is full to them: the tightest one is taken again and again
            open_bins = len(free[space]) if place < len(spaces) else -(-left // each)
            if each > left:
                each = left
            taken = min(open_bins, left // each)
            if place < len(spaces):
                found = free[space][-taken:]
                del free[space][-taken:]
                if not free[space]:
                    del free[space], spaces[place]
            else:
                found = array("q", range(bins, bins + taken))
                bins += taken
            bin_of[placed : placed + taken * each] = np.repeat(found, each) if taken * each > 1 else found[0]
            placed, left = placed + taken * each, left - taken * each
            if rest := space - each * length:
                if rest not in free:
                    bisect.insort(spaces, rest)
                    free[rest] = array("q")
                free[rest].extend(found)
    return _by_first_item(by_length, bin_of, bins)


def _by_first_item(items: np.ndarray, bin_of: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """(order, bounds) of `best_fit`, from the bin of each of the items."""
    bin_of_item = np.empty(len(items), dtype=np.int64)
    bin_of_item[items] = bin_of
    _, first = np.unique(bin_of_item, return_index=True)
    rank = np.empty(bins, dtype=np.int64)
    rank[np.argsort(first)] = np.arange(bins)
    order = np.argsort(rank[bin_of_item], kind="stable")
    sizes = np.bincount(bin_of_item, minlength=bins)[np.argsort(first)]
    return order, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


def positions_of(sizes: Sequence[int]) -> np.ndarray:
    """int64 [sum of sizes]: positions that begin at 0 in each document."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A micro-batch of samples. Of packed documents, it also has their `cumulative_lengths`, as `cu_seq_lens_q`."""
    batch = default_collate(samples)
    if "position_ids" in batch:
        batch["cu_seq_lens_q"] = cumulative_lengths(batch["position_ids"])
    return batch


def cumulative_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """int32 [documents + 1]: where each document of a batch begins, its samples end to end, and where the last ends.

    Args:
        position_ids: [samples, seq], from 0 in each document; what pads a sample counts as one.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
