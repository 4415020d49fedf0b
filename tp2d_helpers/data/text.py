"""A dataset → rows of text or chats: the demo, local files, or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.constants import HF_HUB_CACHE

from tp2d_helpers.cache import is_full
from tp2d_helpers.cache.space import free_bytes, size
from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chats import FORMATS, chat_format, to_json
from tp2d_helpers.data.files import local_files, stamp
from tp2d_helpers.data.readers import PEEK, no_column, peek, read_chats, read_rows
from tp2d_helpers.data.row_file import map_rows
from tp2d_helpers.demo import demo_documents

DEFAULT_CONFIGS = {"wikitext": "wikitext-2-raw-v1", "Salesforce/wikitext": "wikitext-2-raw-v1"}


def load_text(
    dataset_name: str,
    dataset_config: str = "",
    dataset_percentage: float = 100.0,
    text_column: str = "text",
    text_files: str = "document",
) -> datasets.Dataset:
    """Load a dataset: "demo", local files (see `local_files`), or a hub id: of its train split, or of `id:split`.

    It has a column `text_column` of text; or, if it is recognised as chats (see `chats`), a column of the format's name
    with each chat in JSON, and one that says where it stands.

    Args:
        text_files: "document" makes a .txt file one row, "paragraph" one row for each of its blocks between blank
            lines. Line ends within a row stay as they are.

    Raises:
        ConfigError: if it can't be read, lacks the column, or is neither local nor in the cache while the hub can't be
            reached.
    """
    try:
        if dataset_name == "demo":
            text = datasets.Dataset.from_dict({"text": demo_documents()})
        elif files := local_files(dataset_name, dataset_config):
            text = _load_files(files.used, text_column, text_files)
        else:
            text = _chats(_load_from_hub(dataset_name, dataset_config, text_files), text_column)
    except Exception as error:  # the libraries below raise a dozen types for the one thing a user can act on
        known = next((e for e in (error, error.__cause__) if isinstance(e, ConfigError)), None)
        if known:
            raise known from None
        why = _no_room(error) if is_full(error) else (
            f"can't be loaded ({reason(error)}). "
            'Without a way to the hub, take "demo" or the path of a local file or folder.'
        )  # fmt: skip
        raise ConfigError(f"dataset_name = {dataset_name!r}: {why}") from error
    if is_chats(text):
        return _share(text, dataset_percentage)
    if text_column not in text.column_names:
        raise no_column((text_column,), repr(dataset_name), text.column_names)
    kind = getattr(text.features[text_column], "dtype", type(text.features[text_column]).__name__)
    if "string" not in kind and kind != "null":
        raise ConfigError(f"text_column = {text_column!r}: it must hold text, and in {dataset_name!r} it is {kind}")
    return _share(text, dataset_percentage)


def _no_room(error: Exception) -> str:
    """What to do about a disk that the cache of `datasets`, or that of the hub, is on."""
    folders = Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)
    free = ", ".join(f"{folder} ({size(free_bytes(folder))} free)" for folder in folders)
    return f"no room for it in {free}: {reason(error)}; make room, or set HF_HOME to a folder on a larger disk"


def is_chats(rows: datasets.Dataset) -> bool:
    """Whether what `load_text` gave are chats."""
    return rows.column_names in [[form, "where", "bad"] for form in FORMATS]


def _share(rows: datasets.Dataset, percentage: float) -> datasets.Dataset:
    # Not by a split such as "train[:10%]": `datasets` takes whole percents only.
    return rows.select(range(round(len(rows) * percentage / 100)))


def _chats(rows: datasets.Dataset, text_column: str) -> datasets.Dataset:
    """A dataset of the hub as it is, or as chats."""
    if not (form := chat_format(rows.select(range(min(PEEK, len(rows)))).to_list(), text_column)):
        return rows
    features = datasets.Features({name: datasets.Value("large_string") for name in (form, "where", "bad")})
    return rows.map(
        lambda row, i: _to_json(row, form, f"row {i + 1}"),
        with_indices=True, remove_columns=rows.column_names, features=features, writer_batch_size=16,
    )  # fmt: skip


def _to_json(row, form, where):
    try:
        return to_json(row, form, where)
    except BadRow as error:
        return {form: None, "where": where, "bad": f"{error.kind}: {error.reason}"}


def hub_dataset(dataset_name: str, dataset_config: str = "") -> tuple[str, str | None, str]:
    """(id, config, split) of a hub dataset; what is not said as it is by default."""
    hub_id, _, split = dataset_name.partition(":")
    return hub_id, dataset_config or DEFAULT_CONFIGS.get(hub_id), split or "train"


def _load_from_hub(dataset_name: str, dataset_config: str, text_files: str) -> datasets.Dataset:
    hub_id, name, split = hub_dataset(dataset_name, dataset_config)
    builder = datasets.load_dataset_builder(hub_id, name)
    by_row = {"sample_by": text_files} if hasattr(builder.config, "sample_by") else {}  # a dataset of .txt files
    return datasets.load_dataset(hub_id, name, split=split, **by_row)


def _load_files(files: list[Path], text_column: str, text_files: str) -> datasets.Dataset:
    """The rows of local files. Their stamps tell files that changed from those that were read before."""
    first = peek(files[0])
    form = chat_format(first, text_column)
    columns = FORMATS[form] if form else (text_column,)
    shared = dict(files=[str(file) for file in files], needed=_bytes_of(files, columns, first), stamps=stamp(*files))
    del first  # it may be large
    if form:
        return map_rows(read_chats, [form, "where", "bad"], columns=columns, form=form, **shared)
    return map_rows(read_rows, [text_column], text_column=text_column, how=text_files, **shared)


def _bytes_of(files: list[Path], columns: tuple[str, ...], rows: list[dict[str, Any]]) -> float:
    """About how many bytes these columns of the files have, by some of their rows; at least, if they are compressed."""

    def length(value: Any) -> int:
        """About the characters of it as JSON, without a copy of a long text."""
        if isinstance(value, dict):
            return sum(len(name) + length(part) for name, part in value.items())
        if isinstance(value, list):
            return sum(map(length, value))
        return 8 + len(value) if isinstance(value, str) else 8

    chosen = ({name: row[name] for name in columns if name in row} for row in rows)
    share = sum(map(length, chosen)) / sum(map(length, rows)) if rows else 1.0
    return share * sum(file.stat().st_size for file in files)
