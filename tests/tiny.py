"""The shape of a model small enough to train in a second."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

TINY = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            vocab_size=2048, max_position_embeddings=256)  # fmt: skip


def tiny_shape(model_type: str, **shape: Any) -> dict[str, Any]:
    """`TINY` for a model type, and what sets it apart."""
    derived = isinstance(getattr(CONFIG_MAPPING[model_type], "head_dim", None), property)
    return TINY | ({} if derived else dict(head_dim=8)) | dict(pad_token_id=None, model_type=model_type) | shape
