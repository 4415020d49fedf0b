"""The proof on the driver: it passes what is equal to one process, and finds each fault that a plan can have."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from tp2d_helpers.config import ConfigError, make_config
from tp2d_helpers.model import divide, lora, plan
from tp2d_helpers.model.proof import prove
from tp2d_helpers.model.rehearsal import Rehearsal, rehearse

TINY = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            head_dim=8, vocab_size=2048, max_position_embeddings=256, pad_token_id=None)  # fmt: skip


def tiny(model_type: str, **shape: Any) -> PretrainedConfig:
    """The config of a tiny model."""
    return AutoConfig.for_model(model_type, **TINY | shape)


def proved(config: PretrainedConfig, tp_size: int = 2, **settings: Any) -> None:
    """By the default settings but these."""
    prove(config, tp_size, rehearse(config, tp_size), make_config(tp_size=tp_size, **settings).model_dump())


@pytest.mark.parametrize("model_type, tp_size", [("qwen3", 4), ("glm4", 2), ("olmo2", 8), ("starcoder2", 2)])
def test_what_is_equal_passes(model_type: str, tp_size: int) -> None:
    proved(tiny(model_type), tp_size)


@pytest.mark.parametrize("settings", [
    dict(optimizations="none"), dict(activation_checkpointing="full"), dict(zero_stage=3), dict(lora_rank=4),
    dict(lora_rank=4, lora_targets="q_proj,down_proj", activation_checkpointing="auto"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tp_size", [1, 8])
def test_what_is_equal_by_other_settings(settings: dict[str, Any], tp_size: int) -> None:
    proved(tiny("qwen3"), tp_size, **settings)


@pytest.mark.parametrize("settings, named", [
    (dict(), "view and is being modified inplace"), (dict(optimizations="none"), ""), (dict(zero_stage=3), ""),
    (dict(lora_rank=4), ""),
], ids=str)  # fmt: skip
def test_the_proof_runs_what_the_run_runs(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], named: str
) -> None:
    """OLMo clips queries in place: a fault of the layers that share a matmul, which not every run has."""
    monkeypatch.setattr(torch, "unsafe_split_with_sizes", torch.split_with_sizes)
    with pytest.raises(ConfigError, match=named) if named else contextlib.nullcontext():
        proved(tiny("olmo", clip_qkv=0.2), **settings)


def test_an_adapter_whose_gradient_is_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "sum_over", lambda group, gradient: gradient)
    with pytest.raises(ConfigError, match=r"gradient of model.layers.0.self_attn.q_proj_lora.A would be another"):
        proved(tiny("qwen3"), lora_rank=4)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_layer_that_changes_what_it_is_given(monkeypatch: pytest.MonkeyPatch, tp_size: int) -> None:
    """Recomputed from that, it is another layer."""
    forward = LlamaDecoderLayer.forward

    def changing(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = hidden_states.clone()
        hidden_states.data.mul_(0.5)
        return forward(self, given, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", changing)
    proved(tiny("llama"), tp_size)
    with pytest.raises(ConfigError, match=r"gradient of .* would be another"):
        proved(tiny("llama"), tp_size, activation_checkpointing="full")


def test_a_gradient_that_is_not_summed() -> None:
    with pytest.raises(ConfigError, match=r"gradient of model.layers.0.self_attn.q_norm.weight would be another"):
        prove(tiny("qwen3"), 2, Rehearsal(summed=[]))


def test_a_fused_matrix_that_is_cut_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan._Planner, "_parts", lambda self, name, size, style: [(size, 1)])
    with pytest.raises(ConfigError, match=r"'glm4' can't be sharded .* its loss would be .* Take tp_size 1"):
        proved(tiny("glm4"))


def test_shared_heads_whose_gradients_are_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divide, "sum_copies", lambda group, cut, whole, rank, gradient: gradient)
    with pytest.raises(ConfigError, match=r"gradient of model.layers.0.self_attn.k_proj.weight would be another"):
        proved(tiny("llama"), 8)


def test_a_norm_over_the_heads_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divide, "_norm_over_heads", lambda group, width, copies, norm, args, output: output)
    with pytest.raises(ConfigError, match=r"'olmo2' .* its loss would be"):
        proved(tiny("olmo2"))


def test_experts_whose_inputs_gradient_is_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divide, "_enter", lambda group, module, args, kwargs: None)
    with pytest.raises(ConfigError, match=r"'mixtral' .* the gradient of model"):
        proved(tiny("mixtral", intermediate_size=64, num_local_experts=4, num_experts_per_tok=2))


def test_a_class_whose_code_knows_where_a_feature_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan is wrong here, nor any shape: only numbers tell that a rank's first feature is not the whole's first."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(y * torch.linspace(1, 2, y.shape[-1], device=y.device, dtype=y.dtype))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(ConfigError, match=r"its loss would be .* in one process, tried with random weights"):
        proved(tiny("llama"))


def test_a_rank_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from tp2d_helpers.model import proof

    loss_on = proof._loss_on
    monkeypatch.setattr(proof, "_loss_on", lambda rank, model, ids: loss_on(rank, model if rank.rank else None, ids))
    with pytest.raises(ConfigError, match="can't be sharded"):
        proved(tiny("llama"))
