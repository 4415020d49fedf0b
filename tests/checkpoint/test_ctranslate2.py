"""CTranslate2's converter takes the exports of the types that it knows, and its engine gives their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import OLD, distance, environment, exports, logits, run
from families import TYPES

PACKAGE = "ctranslate2==4.8.5"
# Faults of its own, by the major version of transformers that it reads with: of a rope that is scaled it looks for
# `rope_theta` beside the factor, where version 4 hasn't got it; and GPT-NeoX' `rotary_pct` is no longer in version 5.
FAULTS = {("llama", "4"), ("gpt_neox", "5")}
# Without what it leaves out: windows shorter than a prompt, Gemma-2's caps; a llama3 rope is off by 4e-4.
# Phi and Phi-3 it reads by names that transformers 4.57 no longer has, Falcon by those of the first of its two layouts.
SHAPES: dict[str, dict[str, Any]] = {
    "opt": {},
    "gpt2": {},
    "gpt_neox": {},
    "gemma": {},
    "gemma2": dict(sliding_window=256, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3_text": dict(sliding_window=256),
    "llama": dict(rope_parameters=dict(rope_type="linear", rope_theta=5e5, factor=4.0)),
    "mistral": dict(sliding_window=None),
    "qwen2": dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    "qwen3": {},
    "falcon": dict(new_decoder_architecture=False, multi_query=True, num_kv_heads=1),
}  # fmt: skip


@pytest.mark.slow
def test_every_type_converts(tmp_path: Path) -> None:
    folders = exports({kind: TYPES[kind] | shape for kind, shape in SHAPES.items()}, tmp_path)
    script, expected = Path(__file__).with_name("to_ctranslate2.py"), {k: logits(path) for k, path in folders.items()}
    wrong = {}
    for version, packages in (("4", (*OLD, PACKAGE)), ("5", (PACKAGE,))):
        out = tmp_path / version
        out.mkdir()
        run(environment(*packages), out, *folders.values(), script=script)
        found = {kind: distance(torch.load(out / f"{kind}.pt"), expected[kind]) for kind in folders}
        wrong |= {(kind, version): d for kind, d in found.items() if isinstance(d, str) or d > 1e-5}
    assert wrong.keys() == FAULTS, wrong
