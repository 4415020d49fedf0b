"""Ropes: those that depend on the length of what is read (Phi-3-128k, dynamic ones), and those that are misread."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
import transformers

from tp2d_helpers.config import ConfigError

# Of classes that had another `rope_theta` by default in transformers 4 (4.57.6) than they have in 5 (5.20.2).
THETAS_OF_4 = {"cohere": 1e4, "olmo3": 1e4, "falcon_h1": 1e5, "fuyu": 25e3, "persimmon": 25e3}


def fix_ropes(model: torch.nn.Module) -> None:
    """Let the ropes of a model without storage not ask for lengths, which it has none of. Shapes stay as they are."""
    for module in model.modules():
        kind, config = getattr(module, "rope_type", None), getattr(module, "config", None)
        if not _by_length(kind) or not isinstance(config, transformers.PretrainedConfig):
            continue
        module.rope_type = _default(kind)
        module.config = copy.deepcopy(config)  # some classes look there
        for rope in _ropes(module.config):
            rope["rope_type"] = "default"


def check_lengths(hf_config: transformers.PretrainedConfig, seq_length: int) -> None:
    """Refuse documents whose angles would depend on the longest that shares their micro-batch.

    Raises:
        ConfigError: if a sample may be longer than where a longrope changes its factors.
    """
    text = hf_config.get_text_config()
    ends = [
        rope.get("original_max_position_embeddings") for rope in _ropes(text) if rope.get("rope_type") == "longrope"
    ]
    if ends and ends[0] and seq_length > min(ends):
        raise ConfigError(
            f"packing = 'documents': {hf_config.model_type!r} can't keep the documents of a sample apart (longrope: "
            f"one of more than {min(ends)} tokens changes the angles of all in its micro-batch, and seq_length is "
            f"{seq_length}). Take packing = True or False, or seq_length up to {min(ends)}"
        )


def check_rope(hf_config: transformers.PretrainedConfig, given: dict[str, Any]) -> None:
    """Refuse a rope that transformers 5 reads otherwise than transformers 4, whose fields the file has.

    Some classes of version 5 take a rope of their own where there is no `rope_parameters`, whatever else is there.

    Args:
        given: the fields in config.json.

    Raises:
        ConfigError: with what both would read alike.
    """
    rope, said = _whole(getattr(hf_config, "rope_parameters", None)), _whole(given.get("rope_parameters"))
    if not rope.get("rope_theta"):
        return
    kind, version = hf_config.model_type, transformers.__version__
    name = "rotary_emb_base" if kind == "gpt_neox" else "rope_theta"
    right = rope | (said or {"rope_theta": given.get(name, THETAS_OF_4.get(kind, rope["rope_theta"]))})
    if not said and "rope_scaling" in given and not given["rope_scaling"]:
        right = {part: right[part] for part in ("rope_theta", "partial_rotary_factor") if part in right}
        right["rope_type"] = "default"
    if all(right.get(part) == rope.get(part) for part in ("rope_type", "rope_theta")):
        return
    fields = [
        f"{part} {json.dumps(given[part])}" for part in (name, "rope_scaling", "rope_parameters") if part in given
    ]
    cure = "rope_parameters" if name in given or right.get("rope_type") != rope.get("rope_type") else name
    raise ConfigError(
        f"config.json ({kind!r}: {', '.join(fields) or 'no rope_theta'}): its rope is {json.dumps(right)} by "
        f"transformers 4, but {version} takes {json.dumps(rope)}. Add the one that the model was made with, as {cure!r}"
    )


def _whole(rope: Any) -> dict[str, Any]:
    """A rope, or of those by kinds of layers the one without a window; of a class that has no such thing, nothing."""
    return rope.get("full_attention", rope) if isinstance(rope, dict) else {}


def _ropes(config: transformers.PretrainedConfig) -> list[dict[str, Any]]:
    """A config's rope, or one for each kind of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in rope.values() if isinstance(part, dict)]
    return nested or [rope]


def _by_length(kind: Any) -> bool:
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any(isinstance(one, str) and ("dynamic" in one or one == "longrope") for one in kinds)


def _default(kind: Any) -> Any:
    return dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
