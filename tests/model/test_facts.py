"""What is read of a model: its shape, its parameters, its operations per token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TYPES
from tiny import tiny_shape
from transformers import AutoModelForCausalLM

from tp2d_helpers.config import ConfigError
from tp2d_helpers.demo import SHAPES
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.heads import Heads, answering_for_all
from tp2d_helpers.model.lora import targets
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.rehearsal import rehearse
from tp2d_helpers.model.shard import AllReduces
from tp2d_helpers.model.styles import COLUMN, ROW
from tp2d_helpers.speed.layers import decoder_layers

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)


def test_operations_of_a_dense_model_by_hand() -> None:
    """Qwen2.5-0.5B: 24 layers of 14,909,440 weights in matrices, and the tied head; 14 heads of 64."""
    facts = ModelFacts.of_shape(SHAPES["qwen2.5-0.5b"])
    layer = 896 * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864
    assert facts.matmul_parameters == 24 * layer + 896 * 151936
    assert facts.flops_per_token(512) == 6 * facts.matmul_parameters + 6 * 24 * 896 * 512


def test_attention_as_wide_as_its_heads() -> None:
    """Qwen3 has heads of 128 whatever its hidden size: 4 · 128 here, not 32."""
    facts = ModelFacts.of_shape(dict(model_type="qwen3", head_dim=128, **TINY))
    assert facts.flops_per_token(10) - facts.flops_per_token(0) == 6 * 2 * 4 * 128 * 10


def test_gpt2_keeps_its_matrices_in_another_class() -> None:
    """Of GPT-2's 124 million parameters, all but the positions, biases and norms are in matmuls (its head is tied)."""
    facts = ModelFacts.of_shape(dict(model_type="gpt2"))
    assert facts.matmul_parameters == 12 * 12 * 768 * 768 + 768 * 50257


