"""Ropes that depend on the length: equal to one process on both sides of the length that they were made for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import TYPES
from grid import Run, assert_equal_runs
from tiny import tiny_shape
from transformers import AutoConfig

from tp2d_helpers.config import ConfigError, make_config
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.rehearsal import rehearse
from tp2d_helpers.model.ropes import check_lengths
from tp2d_helpers.preflight.checks import check_model

FACTORS = dict(short_factor=[1.1, 1.2, 1.3, 1.4], long_factor=[2.0, 3.0, 4.0, 5.0], rope_theta=1e4)


def longrope(original: int, **more: Any) -> dict[str, Any]:
    rope = dict(rope_type="longrope", original_max_position_embeddings=original, **FACTORS, **more)
    return dict(rope_parameters=rope, original_max_position_embeddings=original)


SHAPES = {
    "phi3, long": ("phi3", dict(partial_rotary_factor=1.0, **longrope(32))),
    "phi3, short": ("phi3", dict(partial_rotary_factor=1.0, **longrope(128))),
    "phimoe": ("phimoe", longrope(32, short_mscale=1.1, long_mscale=1.2)),
    "llama": ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4))),
}


@pytest.mark.parametrize("case", SHAPES)
def test_equal_to_one_process(train: Callable[..., Run], family: Callable[..., Path], case: str) -> None:
    kind, shape = SHAPES[case]
    model = family(kind, **(TYPES[kind] | shape))
    config = make_config(model_name=str(model), use_gpu=False, tp_size=2, dp_size=1, seq_length=64)
    check_model(config, ModelFacts.read(str(model)))
    short = dict(debug_steps=4, warmup_steps=1)
    run = train(model, **short, tp_size=2)
    assert_equal_runs(run, train(model, **short))
    if case == "phi3, long":  # and the rope is what it says
        other = train(family(kind, **(TYPES[kind] | SHAPES["phi3, short"][1])), **short)
        assert abs(other.losses()[0] - run.losses()[0]) > 1e-4


def test_of_the_published_size() -> None:
    """Phi-3.5-MoE is tried without storage, at any tp_size: 2 of its layers have 2.6 billion parameters."""
    rope = longrope(4096, short_mscale=1.24, long_mscale=1.24)
    rope["rope_parameters"] |= dict(short_factor=[1.0] * 64, long_factor=[2.0] * 64)
    config = AutoConfig.for_model("phimoe", router_jitter_noise=0.0, **rope)
    for tp_size in (1, 2):
        rehearse(config, tp_size)


def test_packed_documents_beyond_the_original_length() -> None:
    config = AutoConfig.for_model(**tiny_shape("phi3", **TYPES["phi3"] | SHAPES["phi3, long"][1]))
    check_lengths(config, 32)
    with pytest.raises(ConfigError, match=r"^packing = 'documents': 'phi3'.*\(longrope: .* is 64\)\. .* up to 32"):
        check_lengths(config, 64)
    check_lengths(AutoConfig.for_model("llama"), 64)


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("apertus", dict(rope_scaling=None, rope_theta=5e5), '"rope_theta": 500000.0, "rope_type": "default"} by'),
        ("apertus", dict(rope_scaling=None), '"rope_theta": 12000000.0, "rope_type": "default"} by'),
        ("apertus", dict(rope_theta=5e5), '"rope_type": "llama3", "rope_theta": 500000.0'),
        ("ministral3", dict(rope_scaling=None, rope_theta=1e6), "rope_theta 1000000.0, rope_scaling null): its"),
        ("cohere", {}, "('cohere': no rope_theta): its rope is {\"rope_theta\": 10000.0"),
        ("olmo3", dict(rope_scaling=None), '"rope_theta": 10000.0, "rope_type": "default"} by'),
    ],
)
def test_what_transformers_5_reads_otherwise_than_4(tmp_path: Path, kind: str, fields: dict, message: str) -> None:
    """Its own default, where the file has something else. What was meant, and is then said, is read."""
    shape = tiny_shape(kind, **TYPES[kind], **fields)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shape))
    with pytest.raises(ConfigError, match=f"^model_name = .*config.json .*{re.escape(message)}") as refusal:
        ModelFacts.read(str(tmp_path))
    meant = json.loads(re.search(r"its rope is (.*?) by tr", str(refusal.value))[1])
    added = meant["rope_theta"] if str(refusal.value).endswith("'rope_theta'") else meant
    path.write_text(json.dumps(shape | {"rope_theta" if added is not meant else "rope_parameters": added}))
    rope = ModelFacts.read(str(tmp_path)).config.rope_parameters
    assert rope.get("full_attention", rope).items() >= meant.items()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("fields", [{}, dict(rope_scaling=None), dict(rope_scaling=None, rope_theta=5e5)])
def test_what_both_read_alike(tmp_path: Path, kind: str, fields: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_shape(kind, **TYPES[kind], **fields)))
    ModelFacts.read(str(tmp_path))
