"""What each rank holds of a weight: taken apart and put together, here and by DeepSpeed's universal checkpoints."""

from __future__ import annotations

import pytest
import torch

from tp2d_helpers.model.cuts import Cut

HALVES = Cut(0, (((0, 2), (6, 8)), ((2, 4), (8, 10)), ((4, 6), (10, 12))))  # of a fused [12, …], by 3 ranks
SHARED = Cut(0, (((0, 3),), ((0, 3),), ((3, 6),), ((3, 6),)))  # two ranks for each key-value head
CUTS = [
    (Cut.even(0, 7, 3), (7, 4)),  # a vocabulary that is not divisible
    (Cut.even(1, 6, 2), (4, 6)),
    (HALVES, (12, 5)),
    (HALVES, (12,)),  # its bias
    (SHARED, (6, 4)),
    (Cut(1, HALVES.ranges, transposed=True), (5, 12)),  # GPT-2's
    (Cut(0, HALVES.ranges, transposed=True), (12, 5)),
    (Cut(1, HALVES.ranges), (2, 12, 3)),  # experts
    (Cut(2, Cut.even(2, 6, 3).ranges), (2, 5, 6)),
]


@pytest.mark.parametrize("cut, shape", CUTS)
def test_a_weight_is_taken_apart_and_put_together(cut: Cut, shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape).float()
    shards = {rank: cut.take(whole, rank).contiguous() for rank in range(len(cut.ranges))}
    assert [shard.shape for shard in shards.values()] == [cut.shape(shape, rank) for rank in shards]
    again = torch.zeros(shape)
    for rank, shard in shards.items():
        cut.put(again, shard, rank)
    assert torch.equal(again, whole)
    described = cut.affine_map(shape)
    described.validate_coverage()
    assert torch.equal(described.rebuild(shards), whole)
    assert all(torch.equal(described.extract(whole, rank), shard) for rank, shard in shards.items())


def test_who_counts_a_shared_part() -> None:
    assert SHARED.copies == 2 and [SHARED.owns(rank) for rank in range(4)] == [True, False, True, False]
    assert HALVES.copies == 1 and all(HALVES.owns(rank) for rank in range(3))
    partly = Cut(0, (((0, 2), (4, 6)), ((2, 4), (4, 6))))  # queries of its own, keys that both have
    assert partly.partly_shared and not SHARED.partly_shared and not HALVES.partly_shared


def test_ranks_that_disagree_on_a_shared_part_are_not_put_together() -> None:
    shards = {rank: torch.full((3, 4), float(rank)) for rank in range(4)}
    with pytest.raises(ValueError, match=r"Ranks \[0, 1\] hold different data"):
        SHARED.affine_map((6, 4)).rebuild(shards)
