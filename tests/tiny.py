"""Models of any type that are small enough to train in a second."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import CONFIG_MAPPING

from tp2d_helpers.cache import build_once, cache_dir
from tp2d_helpers.demo import build_model

TINY = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            vocab_size=2048, max_position_embeddings=256)  # fmt: skip


def tiny_shape(model_type: str, **shape: Any) -> dict[str, Any]:
    """The fields of a tiny model's config, with its `model_type`."""
    derived = isinstance(getattr(CONFIG_MAPPING[model_type], "head_dim", None), property)
    heads = {} if derived else dict(head_dim=8)
    return TINY | heads | dict(pad_token_id=None, model_type=model_type) | shape


def family(model_type: str, **shape: Any) -> Path:
    """The folder of a tiny model whose biases and norms are random, too; built on first use."""

    def build(folder: Path) -> None:
        """As `demo.build_model`, and noise of 0.02 on every weight: a bias of zeros and a norm of ones hide faults.

        Not on buffers: those of Apertus' activation are constants, and only some versions read them.
        """
        build_model(tiny_shape(model_type, **shape), folder, dtype=torch.float32)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        draw = torch.Generator().manual_seed(1)
        noise = {name: 0.02 * torch.randn(weight.shape, generator=draw) for name, weight in weights.items()}
        noisy = {n: weight if n.endswith((".beta", ".eps")) else weight + noise[n] for n, weight in weights.items()}
        safetensors.torch.save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})

    name = "-".join(["family", model_type, *(f"{name}={value}" for name, value in shape.items())])
    if len(name) > 150:  # a file system's limit is 255, and there are suffixes
        name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return build_once(cache_dir() / name, build)
