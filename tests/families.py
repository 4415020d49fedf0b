"""The model types that are proven equal to one process, with a tiny shape of each that has what sets it apart."""

from __future__ import annotations

from typing import Any

NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=64)
ROUTED = dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, **EXPERTS)
SPARSE = dict(mlp_layer_types=["dense", "sparse"])
SCALED = dict(embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=4,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
WINDOW = dict(sliding_window=32, layer_types=["sliding_attention", "full_attention"])
# What each adds to `tiny.TINY`: 2 layers, hidden size 64, 8 heads of 8, 4 key-value heads, MLP 176, 2,048 tokens.
TYPES: dict[str, dict[str, Any]] = {
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(tie_word_embeddings=True, head_dim=16),
    "qwen3_5_text": LINEAR,
    "llama": {},
    "mistral": dict(sliding_window=32),
    "ministral3": dict(intermediate_size=177, vocab_size=2049),  # which 2 and 4 do not divide
    "gemma": dict(head_dim=16),
    "gemma2": dict(head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                   **WINDOW),
    "gemma3_text": dict(head_dim=16, query_pre_attn_scalar=16, **WINDOW),
    "phi": dict(partial_rotary_factor=0.5),
    "phi3": dict(partial_rotary_factor=0.5, tie_word_embeddings=True),
    "olmo": dict(clip_qkv=0.2),
    "olmo2": {},
    "olmo3": WINDOW,
    "smollm3": {},
    "granite": SCALED,
    "cohere": dict(use_qk_norm=True, tie_word_embeddings=True),
    "cohere2": WINDOW,
    "glm": dict(partial_rotary_factor=0.5),
    "glm4": dict(partial_rotary_factor=0.5, attention_bias=True),
    "stablelm": dict(use_qkv_bias=True),
    "starcoder2": {},
    "gpt_neox": dict(hidden_dropout=0.0, attention_dropout=0.0),
    "exaone4": WINDOW,
    "apertus": {},
    "arcee": {},
    "helium": {},
    "ernie4_5": {},
    "nanochat": {},
    "nemotron": {},
    "hunyuan_v1_dense": {},
    "seed_oss": dict(attention_dropout=0.0, residual_dropout=0.0),
    "gpt2": dict(n_positions=256, **NO_DROPOUT),
    "opt": dict(ffn_dim=128, word_embed_proj_dim=64, dropout=0.0),
    "cwm": WINDOW,
    "ministral": WINDOW,
    "hyperclovax": SCALED,
    "jais2": {},
    "hrm_text": {},
    "gemma4_text": dict(head_dim=8, global_head_dim=16, num_global_key_value_heads=2, attention_k_eq_v=True,
                        hidden_size_per_layer_input=8, vocab_size_per_layer_input=2048, **WINDOW),
    "gemma4_unified_text": dict(head_dim=8, global_head_dim=16, **WINDOW),
    "falcon": dict(new_decoder_architecture=True, num_kv_heads=4, bias=True, alibi=False),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=32, intermediate_size=64),
    "qwen2_moe": dict(num_experts=4, shared_expert_intermediate_size=48, mlp_only_layers=[1], **EXPERTS),
    "qwen3_moe": dict(num_experts=4, head_dim=16, norm_topk_prob=True, **EXPERTS),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2, intermediate_size=64, clip_qkv=0.2),
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=64),
    "phimoe": dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=64, router_jitter_noise=0.0),
    "glm4_moe": ROUTED,
    "dots1": ROUTED,
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=64, moe_layer_start_index=1),
    "aria_text": dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, intermediate_size=64),
    "flex_olmo": dict(num_experts=4, num_experts_per_tok=2, intermediate_size=64),
    "cohere2_moe": dict(num_experts=4, num_experts_per_tok=2, intermediate_size=64, **WINDOW),
    "granitemoe_swa": dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=64, **WINDOW),
    "hy_v3": dict(num_experts=4, **SPARSE, **EXPERTS),
    "kolibri1": dict(num_experts=4, shared_expert_intermediate_size=48, **EXPERTS, **WINDOW),
    "mellum": dict(num_experts=4, **SPARSE, **EXPERTS, **WINDOW),
    "minimax_m2": dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=64),
    "qwen3_next": dict(num_experts=4, shared_expert_intermediate_size=48, **EXPERTS, **LINEAR),
    "qwen3_5_moe_text": dict(num_experts=4, shared_expert_intermediate_size=48, **EXPERTS, **LINEAR),
    "granite_swa": {},
    "vaultgemma": {},
}  # fmt: skip
