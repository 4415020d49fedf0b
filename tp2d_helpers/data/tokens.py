"""Text → tokens, once per node: one flat file in the cache, which all ranks of the node map into memory."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer

from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.demo import build_once, cache_dir, demo_documents

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
DEFAULT_CONFIGS = {"wikitext": "wikitext-2-raw-v1", "Salesforce/wikitext": "wikitext-2-raw-v1"}


def load_text(dataset_name: str, dataset_config: str = "", dataset_percentage: float = 100.0) -> datasets.Dataset:
    """Load the train split: "demo", a local file or folder (jsonl, json, csv, parquet, txt), or a hub id.

    Raises:
        ConfigError: if it can't be read, or is neither local nor in the cache while the hub can't be reached.
    """
    text = _load_all(dataset_name, dataset_config)
    # Not by a split such as "train[:10%]": `datasets` takes whole percents only.
    return text.select(range(round(len(text) * dataset_percentage / 100)))


def _load_all(dataset_name: str, dataset_config: str) -> datasets.Dataset:
    path = Path(dataset_name).expanduser()
    if dataset_name == "demo":
        return datasets.Dataset.from_dict({"text": demo_documents()})
    try:
        if path.is_file():
            if path.suffix not in LOADERS:
                raise ConfigError(f"dataset_name = {dataset_name!r}: a local file must be one of {', '.join(LOADERS)}")
            return datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
        if not path.exists() and dataset_name.startswith((".", "/", "~")):
            raise ConfigError(f"dataset_name = {dataset_name!r}: no such file or folder")
        name = dataset_config or DEFAULT_CONFIGS.get(dataset_name)
        return datasets.load_dataset(str(path) if path.is_dir() else dataset_name, name, split="train")
    except ConfigError:
        raise
    except Exception as error:  # the libraries below raise a dozen types for the one thing a user can act on
        raise ConfigError(
            f"dataset_name = {dataset_name!r}: can't be loaded ({reason(error)}). "
            'Without a way to the hub, take "demo" or the path of a local file or folder.'
        ) from error


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
) -> Path:
    """Tokenise a dataset into the cache, once per node, and return the folder.

    The folder holds `tokens.bin` (uint32, all documents end to end, each closed by the end-of-text token),
    `offsets.npy` (int64 [documents + 1], where each begins) and `meta.json`.

    Raises:
        ConfigError: for a dataset that can't be loaded, lacks the column, or has no text in it.
    """
    versions = [transformers.__version__, platform.python_version()]  # the demo's text comes with Python
    request = [model_name, dataset_name, dataset_config, text_column, dataset_percentage, *versions]
    stamps = [_stamp(Path(name).expanduser()) for name in (model_name, dataset_name)]
    key = hashlib.sha256(json.dumps([request, stamps]).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        """Check the column and tokenise it; called if the cache hasn't got the folder."""
        text = load_text(dataset_name, dataset_config, dataset_percentage)
        if text_column not in text.column_names:
            raise ConfigError(
                f"text_column = {text_column!r}: {dataset_name!r} has no such column; it has {text.column_names}"
            )
        kind = getattr(text.features[text_column], "dtype", type(text.features[text_column]).__name__)
        if "string" not in kind and kind != "null":
            raise ConfigError(f"text_column = {text_column!r}: it must hold text, and in {dataset_name!r} it is {kind}")
        tokenize(text.select_columns([text_column]), load_tokenizer(model_name, trust_remote_code), folder, progress)

    return build_once(cache_dir() / f"tokens-{key}", build)


def tokenize(
    text: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path, progress: bool = True
) -> None:
    """Write the tokens of a one-column dataset into `folder`, as `prepare_tokens` describes them.

    Raises:
        ConfigError: if no document has any text.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
    lengths: list[int] = []
    bar = tqdm(total=len(text), desc="Tokenising", unit=" documents", disable=not progress, mininterval=1)
    with bar, open(folder / "tokens.bin", "wb") as file:
        for batch in text.iter(batch_size=1000):
            documents = next(iter(batch.values()))
            bar.update(len(documents))
            documents = [document for document in documents if document and document.strip()]
            if not documents:
                continue
            # Specials are off: the end-of-text token below is the only separator, whatever the tokenizer adds.
            for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
                file.write(np.asarray([*ids, end], dtype=np.uint32).tobytes())
                lengths.append(len(ids) + 1)
    if not lengths:
        raise ConfigError(f"dataset_name: no text in the {len(text)} rows of column {text.column_names[0]!r}")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    (folder / "meta.json").write_text(json.dumps({"documents": len(lengths), "tokens": sum(lengths), "pad": pad}))


def _stamp(path: Path) -> list[Any]:
    """What changes when a local file or folder changes: names, sizes and times of what it holds."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