@pytest.mark.parametrize("model_type, active", [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")])
def test_a_token_meets_some_of_the_experts(model_type: str, active: str) -> None:
    shape = dict(model_type=model_type, intermediate_size=48, moe_intermediate_size=48, num_experts_per_tok=2, **TINY)
    few, many = (ModelFacts.of_shape({**shape, active: experts}) for experts in (4, 8))
    router = 2 * 32 * 4
    assert many.matmul_parameters - few.matmul_parameters == router
    assert many.parameters > few.parameters + router


def test_facts_of_a_part() -> None:
    """Gemma 3's config has its text model's as a part."""
    text = dict(hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                intermediate_size=48, vocab_size=64)  # fmt: skip
    facts = ModelFacts.of_shape(dict(model_type="gemma3", text_config=text))
    assert (facts.layers, facts.hidden, facts.heads, facts.vocabulary) == (6, 32, 4, 64)


def test_parameters_are_those_of_the_model() -> None:
    facts = ModelFacts.of_shape(SHAPES["demo"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(facts.config)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())


PUBLISHED = {
    "mixtral-8x7b": dict(model_type="mixtral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
                         vocab_size=32000, tie_word_embeddings=False),
    "olmoe-1b-7b": dict(model_type="olmoe", hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
                        num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
                        vocab_size=50304, tie_word_embeddings=False),
}  # fmt: skip


@pytest.mark.parametrize("name, total, active", [
    ("qwen3-30b-a3b", 30.5, 3.3), ("mixtral-8x7b", 46.7, 12.9), ("olmoe-1b-7b", 6.9, 1.3), ("phi-4-mini", 3.84, 3.84),
    ("gemma-3-4b", 3.88, 3.88),
])  # fmt: skip
def test_published_numbers_of_parameters(name: str, total: float, active: float) -> None:
    """In 10⁹, with the embedding. Active ones are published with one decimal, cut or rounded."""
    facts = ModelFacts.of_shape((SHAPES | PUBLISHED)[name])
    assert facts.parameters / 1e9 == pytest.approx(total, rel=0.01)
    lookups = 0 if facts.tied else facts.hidden * facts.vocabulary
    assert (facts.matmul_parameters + lookups) / 1e9 == pytest.approx(active, abs=0.06)


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", TYPES)
def test_shard_of_every_type(family: Callable[..., Path], kind: str, tp_size: int) -> None:
    """Against the shapes that the plan gives the weights; at tp_size 8, ranks share key-value heads."""
    facts = ModelFacts.read(str(family(kind, **TYPES[kind])))
    try:
        plan = Plan.of(facts.meta, tp_size)
    except ConfigError:
        assert tp_size == 8
        pytest.skip("its key-value heads can't be shared")
    shard, shapes = facts.shard(tp_size), plan.shapes(facts.meta)
    assert shard.parameters == sum(shape.numel() for shape in shapes.values())
    matrices = matrices_of_layers(facts, shapes)
    assert sum(matmul.active for matmul in shard.layer_matmuls) == sum(matrices.values())
    if tp_size == 1:  # with the head, and Gemma 4's projection into the layers
        outside = facts.hidden * facts.vocabulary + getattr(facts.config, "hidden_size_per_layer_input", 0) * 2 * 64
        assert facts.matmul_parameters == sum(matrices.values()) + outside
    if kind != "gemma4_text":  # whose layers have 2 or 4 key-value heads
        assert set(plan.attention.values()) <= {(shard.heads, shard.key_value // facts.head_dim)}
    assert shard.query == shard.heads * facts.head_dim
    adapted = (shapes[f"{name}.weight"] for name in targets(facts.meta, "all-linear"))
    assert shard.adapters(8) == 8 * sum(map(sum, adapted))
    if tp_size > 1:
        # Routers are counted, too, and Gemma 4's projections of each layer's own embedding.
        loose = 0.3 if kind == "gemma4_text" else 0.15 if facts.experts[0] else 1e-9
        assert shard.mlp_in == pytest.approx(mlp_width(facts, plan, COLUMN) / facts.layers, rel=loose)
        assert shard.mlp_out == pytest.approx(mlp_width(facts, plan, ROW) / facts.layers, rel=loose)


def matrices_of_layers(facts: ModelFacts, shapes: dict[str, torch.Size]) -> dict[str, float]:
    """Name → elements that a token meets, of the decoder layers' matrices."""
    inside = {id(weight) for layer in decoder_layers(facts.meta) for weight in layer.parameters()}
    names = [name for name, weight in facts.meta.named_parameters() if id(weight) in inside and weight.ndim > 1]
    names = [name for name in names if not any(other in name for other in ("norm", "conv1d", "bias"))]
    share = {True: facts.experts[1] / max(1, facts.experts[0]), False: 1}
    return {name: shapes[name].numel() * share[len(shapes[name]) == 3] for name in names}


def mlp_width(facts: ModelFacts, plan: Plan, style: str) -> float:
    """Σ over the layers of what MLPs' first matrices make on a rank (`COLUMN`), or their last take (`ROW`)."""
    shapes, total = plan.shapes(facts.meta), 0.0
    for name, kind in plan.styles.items():
        if "att" not in name and kind == style:
            total += shapes[f"{name}.weight"][0 if style == COLUMN else 1]
        elif kind == "experts":
            own = f"{name}.gate_up_proj" if style == COLUMN else f"{name}.down_proj"
            total += facts.experts[1] * shapes[own][plan.cuts[own].dim]
    return total


@pytest.mark.parametrize("kind, expected", [
    ("llama", AllReduces(forward=4, blocks=4, columns=10)),
    ("phi3", AllReduces(forward=4, blocks=4, columns=4)),  # fused matrices
    ("opt", AllReduces(forward=4, blocks=4, columns=8)),  # one matrix into the MLP
    ("mixtral", AllReduces(forward=4, blocks=4, columns=8, numbers=2 * 2)),
    ("olmoe", AllReduces(forward=4, blocks=4, columns=8, numbers=2 * 2 + 2 * 2 * 2)),  # norms over heads of q and k
    ("glm4_moe", AllReduces(forward=5, blocks=5, columns=11, numbers=2)),  # a dense layer; one with a shared expert
])  # fmt: skip
def test_all_reduces_of_two_layers(family: Callable[..., Path], kind: str, expected: AllReduces) -> None:
    shape: dict[str, Any] = TYPES[kind]
    assert ModelFacts.read(str(family(kind, **shape))).shard(2).all_reduces == expected


def test_heads_that_layers_have_in_other_numbers() -> None:
    """Each layer's own count for ranks that divide them; DeepSpeed's reading of them leaves the facts' config alone."""
    facts = ModelFacts.of_shape(tiny_shape("gemma4_text", **TYPES["gemma4_text"]))
    heads = Heads.of(facts.config)
    assert heads.queries == (8,) and heads.key_values == (4, 2) and facts.key_value_heads == 3
    assert [heads.in_layer(layer) for layer in (0, 1)] == [(8, 4), (8, 2)]
    rehearse(facts.config, 2)
    assert "allow_global_per_layer_attribute_access" not in facts.config.to_dict()
    assert answering_for_all(facts.config).num_key_value_heads == 4
    with pytest.raises(
        ConfigError, match=r"divide the 8 and 12 attention heads, and divide the 2 and 4 .* possible are \[1, 2, 4\]$"
    ):
        Heads((12, 8), (4, 2)).check(3)
