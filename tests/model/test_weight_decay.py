"""AdamW's two parameter groups: matrices decay, norms and biases don't, at every grid, ZeRO stage and step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from grid import Run, assert_equal_runs
from plain import plain_run

from tp2d_helpers.demo import build_model
from tp2d_helpers.model.engine import _optimizer

Train = Callable[..., Run]
DECAY = dict(weight_decay=0.5)  # in 20 steps, ten learning rates of a norm's 1.0


@pytest.mark.parametrize("zero_stage, tp_size, dp_size, settings", [
    (1, 1, 1, {}), (1, 2, 2, {}), (2, 2, 2, dict(gradient_accumulation_steps=2)), (3, 2, 2, {}), (2, 2, 1, {}),
    (1, 1, 2, dict(optimizations="none")),
], ids=str)  # fmt: skip
def test_equals_pytorch_alone(train: Train, zero_stage: int, tp_size: int, dp_size: int, settings: dict) -> None:
    """Qwen2 has biases on its column-wise layers, and norms that every rank holds."""
    run = train("qwen2-untied", zero_stage=zero_stage, tp_size=tp_size, dp_size=dp_size, **DECAY, **settings)
    assert_equal_runs(run, plain_run(run.config))


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A model of two features: all its norms together have ten weights."""
    shape = dict(model_type="llama", hidden_size=2, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
                 num_key_value_heads=1, head_dim=2, vocab_size=2048, max_position_embeddings=256)  # fmt: skip
    build_model(shape, tmp_path / "narrow", dtype=torch.float32)
    return tmp_path / "narrow"


@pytest.mark.parametrize("zero_stage, optimizations", [(1, "auto"), (2, "none")])
def test_a_partition_of_padding_only(train: Train, narrow: Path, zero_stage: int, optimizations: str) -> None:
    """Ten weights, two at a time, among four DP ranks: 4, 4, 2 and none."""
    settings = dict(**DECAY, zero_stage=zero_stage, optimizations=optimizations)
    run = train(narrow, dp_size=4, **settings)
    assert_equal_runs(run, plain_run(run.config))


def test_groups() -> None:
    model = torch.nn.ModuleDict({
        "experts": torch.nn.ParameterList([torch.zeros(2, 3, 4)]),
        "linear": torch.nn.Linear(3, 4),
        "norm": torch.nn.LayerNorm(4),
        "scale": torch.nn.ParameterList([torch.tensor(1.0)]),
        "frozen": torch.nn.Linear(2, 2).requires_grad_(False),
    })  # fmt: skip
    optimizer = _optimizer(model, dict(weight_decay=0.3))
    shapes = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    assert shapes == [[(2, 3, 4), (4, 3)], [(4,), (4,), (4,), ()]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    (only,) = _optimizer(torch.nn.Linear(2, 2, bias=False), {}).param_groups  # DeepSpeed can't do with an empty one
    assert only["weight_decay"] == 0.01
