"""Text → tokens, once per node: one flat file in the cache, which all ranks of the node map into memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer

from tp2d_helpers.cache import build_once, cache_dir, clear_cache
from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.data.chat_tokens import read_segments, tokenize_chats
from tp2d_helpers.data.files import paths_of, stamp
from tp2d_helpers.data.folder import TokenWriter
from tp2d_helpers.data.text import is_chats, load_text

LAYOUT = 3  # of the folder that `prepare_tokens` makes; another one is not taken for it
CHARACTERS = 500_000  # that the tokenizer is given at once; it needs about 500 bytes for each
CONTEXT = 200  # characters on both sides of a part of a document, so that it is tokenized as in the whole


# The settings of a run that `prepare_tokens` takes.
SOURCE = ("model_name", "dataset_name", "dataset_config", "text_column", "text_files", "dataset_percentage",
          "trust_remote_code", "chat_template", "loss_on")  # fmt: skip


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


def prepare_tokens(
    model_name: str,
    dataset_name: str,
    dataset_config: str = "",
    text_column: str = "text",
    dataset_percentage: float = 100.0,
    trust_remote_code: bool = False,
    progress: bool = True,
    text_files: str = "document",
    chat_template: str = "",
    loss_on: str = "assistant",
) -> Path:
    """Tokenise a dataset into the cache, once per node, and return the folder, which `folder` describes.

    Before a new one is made, the cache is rid of what nobody will use again (`clear_cache`).

    Args:
        chat_template, loss_on: for chats; see `load_tokenizer` and `tokenize_chats`.

    Raises:
        ConfigError: for a dataset that can't be loaded, lacks the column, or has no text in it.
    """
    versions = [LAYOUT, transformers.__version__, platform.python_version()]  # the demo's text comes with Python
    request = [model_name, dataset_name, dataset_config, text_column, dataset_percentage, text_files, *versions]
    files = [model_name]
    if (chat_template, loss_on) != ("", "assistant"):
        request, files = [*request, chat_template, loss_on], [*files, chat_template]
    stamps = [stamp(*(Path(name).expanduser() for name in files if name)), stamp(*paths_of(dataset_name))]
    key = hashlib.sha256(json.dumps([request, stamps]).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        """Load and tokenise; called if the cache hasn't got the folder."""
        clear_cache()
        text = load_text(dataset_name, dataset_config, dataset_percentage, text_column, text_files)
        tokenizer = load_tokenizer(model_name, trust_remote_code, chat_template)
        if is_chats(text):
            tokenize_chats(text, tokenizer, folder, loss_on, progress)
        else:
            tokenize(text.select_columns([text_column]), tokenizer, folder, progress)

    return build_once(cache_dir() / f"tokens-{key}", build)


def tokenize(
    text: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path, progress: bool = True
) -> None:
    """Write the tokens of a one-column dataset into `folder`. Memory depends on its longest row, not on its size.

    Each document is closed by the end-of-text token. Rows without text are none.

    Raises:
        ConfigError: if no document has any text.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
    bar = tqdm(total=len(text), desc="Tokenising", unit=" documents", disable=not progress, mininterval=1)
    with bar, TokenWriter(folder, highest=end) as writer:
        for documents in _batches(text, bar):
            for document, parts in zip(documents, _encode(documents, tokenizer), strict=True):
                writer.add(document, itertools.chain(parts, [[end]]))
        if not writer.digests:
            raise ConfigError(f"dataset_name: no text in the {len(text)} rows of column {text.column_names[0]!r}")
        writer.finish(len(text), tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end)


def example_segments(settings: dict[str, Any], number: int = 0) -> list[tuple[str, bool]]:
    """Example `number` of a run's data, decoded: (text, whether it has loss), in order.

    Args:
        settings: as `Config.model_dump()` gives them.
    """
    folder = prepare_tokens(**{name: settings[name] for name in SOURCE})
    return read_segments(folder, load_tokenizer(settings["model_name"], settings["trust_remote_code"]), number)


def _batches(text: datasets.Dataset, bar: tqdm) -> Iterator[list[str]]:
    """The rows that have text, `CHARACTERS` or a single row at a time."""
    batch, size = [], 0
    for rows in text.with_format("arrow").iter(batch_size=1000):  # a view of the file: no text is held yet
        for row in rows.column(0):
            bar.update()
            document = row.as_py()
            if not document or not document.strip():
                continue
            if size + len(document) > CHARACTERS and batch:
                yield batch
                batch, size = [], 0
            batch.append(document)
            size += len(document)
    if batch:
        yield batch


def _encode(documents: list[str], tokenizer: transformers.PreTrainedTokenizerBase) -> Iterator[Iterator[list[int]]]:
    """The token ids of each document, in parts."""
    if len(documents) == 1:
        yield _encode_long(documents[0], tokenizer)
        return
    # Specials are off: the end-of-text token is the only separator, whatever the tokenizer adds.
    for ids in tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
        yield iter([ids])


def _encode_long(document: str, tokenizer: transformers.PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of a document in parts of about `CHARACTERS`: those of the whole.

    A part begins where a token does, and is tokenized together with the `CONTEXT` around it. A tokenizer that can't say
    where its tokens begin ("slow") gets parts that end with a line.
    """
    begin, options = 0, dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
    while begin < len(document):
        if not tokenizer.is_fast:
            line = document.rfind("\n", begin, begin + CHARACTERS) + 1
            end = len(document) if len(document) <= begin + CHARACTERS else line or begin + CHARACTERS
            yield tokenizer(document[begin:end], **options)["input_ids"]
        else:
            end, left = _cut(document, begin + CHARACTERS, tokenizer), max(0, begin - CONTEXT)
            found = tokenizer(document[left : end + CONTEXT], return_offsets_mapping=True, **options)
            starts = [left + start for start, _ in found["offset_mapping"]]  # of spaces alone, it can be their end
            last = end + (end == len(document))
            yield [token for token, start in zip(found["input_ids"], starts, strict=True) if begin <= start < last]
        begin = end


def _cut(document: str, near: int, tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """The first place from `near` on where a token begins, however much of the text before it is looked at."""
    if near >= len(document):
        return len(document)
    starts = []
    for left in (near - CONTEXT, near - CONTEXT // 2):
        window = document[left : near + 2 * CONTEXT]
        found = tokenizer(window, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts.append({left + start for start, _ in found["offset_mapping"]})
    return min((start for start in starts[0] & starts[1] if start >= near), default=near)
