"""Every model type equals one process on every grid: losses, gradient norms, and each weight on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import TYPES
from grid import Run, assert_equal_runs, differences

Train = Callable[..., Run]
GRIDS = {"2×1": dict(tp_size=2), "2×2": dict(tp_size=2, dp_size=2), "4×1": dict(tp_size=4)}
SHARED = {"8×1": dict(tp_size=8)}  # two ranks share each key-value head
# One of each kind of plan, at the grid that tells most. `--all-types` takes all of them at all grids.
USUAL = {
    "qwen3_5_text": "2×1", "gemma2": "2×2", "phi3": "2×2", "olmo2": "4×1", "cohere": "2×1", "gpt_neox": "2×1",
    "apertus": "2×1", "olmo": "2×2", "gpt2": "2×2", "falcon": "2×1", "granite_swa": "2×1", "qwen2_moe": "2×1",
    "qwen3_moe": "2×2", "ministral3": "2×2", "gemma4_text": "2×2", "smollm3": "8×1",
}  # fmt: skip


def cases(everything: bool) -> list[tuple[str, str]]:
    """(type, grid) that are trained."""
    usual = list(USUAL.items())
    return [(kind, grid) for kind in TYPES for grid in GRIDS] + usual[-1:] if everything else usual


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind, grid", cases(metafunc.config.getoption("--all-types")))


def test_equals_one_process(
    train: Train, family: Callable[..., Path], matrix: list[tuple[str, ...]], kind: str, grid: str
) -> None:
    model, short = family(kind, **TYPES[kind]), dict(debug_steps=8, warmup_steps=2)
    run, reference = train(model, **short, **(GRIDS | SHARED)[grid]), train(model, **short)
    loss, norm, weight = differences(run, reference)
    matrix.append((kind, grid, f"{loss:.0e}", f"{norm:.0e}", f"{weight:.0e}"))
    assert_equal_runs(run, reference)
    assert run.sharded and not any(run.sharded.values())
