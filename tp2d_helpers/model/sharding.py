"""A model without storage, or with random weights, from its config."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM

from tp2d_helpers.config import ConfigError, reason


def meta_model(hf_config: transformers.PretrainedConfig, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model without storage: shapes only, nothing is allocated.

    Raises:
        ConfigError: if `AutoModelForCausalLM` can't build it.
    """
    try:
        with torch.device("meta"):
            return random_model(hf_config, dtype)
    except Exception as error:
        raise ConfigError(
            f"model_name: {hf_config.model_type!r} is not a model that AutoModelForCausalLM builds "
            f"({str(error).splitlines()[0] if isinstance(error, ValueError) else reason(error)})"
        ) from error


def random_model(hf_config: transformers.PretrainedConfig, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model with random weights."""
    # A config class that came with its model was loaded because the user trusts that model's code.
    trusted = type(hf_config).__module__.startswith("transformers_modules")
    settings = {} if dtype is None else {"dtype": dtype}
    return AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trusted, **settings)
