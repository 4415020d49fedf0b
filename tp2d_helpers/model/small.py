"""A small model of the same class: what is tried on the CPU before a GPU is taken."""

from __future__ import annotations

import contextlib
import copy
import math
import re

import torch
import transformers

from tp2d_helpers.config import ConfigError
from tp2d_helpers.model.sharding import meta_model, random_model

WINDOW = 4  # shorter than them
COMFORTABLE = 5 * 10**7  # parameters of a model that is tried in a second or two
THIN = 256  # features
AFFORDABLE = 5 * 10**8  # parameters of a model with storage: 2 GB
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")


def small_model(hf_config: transformers.PretrainedConfig, tp_size: int = 1) -> torch.nn.Module:
    """The model in fp32 with random weights, few tokens and narrow MLPs; of a large one, a layer of each type.

    Its widths can be divided by tp_size.

    Raises:
        ConfigError: if that is still too large to be tried.
    """
    kinds = _kinds(meta_model(hf_config))
    narrow, short, thin = _narrow(hf_config, tp_size), None, None
    with contextlib.suppress(Exception):  # a class may derive its layers from other settings
        short = _short(narrow)
        thin = _thin(short)
    tries = [
        (narrow, COMFORTABLE),
        (short, COMFORTABLE),
        (thin, COMFORTABLE),
        (short, AFFORDABLE),
        (narrow, AFFORDABLE),
    ]
    for cut, most in filter(lambda one: one[0] is not None, [*tries, (hf_config, AFFORDABLE)]):
        try:
            found = meta_model(cut)
            if sum(parameter.numel() for parameter in found.parameters()) > most or _kinds(found) != kinds:
                continue
            model = random_model(cut, torch.float32)
            if cut is thin:  # in some classes another width follows from this one
                model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        except Exception:
            continue
        return model
    raise ConfigError(f"it is too large to be tried on the CPU, where {AFFORDABLE:,} parameters are the limit")


def _kinds(model: torch.nn.Module) -> set[str]:
    """The names of the weights, layers aside: what a smaller model must have, too."""
    return {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_parameters()}


def _narrow(hf_config: transformers.PretrainedConfig, tp_size: int) -> transformers.PretrainedConfig:
    """With all layers, few tokens and narrow MLPs."""
    narrow = copy.deepcopy(hf_config)
    text = narrow.get_text_config()
    width = 64 * tp_size // math.gcd(64, tp_size)
    most_of = dict.fromkeys(WIDTHS, width) | {"vocab_size": 512, "sliding_window": WINDOW}
    for name, most in most_of.items():
        if isinstance(getattr(text, name, None), int) and getattr(text, name):
            setattr(text, name, min(most, getattr(text, name)))
    if (getattr(text, "pad_token_id", None) or 0) >= text.vocab_size:
        text.pad_token_id = None
    return narrow


def _short(narrow: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """With a layer of each type."""
    short = copy.deepcopy(narrow)
    text = short.get_text_config()
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or [""]))
    kinds = kinds if len(kinds) > 1 else kinds * 2
    if kinds[0]:
        text.layer_types = kinds
    text.num_hidden_layers = min(len(kinds), text.num_hidden_layers)
    if getattr(text, "first_k_dense_replace", None):  # of a mixture: the rest has experts
        text.first_k_dense_replace = 1
    return short


def _thin(short: transformers.PretrainedConfig) -> transformers.PretrainedConfig | None:
    """With few features between the layers, and the heads as they are, if a config says how wide they are."""
    thin = copy.deepcopy(short)
    text = thin.get_text_config()
    if not isinstance(getattr(text, "head_dim", None), int):
        return None
    text.hidden_size = THIN
    return thin
