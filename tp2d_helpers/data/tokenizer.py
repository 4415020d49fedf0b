"""The tokenizer of a model, as its folder has it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import transformers
from transformers import AutoTokenizer

from tp2d_helpers.config import ConfigError, reason


def load_tokenizer(
    model_name: str, trust_remote_code: bool = False, chat_template: str = ""
) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a model and see to it that it can end a document and pad a line.

    Args:
        chat_template: a .jinja file with a chat template to take in place of the tokenizer's own, or the name of one of
            them.

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
    if isinstance(tokenizer.chat_template, dict) and chat_template in tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.chat_template[chat_template]
    elif chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"chat_template = {chat_template!r}: must be a .jinja file, or the name of one of the tokenizer's "
                f"templates ({reason(error)})"
            ) from error
    return tokenizer


def fingerprint(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """A hash of all that tokens and rendered chats depend on, wherever it was loaded from."""
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    added = sorted((number, repr(token)) for number, token in tokenizer.added_tokens_decoder.items())
    found = [type(tokenizer).__name__, vocabulary, added, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(found, default=str).encode(errors="replace")).hexdigest()


def writes_date(tokenizer: transformers.PreTrainedTokenizerBase) -> bool:
    """Whether its chat template can write the date."""
    return "strftime_now" in str(tokenizer.chat_template or "")
