"""Text → tokens, once per node: one flat file in the cache, which all ranks of the node map into memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from array import array
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer

from tp2d_helpers.cache import build_once, cache_dir, clear_cache
from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.data.files import stamp
from tp2d_helpers.data.text import load_text

LAYOUT = 3  # of the folder that `prepare_tokens` makes; another one is not taken for it
CHARACTERS = 500_000  # that the tokenizer is given at once; it needs about 500 bytes for each
CONTEXT = 200  # characters on both sides of a part of a document, so that it is tokenized as in the whole


def load_tokenizer(model_name: str, trust_remote_code: bool = False) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a model and see to it that it can end a document and pad a line.

    Raises:
        ConfigError: if there is none, or it has neither a pad nor an end-of-text token.
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
) -> Path:
    """Tokenise a dataset into the cache, once per node, and return the folder, which `tokenize` describes.

    Before a new one is made, the cache is rid of what nobody will use again (`clear_cache`).

    Raises:
        ConfigError: for a dataset that can't be loaded, lacks the column, or has no text in it.
    """
    versions = [LAYOUT, transformers.__version__, platform.python_version()]  # the demo's text comes with Python
    request = [model_name, dataset_name, dataset_config, text_column, dataset_percentage, text_files, *versions]
    stamps = [stamp(Path(name).expanduser()) for name in (model_name, dataset_name)]
    key = hashlib.sha256(json.dumps([request, stamps]).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        """Load and tokenise; called if the cache hasn't got the folder."""
        clear_cache()
        text = load_text(dataset_name, dataset_config, dataset_percentage, text_column, text_files)
        tokenize(text.select_columns([text_column]), load_tokenizer(model_name, trust_remote_code), folder, progress)

    return build_once(cache_dir() / f"tokens-{key}", build)


def tokenize(
    text: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path, progress: bool = True
) -> None:
    """Write the tokens of a one-column dataset into `folder`. Memory depends on its longest row, not on its size.

    - `tokens.bin`: uint32, all documents end to end, each closed by the end-of-text token. Rows without text are none.
    - `offsets.npy`: int64 [documents + 1], where each begins.
    - `first.npy`: int64 [documents], the first document with the same text: its own number, if it repeats none.
    - `meta.json`: the numbers of rows, documents and tokens, the pad token, the highest token, a hash of all of them.

    Raises:
        ConfigError: if no document has any text.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
    offsets, digests, highest, whole = array("q", [0]), array("Q"), end, hashlib.sha256()
    bar = tqdm(total=len(text), desc="Tokenising", unit=" documents", disable=not progress, mininterval=1)
    with bar, open(folder / "tokens.bin", "wb") as file:
        for documents in _batches(text, bar):
            digests.extend(_digest(document) for document in documents)
            for parts in _encode(documents, tokenizer):
                length = 0
                for ids in itertools.chain(parts, [[end]]):
                    tokens = np.asarray(ids, dtype=np.uint32)
                    file.write(tokens.tobytes())
                    whole.update(tokens)
                    length, highest = length + len(tokens), max(highest, int(tokens.max(initial=0)))
                offsets.append(offsets[-1] + length)
    if not digests:
        raise ConfigError(f"dataset_name: no text in the {len(text)} rows of column {text.column_names[0]!r}")
    np.save(folder / "offsets.npy", np.asarray(offsets))
    whole.update(np.asarray(offsets))
    _, firsts, which = np.unique(np.asarray(digests), return_index=True, return_inverse=True)
    np.save(folder / "first.npy", firsts[which])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    counts = {"rows": len(text), "documents": len(digests), "tokens": offsets[-1]}
    meta = {**counts, "pad": pad, "highest": highest, "sha256": whole.hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def _digest(document: str) -> int:
    return int.from_bytes(hashlib.blake2b(document.strip().encode(errors="replace"), digest_size=8).digest(), "big")


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
