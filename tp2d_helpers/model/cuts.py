"""How one weight is divided over the ranks of a TP group: what each rank holds of it, in one form for every layout.

Columns, rows, a vocabulary that is not divisible, several matrices in one tensor, experts, key-value heads that ranks
share: each is a dimension, and for each rank the ranges of it that the rank holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed.checkpoint.affine import AffinePiece, ParamAffineMap

Range = tuple[int, int]  # from, to before


@dataclass(frozen=True)
class Cut:
    """Of a weight that is divided.

    Attributes:
        dim: the dimension that is divided.
        ranges: of each rank, the parts of that dimension that it holds, in the order in which it holds them. A part
            is held by one rank, or by several as the same part.
        transposed: the shard is the transposed matrix: GPT-2's layers keep [in, out], AutoTP's [out, in].
    """

    dim: int
    ranges: tuple[tuple[Range, ...], ...]
    transposed: bool = False

    @classmethod
    def even(cls, dim: int, size: int, tp_size: int) -> Cut:
        """One part each; where the size is not divisible, the first ranks get one more, as AutoTP does it."""
        ends = list(itertools.accumulate(size // tp_size + (rank < size % tp_size) for rank in range(tp_size)))
        return cls(dim, tuple(((begin, end),) for begin, end in zip([0, *ends], ends, strict=False)))

    @property
    def copies(self) -> int:
        """How many ranks hold each part: 1, unless there are fewer key-value heads than ranks."""
        return max(map(len, self._holders().values()))

    @property
    def partly_shared(self) -> bool:
        """Whether a rank holds parts of its own beside shared ones: its share of a gradient norm has no one answer."""
        return len({len(ranks) for ranks in self._holders().values()}) > 1

    @property
    def plain(self) -> bool:
        """Whether each rank has one part of one size, one after the other."""
        flat = [part for ranges in self.ranges for part in ranges]
        return len(flat) == len(self.ranges) and self == Cut.even(self.dim, flat[-1][1], len(flat))

    def _holders(self) -> dict[Range, list[int]]:
        found: dict[Range, list[int]] = {}
        for rank, ranges in enumerate(self.ranges):
            for part in ranges:
                found.setdefault(part, []).append(rank)
        return found

    def owns(self, rank: int) -> bool:
        """Whether the rank is the first of those that hold its parts: the one by which they are counted."""
        return self._holders()[self.ranges[rank][0]][0] == rank

    def width(self, rank: int) -> int:
        """Elements of the dimension on a rank."""
        return sum(end - begin for begin, end in self.ranges[rank])

    def shape(self, whole: Sequence[int], rank: int) -> torch.Size:
        """The shape of a rank's shard."""
        shape = [*whole[: self.dim], self.width(rank), *whole[self.dim + 1 :]]
        return torch.Size(shape[::-1] if self.transposed else shape)

    def take(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's shard: a view of the whole if that is one part."""
        parts = [whole.narrow(self.dim, begin, end - begin) for begin, end in self.ranges[rank]]
        shard = parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)
        return shard.T if self.transposed else shard

    def put(self, whole: torch.Tensor, shard: torch.Tensor, rank: int) -> None:
        """Write a rank's shard to its places in the whole."""
        shard, sizes = shard.T if self.transposed else shard, [end - begin for begin, end in self.ranges[rank]]
        for (begin, end), part in zip(self.ranges[rank], shard.split(sizes, self.dim), strict=True):
            whole.narrow(self.dim, begin, end - begin).copy_(part)

    def affine_map(self, whole: Sequence[int]) -> ParamAffineMap:
        """The same for DeepSpeed's universal checkpoints."""
        strides = _strides(whole)
        pieces: dict[int, list[AffinePiece]] = {}
        for rank, ranges in enumerate(self.ranges):
            shape = self.shape(whole, rank)
            inside = _strides(shape)[::-1] if self.transposed else _strides(shape)
            pieces[rank], at = [], 0
            for begin, end in ranges:
                piece = [*whole[: self.dim], end - begin, *whole[self.dim + 1 :]]
                offsets = begin * strides[self.dim], at * inside[self.dim]
                holders = self._holders()[begin, end]
                pieces[rank].append(AffinePiece(piece, offsets[0], strides, offsets[1], inside, holders))
                at += end - begin
        shapes = {rank: self.shape(whole, rank) for rank in range(len(self.ranges))}
        return ParamAffineMap(whole, shapes, pieces)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate([1, *reversed(shape[1:])], lambda a, b: a * b))[::-1]
