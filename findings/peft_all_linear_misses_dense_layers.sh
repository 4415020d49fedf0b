#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.20.2 (torch 2.13.0), seen on 2026-12-01: `target_modules="all-linear"` on a mixture that has
# dense layers and shared experts beside the routed ones (GLM-4.5, dots.1, Ernie 4.5 MoE). Their gate_proj, up_proj and
# down_proj get no adapter: peft takes these names for the routed experts alone, and adapts those and the router instead. It
# warns of patterns of ranks, not of that. In Qwen2-MoE the dense layers and shared experts get adapters, and no expert does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.20.2 peft==0.21.2
"$work/venv/bin/python" - <<'PY'
import peft
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              vocab_size=64, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
ROUTED = dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)
SHAPES = {"glm4_moe": ROUTED, "dots1": ROUTED,
          "qwen2_moe": dict(num_experts=4, shared_expert_intermediate_size=16, mlp_only_layers=[0])}


def adapted(kind: str) -> set[str]:
    """The modules that peft gives adapters, without the number of their layer."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **SHAPES[kind]))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    names = (name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name)
    return {name.partition(".layers.")[2].partition(".")[2] for name in names}


for kind in SHAPES:
    found = adapted(kind)
    print(f"{kind}: {', '.join(sorted(found))}")
    experts, dense = "mlp.experts" in found, "mlp.down_proj" in found
    assert (experts, dense) == ((False, True) if kind == "qwen2_moe" else (True, False)), "it does not happen any more"
PY
