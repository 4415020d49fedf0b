"""The ranks of the lesson's experiments."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray
import torch
import torch.distributed as dist

from tp2d_helpers.lesson import on_ranks


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """On a machine where mpirun started the notebook's server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "7")
        ray.init(num_cpus=1, num_gpus=0, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        yield
        ray.shutdown()


def test_ranks_reduce_together_and_answer_in_order() -> None:
    def ask(rank: int) -> tuple[int, int, float, str | None]:
        total = torch.tensor(float(rank + 1))
        dist.all_reduce(total)
        return rank, dist.get_world_size(), total.item(), os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK")

    expected = [(rank, 3, 6.0, None) for rank in range(3)]
    assert on_ranks(ask, 3) == expected, "more ranks than the cluster has cores"


def test_an_error_is_passed_on() -> None:
    def fail(rank: int) -> None:
        raise LookupError(f"rank {rank} has none")

    with pytest.raises(LookupError, match="rank 0 has none"):
        on_ranks(fail, 1)
