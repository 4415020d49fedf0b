"""Head and loss in chunks of positions: equal to whole logits, on every grid and whatever is done to the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grid import Run, assert_equal_runs

from tp2d_helpers.speed import cross_entropy

Train = Callable[..., Run]
SHORT = dict(debug_steps=6, warmup_steps=2)


def in_chunks(names: dict[str, Any]) -> None:
    """For `train(patch=)`: chunks of 43 or 42 of the 256 positions. A run with a micro-batch without them fails."""
    cross_entropy.ROWS = 43
    calls, whole, step = [], cross_entropy.HeadLoss.forward, names["train_step"]
    cross_entropy.HeadLoss.forward = staticmethod(lambda *args: (calls.append(1), whole(*args))[1])

    def train_step(engine: Any, micro_batches: list[dict]) -> Any:
        calls.clear()
        loss = step(engine, micro_batches)
        assert len(calls) == len(micro_batches)
        return loss

    names["train_step"] = train_step


@pytest.mark.parametrize("model", ["qwen2-tied", "llama"])
@pytest.mark.parametrize("grid", [
    dict(), dict(tp_size=2), dict(tp_size=4, zero_stage=2),
    dict(tp_size=2, dp_size=2, zero_stage=0),
], ids=str)  # fmt: skip
def test_equals_whole_logits(train: Train, model: str, grid: dict[str, Any]) -> None:
    """With a tied head the gradient of its weight is added to the embedding's."""
    assert_equal_runs(train(model, patch=in_chunks, **grid, **SHORT), train(model, optimizations="none", **SHORT))
