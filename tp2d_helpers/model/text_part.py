"""Folders whose text model is a part: Gemma 3, Mistral Small 3 and Qwen3.5 come with a vision tower.

The text model alone is trained, as the class of `transformers` that its part of the config stands for. Images would be
needed to train the rest.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers

# How the text model's weights are called in the files → in its class. The longer names are those of today's classes.
KEY_MAPPING = {r"^model\.(?:language_model|text_model)\.": "model.", r"^language_model\.": ""}
TOKENS = ("bos_token_id", "eos_token_id")


def is_part(config: transformers.PretrainedConfig) -> bool:
    """Whether a config has that of its text model as a part. A class that came with its model is taken as it is."""
    own_code = type(config).__module__.startswith("transformers_modules")
    return isinstance(getattr(config, "text_config", None), transformers.PretrainedConfig) and not own_code


def text_part(config: transformers.PretrainedConfig, given: dict[str, Any]) -> transformers.PretrainedConfig:
    """The text model's config, with what only the whole one says; a config without parts as it is.

    Its `pad_token_id` is not touched: the whole model's embedding goes by that of the part, too.

    Args:
        given: the fields in config.json. What isn't there is a class's default, and the classes of the whole and of the
            part can have different ones. Of `tie_word_embeddings` the whole's word counts if it is there, of the
            tokens that begin and end a text the part's.
    """
    if not is_part(config):
        return config
    text = copy.deepcopy(config.text_config)
    if "tie_word_embeddings" in given:
        text.tie_word_embeddings = config.tie_word_embeddings
    for name in TOKENS:
        if given.get(name) is not None and name not in given.get("text_config", {}):
            setattr(text, name, given[name])
    if quantised := getattr(config, "quantization_config", None):
        text.quantization_config = quantised
    return text
