"""The tokenizer of a model, as its folder has it."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import AutoTokenizer

from tp2d_helpers.config import ConfigError, reason


def load_tokenizer(
    model_name: str, trust_remote_code: bool = False, chat_template: str = ""
) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a model and see to it that it can end a document and pad a line.

    Args:
        chat_template: a .jinja file with a chat template to take in place of the tokenizer's own.

    Raises:
        ConfigError: if there is none, it has neither a pad nor an end-of-text token, or the template can't be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ConfigError(
            f"model_name = {model_name!r}: its tokenizer can't be loaded ({reason(error)}). "
            'Without a way to the hub, take "demo" or the path of a local folder.'
        ) from error
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        raise ConfigError(
            f"model_name = {model_name!r}: its tokenizer has neither an end-of-text nor a pad token; "
            "set one in its tokenizer_config.json (eos_token)"
        )
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"chat_template = {chat_template!r}: must be a .jinja file ({reason(error)})") from error
    return tokenizer
