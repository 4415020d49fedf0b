"""A dataset → rows of text or chats: the demo, local files, or the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from huggingface_hub.constants import HF_HUB_CACHE

from tp2d_helpers.cache import is_full
from tp2d_helpers.cache.space import free_bytes, size
from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.data.chats import FORMATS
from tp2d_helpers.data.files import is_local, local_files, paths_of, stamp
from tp2d_helpers.data.hub import commit_of, hub_dataset, hub_files, rows_of, snapshot
from tp2d_helpers.data.parse_arrow import printable, table_rows
from tp2d_helpers.data.parse_text import Wanted, no_column
from tp2d_helpers.data.readers import PEEK, chat_line, peek, read_chats, read_rows
from tp2d_helpers.data.recognise import chat_format, form_of
from tp2d_helpers.data.row_file import map_rows, to_table
from tp2d_helpers.demo import demo_documents


def load_text(
    dataset_name: str,
    dataset_config: str = "",
    dataset_percentage: float = 100.0,
    text_column: str = "text",
    text_files: str = "document",
) -> datasets.Dataset:
    """Load a dataset: "demo", local files (see `local_files`), or a hub id: of its train split, or of `id:split`.

    Its first column is `text_column`, of text; or, if it is recognised as chats (see `chat_format`), that of the
    format's name, with each chat in JSON. Of chats and of files it also has the columns "where", which says where a row
    stands (null for most of text), and "bad", which says "kind: reason" of a row that can't be read, and whose text or
    chat is null.

    Args:
        dataset_percentage: of the rows, also of those of a part of a split (`id:train[:10%]`).
        text_files: "document" makes a .txt file one row, "paragraph" one row for each of its blocks between blank
            lines. Line ends within a row stay as they are.

    Raises:
        ConfigError: if it can't be read, lacks the column, or is neither local nor in the cache while the hub can't be
            reached.
    """
    if text_column in ("where", "bad"):
        raise ConfigError(f"text_column = {text_column!r}: must have another name, which that of a row's place is here")
    try:
        if dataset_name == "demo":
            text = datasets.Dataset.from_dict({"text": demo_documents()})
        elif files := local_files(dataset_name, dataset_config):
            text = _load_files(files.used, text_column, text_files)
        elif splits := hub_files(dataset_name, dataset_config):
            text = _load_splits(splits, dataset_name, text_column, text_files)
        else:
            text = _chats(_load_from_hub(dataset_name, dataset_config, text_files), text_column, dataset_name)
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
        raise no_column(Wanted((text_column,)), repr(dataset_name), text.column_names)
    kind = getattr(text.features[text_column], "dtype", type(text.features[text_column]).__name__)
    if "string" not in kind and kind != "null":
        raise ConfigError(f"text_column = {text_column!r}: it must hold text, and in {dataset_name!r} it is {kind}")
    return _share(text if "bad" in text.column_names else text.select_columns([text_column]), dataset_percentage)


def source_stamp(dataset_name: str, dataset_config: str = "") -> list[Any]:
    """What changes when a dataset does: of local files their names, sizes and times, of one of the hub its commit.

    Where neither the hub nor its cache knows the commit, it is a hash of the rows.
    """
    if dataset_name in ("", "demo") or is_local(dataset_name):
        return stamp(*paths_of(dataset_name))
    if commit := commit_of(dataset_name, dataset_config):
        return [hub_dataset(dataset_name)[0], commit]
    try:
        rows, found = _load_from_hub(dataset_name, dataset_config, "document"), hashlib.sha256()
    except Exception:  # `load_text` says it
        return [hub_dataset(dataset_name)[0], None]
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for batch in table.to_batches():
            found.update(batch.serialize())
    return [hub_dataset(dataset_name)[0], found.hexdigest()]


def chats_beside_text(dataset_name: str, dataset_config: str, text_column: str) -> str | None:
    """The format of chats that the rows of local files have beside the text that is taken of them; None without."""
    files = local_files(dataset_name, dataset_config)
    rows = peek(files.used[0]) if files else []
    if chat_format(rows, text_column):
        return None
    return next((form for row in rows if (form := form_of(row)) and row.get(text_column)), None)


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


def _chats(rows: datasets.Dataset, text_column: str, dataset_name: str) -> datasets.Dataset:
    """A dataset of the hub as `datasets` reads it, or as chats."""
    schema = rows.features.arrow_schema
    table = rows.with_format("arrow").select_columns(printable(schema))

    def parsed(table: pyarrow.Table) -> Iterator[Any]:
        """Its rows, or what is wrong with them."""
        return (row for _, row in table_rows(schema, table.to_batches()))

    first = [row for row in parsed(table[: min(PEEK, len(rows))]) if isinstance(row, dict)]
    if not (form := chat_format(first, text_column)):
        return rows

    def convert(table: pyarrow.Table, numbers: list[int]) -> pyarrow.Table:
        """The chats of a few rows."""
        numbered = zip(numbers, parsed(table), strict=True)
        return to_table([chat_line(row, form, f"row {number + 1} of {dataset_name}") for number, row in numbered], form)

    return table.map(
        convert, with_indices=True, batched=True, batch_size=16, remove_columns=table.column_names,
        features=datasets.Features.from_arrow_schema(to_table([(None, "", None)], form).schema),
    ).with_format(None)  # fmt: skip


def _load_from_hub(dataset_name: str, dataset_config: str, text_files: str) -> datasets.Dataset:
    """What `datasets` makes of a dataset of the hub, or of what the hub's cache has of it."""
    source, name, split = hub_dataset(dataset_name, dataset_config)
    try:
        builder = datasets.load_dataset_builder(source, name)
    except Exception:
        if not (folder := snapshot(source)):
            raise
        source = str(folder)
        builder = datasets.load_dataset_builder(source, name)
    by_row = {"sample_by": text_files} if hasattr(builder.config, "sample_by") else {}  # a dataset of .txt files
    return datasets.load_dataset(source, name, split=split, **by_row)


