"""The tokenizer of a model, as its folder has it.

`AutoTokenizer` makes some tokenizers anew, by the name of a class, out of the vocabulary in tokenizer.json: what else
is in that file, such as how text is split, is the class's then. So its tokens are compared with those of the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import tokenizers
import transformers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import cached_file

from tp2d_helpers.config import ConfigError, reason

# What tokenizers differ in: spaces, digits, line breaks, capitals and accents, marks, other scripts.
SAMPLE = (
    "def f(x):\n    return x + 1\n\n\n  # two\t\ttabs  ",
    "In 2023: 650841823 times, 3.14159 or 1,234,567, 10000000, 20241231.",
    " Leading and trailing spaces   between   words ",
    "Don't stop: WE'LL go—\"quoted\" (and so on)… don\u2019t",
    "Ünïcode, naïve café, ﬁne; ǅ Å a\u0301\r\nnew line\u00a0space",
    "中文字符。日本語のテキスト。한국어 Привет мир שלום مرحبا हिन्दी ไทย 🎉👩‍👩‍👧",
    'https://example.org/a_b?c=d&e=%20 <b>x</b> {"k": [1, 2]} \\frac{a}{b} $x^2$',
)


def load_tokenizer(
    model_name: str, trust_remote_code: bool = False, chat_template: str = ""
) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a model and see to it that it can end a document and pad a line.

    Where `AutoTokenizer` gives other tokens than tokenizer.json, it is loaded as the file has it, and its attribute
    `remark` says so.

    Args:
        chat_template: a .jinja file with a chat template to take in place of the tokenizer's own, or the name of one of
            them.

    Raises:
        ConfigError: if there is none, it has neither a pad nor an end-of-text token, the file can't be had as it is, or
            the template can't be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ConfigError(
            f"model_name = {model_name!r}: its tokenizer can't be loaded ({reason(error)}). "
            'Without a way to the hub, take "demo" or the path of a local folder.'
        ) from error
    tokenizer = _as_in_file(model_name, tokenizer)
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


def stop_tokens(tokenizer: transformers.PreTrainedTokenizerBase) -> set[int]:
    """The tokens that a model's generation ends at, by the folder that its tokenizer came from."""
    try:
        known = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
    except Exception:  # there is none, or it can't be read: other checks say so
        known = None
    found = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id}
    return found - {None}


def fingerprint(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """A hash of all that tokens and rendered chats depend on, wherever it was loaded from."""
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    added = sorted((number, repr(token)) for number, token in tokenizer.added_tokens_decoder.items())
    found = [type(tokenizer).__name__, vocabulary, added, tokenizer.special_tokens_map, tokenizer.chat_template]
    found.append(sorted(stop_tokens(tokenizer)))  # some chats' answers end in them
    return hashlib.sha256(json.dumps(found, default=str).encode(errors="replace")).hexdigest()


def writes_date(tokenizer: transformers.PreTrainedTokenizerBase) -> bool:
    """Whether its chat template can write the date."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def _as_in_file(
    model_name: str, tokenizer: transformers.PreTrainedTokenizerBase
) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that gives the tokens of tokenizer.json. Without that file, or by code of its own, as it is."""
    path, kind = tokenizer_file(model_name), type(tokenizer)
    # The plain class takes the file as it is.
    if (
        path is None
        or kind is PreTrainedTokenizerFast
        or not issubclass(kind, PreTrainedTokenizerFast)
        or own_code(kind)
    ):
        return tokenizer
    right, found = _of_file(str(path), path.stat().st_mtime_ns), sample_tokens(tokenizer)
    if found == right:
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(model_name)
    if (tokens := sample_tokens(plain)) == right:
        plain.remark = f"tokenizer.json as it is: {kind.__name__} would split text otherwise"
        return plain
    if tokens == found:  # by its tokenizer_config.json, which counts: add_prefix_space, more tokens
        return tokenizer
    text = next(text for text, one, other in zip(SAMPLE, found, right, strict=True) if one != other)
    raise ConfigError(
        f"model_name = {model_name!r}: transformers {transformers.__version__} gives other tokens than its "
        f"tokenizer.json, of {text!r} for one, and can't load it as it is: set the "
        "tokenizer_class in its tokenizer_config.json that it was saved by"
    )


def tokenizer_file(model_name: str, name: str = "tokenizer.json") -> Path | None:
    """A file of a model's tokenizer, in its folder or in the hub's cache; None if it has none."""
    try:
        return Path(cached_file(model_name, name))
    except OSError:
        return None


def own_code(kind: type) -> bool:
    """Whether a class came with its model."""
    return kind.__module__.startswith("transformers_modules")


@functools.lru_cache(maxsize=8)
def _of_file(path: str, changed: int) -> list[list[int]]:
    """Tokens of `SAMPLE` by tokenizers alone."""
    alone = tokenizers.Tokenizer.from_file(path)
    alone.no_padding()
    alone.no_truncation()
    return [alone.encode(text, add_special_tokens=False).ids for text in SAMPLE]


def sample_tokens(tokenizer: transformers.PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of `SAMPLE`, by which two tokenizers are compared."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SAMPLE]
