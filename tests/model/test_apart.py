"""Models that keep packed documents apart are told from those that don't, on the driver, on random weights."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from tp2d_helpers.config import ConfigError
from tp2d_helpers.model import apart
from tp2d_helpers.model.apart import check_apart, why_masked
from tp2d_helpers.model.small import small_model

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, vocab_size=600)  # fmt: skip


def config_of(kind: str, **more: Any) -> transformers.PretrainedConfig:
    return AutoConfig.for_model(kind, **{**SMALL, **more})


@pytest.mark.parametrize("kind, more, by", [
    ("llama", {}, "by flash attention"),
    ("qwen2", {}, "by flash attention"),
    ("mistral", dict(sliding_window=512), "by flash attention"),
    ("gemma3_text", dict(num_hidden_layers=6, sliding_window=512), "by flash attention"),
    ("mixtral", dict(num_local_experts=4), "by flash attention"),  # tokens of all documents go to the same experts
    ("qwen2", dict(attention_dropout=0.1), r"by a mask \(dropout\)"),
    ("gemma2", {}, r"by a mask \(softcap\)"),
    ("llama", dict(head_dim=12), r"by a mask \(heads of 12\)"),
    ("llama4_text", dict(num_local_experts=2, intermediate_size_mlp=64, attention_chunk_size=16),
     r"by a mask \(masks have windows of .*16.*, attention of \{None\}\)"),
])  # fmt: skip
def test_by_what(kind: str, more: dict[str, Any], by: str) -> None:
    assert re.fullmatch(by, check_apart(config_of(kind, **more), "bf16", use_gpu=True))


def test_by_a_mask_without_half_precision() -> None:
    by = "by a mask (flash attention computes in bf16 or fp16)"
    assert check_apart(config_of("llama"), "fp32", use_gpu=True) == by
    assert check_apart(config_of("llama"), "fp32", use_gpu=False) == "by a mask"


@pytest.mark.parametrize("kind, more", [
    ("mamba", dict(state_size=8)), ("mamba2", dict(num_heads=8)),  # state spaces
    ("qwen3_next", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                        shared_expert_intermediate_size=32, num_hidden_layers=4)),  # linear attention
    ("lfm2", dict(layer_types=["conv", "full_attention"])),
    ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2)),  # in transformers 5.20 its masks get no positions
    ("bloom", {}),  # numbers positions itself
])  # fmt: skip
def test_refused(kind: str, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"packing = 'documents': '{kind}' can't .* Take packing = False, or True"):
        check_apart(config_of(kind, **more), "bf16", use_gpu=True)


def test_a_kernel_that_mixes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on the GPU is compared, too: here it takes the sample for one document, or forgets a window."""
    whole = lambda batch_size, q_length, **_: torch.tensor([0, batch_size * q_length], dtype=torch.int32)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setitem(transformers.AttentionMaskInterface._global_mapping, "documents", whole)
        with pytest.raises(ConfigError, match="changing one changes another's logits"):
            check_apart(config_of("llama"), "bf16", use_gpu=True)
    attend = apart.documents.attend
    forgetful = lambda *args, sliding_window=None, **more: attend(*args, **more)  # noqa: E731
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "documents", forgetful)
    with pytest.raises(ConfigError, match="flash attention gives other logits than a mask"):
        check_apart(config_of("mistral", sliding_window=512), "bf16", use_gpu=True)


def test_the_trial_is_affordable() -> None:
    """At the width of Qwen2-7B, with all of its vocabulary and layers cut away but two; nobody waits for 30 GB."""
    shape = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                 num_key_value_heads=4, vocab_size=152064)  # fmt: skip
    config = AutoConfig.for_model("qwen2", **shape)
    model = small_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 10**8
    assert config.vocab_size == 152064 and config.num_hidden_layers == 28, "the user's is left as it is"
    assert why_masked(config, torch.bfloat16) == ""


@pytest.mark.parametrize("kind, dtype, capability, by", [
    ("llama", torch.bfloat16, (9, 0), "documents"), ("llama", torch.float16, (8, 0), "documents"),
    ("llama", torch.float32, (9, 0), "sdpa"), ("llama", torch.float16, (7, 5), "sdpa"),
    ("gemma2", torch.bfloat16, (9, 0), "sdpa"),
])  # fmt: skip
def test_what_a_rank_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, dtype: torch.dtype,
    capability: tuple[int, int], by: str,
) -> None:  # fmt: skip
    """With a GPU of that kind, by the same rule as the driver's word; an export knows nothing of it."""
    model = AutoModelForCausalLM.from_config(config_of(kind, pad_token_id=0), dtype=dtype)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(apart.dist, "get_rank", lambda: 0)
    apart.keep_documents_apart(model)
    assert model.config._attn_implementation == model.model.config._attn_implementation == by
    assert "documents" not in model.config.to_json_string()
    assert ("documents are kept apart by a mask: rank 0: " in capsys.readouterr().out) == (by == "sdpa")
