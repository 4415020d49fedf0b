"""Ropes that depend on the length of what is read: longrope (Phi-3-128k, Phi-4-mini) and dynamic ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from tp2d_helpers.config import ConfigError


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