def _load_splits(
    splits: dict[str, list[Path]], dataset_name: str, text_column: str, text_files: str
) -> datasets.Dataset:
    """The rows of a split of the hub, or of parts of some, one after the other."""
    wanted = rows_of(hub_dataset(dataset_name)[2], [*splits], dataset_name)
    names = {part.splitname for part in wanted.to_absolute(dict.fromkeys(splits, 100))}
    rows = {name: _load_files(splits[name], text_column, text_files) for name in splits if name in names}
    sizes = {name: len(rows.get(name, ())) for name in splits}
    found = ((rows[part.splitname], range(part.from_, part.to)) for part in wanted.to_absolute(sizes))
    parts = [of.select(numbers) for of, numbers in found if numbers]
    if len({tuple(part.column_names) for part in parts}) > 1:
        raise ConfigError(f"dataset_name = {dataset_name!r}: some of its splits are chats, and some are text")
    if not parts:
        raise ConfigError(f"dataset_name = {dataset_name!r}: no rows; the splits have {sizes}")
    return datasets.concatenate_datasets(parts) if parts[1:] else parts[0]


def _load_files(files: list[Path], text_column: str, text_files: str) -> datasets.Dataset:
    """The rows of local files. Their stamps tell files that changed from those that were read before."""
    first = peek(files[0])
    form = chat_format(first, text_column)
    columns = FORMATS[form] if form else (text_column,)
    shared = dict(files=[str(file) for file in files], needed=_bytes_of(files, columns, first), stamps=stamp(*files))
    del first  # it may be large
    if form:
        return map_rows(read_chats, form, places=True, columns=columns, form=form, **shared)
    return map_rows(read_rows, text_column, places=False, text_column=text_column, how=text_files, **shared)


def _bytes_of(files: list[Path], columns: tuple[str, ...], rows: list[dict[str, Any]]) -> float:
    """About how many bytes these columns of the files have, by some of their rows; at least, if they are compressed."""

    def length(value: Any) -> int:
        """About the characters of it as JSON, without a copy of a long text."""
        if isinstance(value, dict):
            return sum(len(name) + length(part) for name, part in value.items())
        if isinstance(value, list):
            return sum(map(length, value))
        return 8 + len(value) if isinstance(value, str) else 8

    chosen, every = (sum(map(length, found)) for found in (
        ({name: row[name] for name in columns if name in row} for row in rows), rows
    ))  # fmt: skip
    share = chosen / every if every else 1.0
    return share * sum(file.stat().st_size for file in files)
