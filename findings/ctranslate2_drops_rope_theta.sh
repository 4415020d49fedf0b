#!/usr/bin/env bash
# CTranslate2 4.8.5 with transformers 4.57.6 (torch 2.13.0), seen on 2026-12-01: of a Llama whose rope is scaled, its converter
# takes `rope_theta` from within `rope_scaling`, where only transformers 5 has it, and where it is missing 10,000. The
# published config.json of Llama 3.1 has 500,000 beside it. With transformers 5.20.2 the same folder keeps its base.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 ctranslate2==4.8.5 transformers==4.57.6
cat > "$work/base.py" <<'PY'
import transformers
from ctranslate2.converters.transformers import _MODEL_LOADERS
from transformers import LlamaConfig, LlamaForCausalLM

rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
                     max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=rope)
spec = _MODEL_LOADERS["LlamaConfig"].get_model_spec(LlamaForCausalLM(config))
base = float(spec.decoder.layer[0].self_attention.rotary_base)
print(f"transformers {transformers.__version__}: rope_theta 500000 in config.json, {base:.0f} in CTranslate2")
expected = 10000 if transformers.__version__.startswith("4.") else 500000
assert base == expected, "it does not happen any more"
PY
"$work/venv/bin/python" "$work/base.py"
"$work/venv/bin/pip" install -q transformers==5.20.2
"$work/venv/bin/python" "$work/base.py"
