"""Which layers of a class are cut how: its plan in `transformers`, completed and corrected.

The names of a plan say where a layer is; whether the plan is right is found by `rehearsal.py` and `proof.py`.
"""

from __future__ import annotations

import torch

from tp2d_helpers.config import ConfigError

COLUMN, ROW, GATHERED, PARTS = "colwise", "rowwise", "colwise_gather_output", "colwise_parts"
EXPERTS, NORM, HEADS = "experts", "norm_over_heads", "per_head"  # of modules that are no linear layers
# Styles of Hugging Face's plans that are not followed: gradients, experts, sinks and vocabularies have their own rules.
IGNORED = {"replicated_with_grad_allreduce", "embedding_rowwise", "packed_colwise", "moe_tp_experts", "local_params"}
LLAMA = {
    **{f"layers.*.self_attn.{name}_proj": COLUMN for name in "qkv"},
    **{f"layers.*.mlp.{name}_proj": COLUMN for name in ("gate", "up")},
    "layers.*.self_attn.o_proj": ROW,
    "layers.*.mlp.down_proj": ROW,
}
# Plans of types that have none of their own, or one that lacks something.
PLANS: dict[str, dict[str, str]] = {
    **dict.fromkeys(["stablelm", "nemotron", "hunyuan_v1_dense", "granitemoe", "gpt_oss"], LLAMA),
    "phimoe": LLAMA,
    "qwen2_moe": {
        **{f"layers.*.mlp.shared_expert.{name}_proj": COLUMN for name in ("gate", "up")},
        "layers.*.mlp.shared_expert.down_proj": ROW,
    },
    "opt": {
        **{f"decoder.layers.*.self_attn.{name}_proj": COLUMN for name in "qkv"},
        "decoder.layers.*.self_attn.out_proj": ROW,
        "decoder.layers.*.fc1": COLUMN,
        "decoder.layers.*.fc2": ROW,
    },
    "gpt2": {
        "h.*.attn.c_attn": PARTS,
        "h.*.attn.c_proj": ROW,
        "h.*.mlp.c_fc": COLUMN,
        "h.*.mlp.c_proj": ROW,
    },
    "falcon": {
        "h.*.self_attention.query_key_value": PARTS,
        "h.*.self_attention.dense": ROW,
        "h.*.mlp.dense_h_to_4h": COLUMN,
        "h.*.mlp.dense_4h_to_h": ROW,
    },
    "gpt_neox": {"layers.*.attention.query_key_value": PARTS},
}


def styles_of(model: torch.nn.Module) -> dict[str, str]:
    """Patterns of module names → style. Gathering is left out where the parts can stay divided.

    Raises:
        ConfigError: if the class has no plan and there is none here, or the plan has a style that is not known.
    """
    text, kind = model.config.get_text_config(), f"model_name: {model.config.model_type!r} can't be sharded by AutoTP: "
    config = text if getattr(text, "base_model_tp_plan", None) else model.config
    plan = {**(getattr(config, "base_model_tp_plan", None) or {}), **PLANS.get(text.model_type, {})}
    if not plan:
        raise ConfigError(
            f"{kind}its class has no tp_plan, and there is none for it here (there are for "
            f"{', '.join(sorted(PLANS))}). Take tp_size 1"
        )
    for name, style in plan.items():
        last = name.rpartition(".")[2]
        if style == GATHERED and last in ("qkv_proj", "gate_up_proj"):
            plan[name] = PARTS
        elif style == GATHERED and last in ("q_proj", "k_proj", "v_proj"):
            plan[name] = COLUMN
        elif style == "rowwise_split_input":
            plan[name] = ROW
    if unknown := sorted(set(plan.values()) - {COLUMN, ROW, GATHERED, PARTS} - IGNORED):
        raise ConfigError(f"{kind}its plan has the styles {unknown}, which are not known here. Take tp_size 1")
    return plan
