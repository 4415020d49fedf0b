"""Model types that are refused on the driver, text models that are a part, and layers at any depth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grid import Run, assert_equal_runs
from transformers import AutoConfig

from tp2d_helpers.config import ConfigError, make_config
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.rehearsal import rehearse
from tp2d_helpers.preflight.checks import check_model
from tp2d_helpers.speed import layers
from tp2d_helpers.speed.layers import decoder_layers

Train = Callable[..., Run]
UNLIKE = {  # fields by other names, and without dropout
    "opt": dict(ffn_dim=128, word_embed_proj_dim=64, dropout=0.0),
    "gpt2": dict(n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
REFUSED = {
    "bloom": "its class has no tp_plan",
    "doge": "broadcast a dimension of length 4",  # its attention masks by weights of its own for all heads
    "gpt_oss": "experts.gate_up_proj_bias is among its experts",
    "seed_oss": "it has dropout on attention heads",
}


@pytest.mark.parametrize("model_type, why", REFUSED.items())
def test_family_is_refused_on_the_driver(family: Callable[..., Path], model_type: str, why: str) -> None:
    """And trained at tp_size 1: its pass raises nothing there."""
    folder = str(family(model_type, **UNLIKE.get(model_type, {})))
    model, settings = ModelFacts.read(folder), dict(model_name=folder, dp_size=1, use_gpu=False, seq_length=64)
    with pytest.raises(ConfigError, match=f"^model_name: '{model_type}' can't be sharded by AutoTP.*{why}.*tp_size 1"):
        check_model(make_config(**settings, tp_size=2), model)
    assert "1 shard × 1 replica" in check_model(make_config(**settings, tp_size=1), model)[1]


@pytest.mark.parametrize("model_type, layers, why", [
    ("gemma3", 26, ""),
    ("mistral3", 40, ""),
    ("gemma4", 30, ""),
    ("llama4", 48, "'llama4_text' .* its plan has the styles"),
    ("qwen3_5", 32, ""),
])  # fmt: skip
def test_a_text_model_that_is_a_part(model_type: str, layers: int, why: str) -> None:
    """Of the published size, on the meta device: facts, and a pass of the text model, or a refusal, at tp_size 2."""
    model = ModelFacts.of(AutoConfig.for_model(model_type))
    assert model.layers == layers == len(decoder_layers(model.meta)) and model.part_of == model_type
    assert model.heads and model.head_dim and model.hidden > 1000
    with pytest.raises(ConfigError, match=why) if why else contextlib.nullcontext():
        rehearse(model.config, 2)
    rehearse(model.config, 1)
    assert model.flops_per_token(64) > 6 * model.hidden * model.vocabulary and model.shard(1).layer_matmuls


def test_facts_where_layers_differ() -> None:
    """Gemma 4's 25 layers of sliding attention have heads of 256, the 5 others of 512; state space models have none."""
    assert ModelFacts.of(AutoConfig.for_model("gemma4_text")).head_dim == round((25 * 256 + 5 * 512) / 30)
    mamba = ModelFacts.of(AutoConfig.for_model("mamba2"))
    assert mamba.heads == 0 and mamba.flops_per_token(64) == 6 * mamba.matmul_parameters


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "stablelm"])
def test_layers_at_any_depth_are_checkpointed(train: Train, family: Callable[..., Path], model_type: str) -> None:
    """OPT's layers hang in `model.decoder`, GPT-2's in `transformer.h`."""
    model, short = family(model_type, **UNLIKE.get(model_type, {})), dict(debug_steps=6, warmup_steps=2)
    run = train(model, dp_size=2, activation_checkpointing="full", patch=_count_checkpoints, **short)
    assert_equal_runs(run, train(model, **short))


def _count_checkpoints(names: dict[str, Any]) -> None:
    """A run whose layers are not checkpointed, in each of its passes, fails."""
    calls, whole, step = [], layers.checkpoint, names["train_step"]
    layers.checkpoint = lambda *args, **kwargs: (calls.append(1), whole(*args, **kwargs))[1]

    def train_step(engine: Any, micro_batches: list[dict]) -> Any:
        calls.clear()
        loss = step(engine, micro_batches)
        assert len(calls) == 2 * len(micro_batches)  # layers
        return loss

    names["train_step"] = train_step


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_loss_of_the_routers_is_refused_by_its_name(tp_size: int) -> None:
    """Of any size: Mixtral's is not tried on the CPU first."""
    large = ModelFacts.of(AutoConfig.for_model("mixtral", output_router_logits=True))
    with pytest.raises(ConfigError, match=r"'mixtral' adds its routers' loss .*output_router_logits = true.*set it to"):
        rehearse(large.config, tp_size)


def test_a_norm_of_each_head_is_refused_by_its_name(family: Callable[..., Path]) -> None:
    """StableLM-2-12B's: 96 parameters, which one rank's heads don't reach."""
    folder = str(family("stablelm", qk_layernorm=True, use_parallel_residual=True))
    settings, facts = dict(model_name=folder, dp_size=1, use_gpu=False, seq_length=64), ModelFacts.read(folder)
    check_model(make_config(**settings, tp_size=1), facts)
    why = r"self_attn\.q_layernorm\.norms has a module for each head: no rule\. Take tp_size 1"
    with pytest.raises(ConfigError, match=why):
        check_model(make_config(**settings, tp_size=2), facts)
