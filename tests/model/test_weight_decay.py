"""AdamW's two parameter groups: matrices decay, norms and biases don't, at every grid, ZeRO stage and step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TYPES
from grid import Run, assert_equal_runs
from plain import decaying, plain_run
from tiny import tiny_shape

from tp2d_helpers.demo import build_model
from tp2d_helpers.model.decay import parameter_groups
from tp2d_helpers.model.engine import load_model
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.rehearsal import rehearse

Train = Callable[..., Run]
# Of tp_size 1 alone: what has weights of two dimensions or more that multiply nothing, or in a class of their own.
MORE: dict[str, dict[str, Any]] = {
    "falcon_mamba": {},
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2),
    "jamba": dict(num_experts=4, expert_layer_offset=0, expert_layer_period=1, attn_layer_offset=1, attn_layer_period=2,
                  use_mamba_kernels=False),
    "jetmoe": dict(kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    "kimi_linear": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "mamba": {},
    "recurrent_gemma": dict(num_hidden_layers=3, lru_width=64, attention_window_size=32),
    "roformer": dict(is_decoder=True),
    "rwkv": dict(attention_hidden_size=64),
}  # fmt: skip
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


@pytest.mark.parametrize("kind", [*TYPES, *MORE])
def test_what_decays(kind: str) -> None:
    """Of every type, as the classes of its modules say; whatever the dimensions and names."""
    model = ModelFacts.of_shape(tiny_shape(kind, **(TYPES | MORE)[kind]))
    weights = {name: p for name, p in model.meta.named_parameters() if p.requires_grad}
    for tp_size in (1, 2) if kind not in MORE else (1,):
        groups = parameter_groups(model.meta, rehearse(model.config, tp_size).undecayed, 0.5)
        rates = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        wanted = dict.fromkeys(weights, 0.0) | dict.fromkeys(decaying(model.meta), 0.5)
        assert {name: rates[id(p)] for name, p in weights.items()} == wanted and len(rates) == len(weights)


@pytest.mark.parametrize("kind, tp_size", [("cohere", 1), ("cohere", 2), ("ernie4_5_moe", 1), ("ernie4_5_moe", 2),
                                           ("apertus", 2), ("glm4_moe", 2), ("qwen3_5_text", 2)])  # fmt: skip
def test_families_equal_pytorch_alone(train: Train, family: Callable[..., Path], kind: str, tp_size: int) -> None:
    """Norms [heads, head_dim], a bias [1, experts] that its class freezes, weights of an activation, routers."""
    run = train(family(kind, **TYPES[kind]), **DECAY, tp_size=tp_size, debug_steps=6, warmup_steps=2)
    assert_equal_runs(run, plain_run(run.config))


@pytest.mark.parametrize("kind, frozen", [("ernie4_5_moe", "e_score_correction_bias"), ("roformer", "embed_positions")])
def test_what_a_class_freezes_stays_frozen(family: Callable[..., Path], kind: str, frozen: str) -> None:
    """`from_pretrained` takes each weight that it loads for one to train."""
    model = load_model(str(family(kind, **(TYPES | MORE)[kind])), torch.float32)
    still = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert len(still) == 1 and frozen in still[0]


def test_groups() -> None:
    model = torch.nn.ModuleDict({
        "experts": torch.nn.ParameterList([torch.zeros(2, 3, 4)]),
        "linear": torch.nn.Linear(3, 4),
        "norm": torch.nn.LayerNorm(4),
        "scale": torch.nn.ParameterList([torch.tensor(1.0)]),
        "frozen": torch.nn.Linear(2, 2).requires_grad_(False),
    })  # fmt: skip
    groups = parameter_groups(model, {"experts.0"}, 0.3)
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [
        [(4, 3)],
        [(2, 3, 4), (4,), (4,), (4,), ()],
    ]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    (only,) = parameter_groups(torch.nn.Linear(2, 2, bias=False), (), 0.01)  # DeepSpeed can't do with an empty one
    assert only["weight_decay"] == 0.01
