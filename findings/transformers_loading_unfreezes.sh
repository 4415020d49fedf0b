#!/usr/bin/env bash
# transformers 5.20.2 (torch 2.13.0), seen on 2026-11-30: `from_pretrained` makes every loaded weight trainable, those that
# the class itself freezes among them. Ernie 4.5 MoE's routing bias, which its class keeps from gradients, is trained by
# weight decay alone after loading, and RoFormer's sinusoidal table like any other embedding.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.20.2
"$work/venv/bin/python" - "$work" <<'PY'
import sys
from transformers import AutoConfig, AutoModelForCausalLM

shapes = {
    "ernie4_5_moe": dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, vocab_size=64, moe_num_experts=4, moe_k=2,
                         moe_layer_start_index=0),
    "roformer": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
                     is_decoder=True),
}
for kind, shape in shapes.items():
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    frozen = {name for name, weight in made.named_parameters() if not weight.requires_grad}
    made.save_pretrained(f"{sys.argv[1]}/{kind}")
    loaded = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{kind}")
    trained = {name for name, weight in loaded.named_parameters() if name in frozen and weight.requires_grad}
    print(f"{kind}: frozen by its class {sorted(frozen)}; trainable after loading {sorted(trained)}")
    assert frozen and trained == frozen, "it does not happen any more"
PY
