"""Text → tokens, once per node: one flat file in the cache, which all ranks of the node map into memory."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from tqdm import tqdm

from tp2d_helpers import heartbeat
from tp2d_helpers.cache import build_once, cache_dir, check_space, clear_cache, parts_of
from tp2d_helpers.cache.space import size_of
from tp2d_helpers.cgroups import cores
from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.bad_rows import Remarks
from tp2d_helpers.data.chat.template import settled_date
from tp2d_helpers.data.chat_tokens import ChatEncoder, read_segments
from tp2d_helpers.data.folder import Part, TokenWriter
from tp2d_helpers.data.pool import MOST, Job, run
from tp2d_helpers.data.rows import lengths
from tp2d_helpers.data.text import is_chats, load_text, source_stamp
from tp2d_helpers.data.text_tokens import TextEncoder
from tp2d_helpers.data.tokenizer import fingerprint, load_tokenizer, writes_date

LAYOUT = 5  # of the folder that `prepare_tokens` makes; another one is not taken for it
SMALL = 4_000_000  # bytes of text; starting other processes takes as long as tokenising these
LONG = 5  # seconds of tokenising, after which a line says how fast it was

# The settings of a run that `prepare_tokens` takes.
SOURCE = ("model_name", "dataset_name", "dataset_config", "text_column", "text_files", "dataset_percentage",
          "trust_remote_code", "chat_template", "chat_date", "loss_on", "leave_out_rows")  # fmt: skip


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
    chat_date: str = "",
    loss_on: str = "assistant",
    leave_out_rows: str = "",
) -> Path:
    """Tokenise a dataset into the cache, once per node, and return the folder, which `folder` describes.

    It is told by what it is made of: the contents of the tokenizer and its templates, the dataset's files or commit,
    the versions of what tokenises, and the date, if the template writes it. Before a new one is made, the cache is
    rid of what nobody will use again (`clear_cache`).

    Args:
        chat_template, chat_date, loss_on: for chats; see `load_tokenizer` and `ChatEncoder`.
        leave_out_rows: kinds of bad rows (`bad_rows.KINDS`) to train without, with commas between.

    Raises:
        ConfigError: for a dataset that can't be loaded, lacks the column, has no text in it, or bad rows.
    """
    tokenizer = load_tokenizer(model_name, trust_remote_code, chat_template)
    chat_date = settled_date(chat_date)
    versions = [LAYOUT, transformers.__version__, tokenizers.__version__, platform.python_version()]
    source = [dataset_name, dataset_config, text_column, dataset_percentage, text_files]
    made_of = [source_stamp(dataset_name, dataset_config), fingerprint(tokenizer)]  # the demo's text comes with Python
    request = [source, made_of, loss_on, chat_date if writes_date(tokenizer) else "", versions]
    key = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        """Load and tokenise; called if the cache hasn't got the folder."""
        clear_cache()
        text = load_text(dataset_name, dataset_config, dataset_percentage, text_column, text_files)
        tokenize(text, tokenizer, folder, progress, loss_on, parts_of(target), chat_date)

    target = cache_dir() / f"tokens-{key}"
    folder = build_once(target, build)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    Remarks.from_json(meta["remarks"]).check(dataset_name, meta["rows"], leave_out_rows)
    if not meta["documents"]:
        raise ConfigError(f"leave_out_rows = {leave_out_rows!r}: none of the {meta['rows']:,} rows is left to train on")
    return folder


def tokenize(
    text: datasets.Dataset,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
    progress: bool = True,
    loss_on: str = "assistant",
    parts: Path | None = None,
    chat_date: str = "",
) -> None:
    """Write the tokens of text or chats, as `load_text` gives them, into `folder` (see `TokenWriter`).

    Memory depends neither on the number of rows nor on the length of a document. `meta.json` also has what the encoder
    says (`facts`), and of chats: `turns` (messages) and `with_loss` (tokens).

    Args:
        text: a column of text or chats, where they stand, and what is wrong with them.
        parts: a folder in which the parts of a large dataset are kept until all are there; without one, and for a small
            dataset, this process tokenises by itself.

    Raises:
        ConfigError: if there is nothing to learn, and as `ChatEncoder`.
    """
    column, size, chats, begun = text.column_names[0], sum(lengths(text)), is_chats(text), time.monotonic()
    encoder = ChatEncoder(tokenizer, column, loss_on, chat_date) if chats else TextEncoder(tokenizer)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    highest = 0 if chats else max([*encoder.begin, *encoder.end])
    bar = tqdm(total=size, desc="Tokenising", unit="B", unit_scale=True, disable=not progress, mininterval=1)
    with bar, TokenWriter(folder, highest, masked=chats) as writer:

        def tick(size: int) -> None:
            """So many bytes more are done."""
            heartbeat.pulse()  # the watchdog of a worker sees what this process does, and not its children
            bar.update(size)

        job = Job(encoder, text, parts or folder, min(MOST, cores()))
        found = [0, 0]  # parts that were there, parts that are made
        by_parts = bool(parts) and size > SMALL
        # A token is four bytes, of text and in the file; with its parts, there are two of them for a while.
        there = size_of(parts) if by_parts else 0
        check_space(folder, size * (1 + by_parts) - there, f"the tokens of {size / 1e6:,.1f} MB of text")
        for part, made in run(job, tick) if by_parts else _here(job, tick):
            writer.add(part)
            found[made] += 1
        if not (writer.digests or writer.remarks.bad):
            raise ConfigError(f"dataset_name: no text in the {len(text)} rows of column {column!r}")
        writer.finish(len(text), pad if pad is not None else end, **encoder.facts())
    if progress and (seconds := time.monotonic() - begun) > LONG:
        there = f", {found[False]} of {sum(found)} parts were there" if found[False] else ""
        print(f"tokenised {size / 1e6:,.0f} MB in {seconds:.0f} s: {size / 1e6 / seconds:.1f} MB/s{there}", flush=True)


def _here(job: Job, tick: Callable[[int], None]) -> Iterator[tuple[Part, bool]]:
    """As `run`, in this process and without files."""
    return ((job.encoder.encode(job.rows, begin, end, tick), True) for begin, end in job.parts())


def example_segments(settings: dict[str, Any], number: int = 0) -> list[tuple[str, bool]]:
    """Example `number` of a run's data, decoded: (text, whether it has loss), in order.

    Args:
        settings: as `Config.model_dump()` gives them.
    """
    folder = prepare_tokens(**{name: settings[name] for name in SOURCE})
    return read_segments(folder, load_tokenizer(settings["model_name"], settings["trust_remote_code"]), number)
