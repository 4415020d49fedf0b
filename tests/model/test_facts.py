"""What is read of a model: its shape, its parameters, its operations per token."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tp2d_helpers.demo import SHAPES
from tp2d_helpers.model.facts import ModelFacts

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
    assert (facts.layers, facts.hidden, facts.heads, facts.mlp, facts.vocabulary) == (6, 32, 4, 48, 64)


def test_parameters_are_those_of_the_model() -> None:
    facts = ModelFacts.of_shape(SHAPES["demo"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(facts.config)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
