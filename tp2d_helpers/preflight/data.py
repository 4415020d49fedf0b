"""The check of the data: tokenised, cut into samples, and described in preflight's table."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

from tp2d_helpers.cache.clear import UNUSED_DAYS, clear_cache
from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.data.bad_rows import Remarks
from tp2d_helpers.data.dataloader import GlobalBatchSampler
from tp2d_helpers.data.dataset import TokenDataset, load_samples
from tp2d_helpers.data.files import local_files
from tp2d_helpers.data.overlap import repeated_documents
from tp2d_helpers.data.text import chats_beside_text
from tp2d_helpers.data.tokens import SOURCE
from tp2d_helpers.model.apart import check_apart
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.ropes import check_lengths
from tp2d_helpers.training.samples import NEW_TOKENS, encode_prompts

HELD_OUT = 16  # samples that "auto" holds out, where there are enough


def check_data(config: Config, model: ModelFacts) -> tuple[int, TokenDataset, str, str]:
    """(steps per epoch, the data, what it is, how it is cut). Tokenises it if this node hasn't yet.

    The data's `packing` is what "auto" comes to: "documents" for chats, if the model can keep them apart.

    Raises:
        ConfigError: if it can't be read, is smaller than one global batch, has tokens that the model doesn't know, or
            has no documents to hold out, or the model can't keep packed documents apart.
    """
    removed = clear_cache()
    data, apart = _samples(config, model)
    size, kind = config.samples_per_step, "padded" if data.packing is False else "packed"
    if data.samples < size:
        held_out = f" and {data.eval_samples} held out (eval_samples)" if len(data) > data.samples else ""
        raise ConfigError(
            f"dataset_name = {config.dataset_name!r}: {data.samples} {kind} samples of {config.seq_length} tokens "
            f"({len(data.tokens):,} tokens in all){held_out}, fewer than one global batch of {size} "
            f"(batch_size_per_gpu {config.batch_size_per_gpu} × dp_size {config.dp_size} × "
            f"gradient_accumulation_steps {config.gradient_accumulation_steps}). {_what_fits(config, data)}"
        )
    prompts = encode_prompts(config.model_dump(), chats=data.mask is not None)
    known = [part.meta["highest"] for part in (data, data.other or data)]
    highest = max(*known, 0 if data.packing is True else data.pad, *itertools.chain(*prompts.values()))
    if highest >= model.vocabulary:
        raise ConfigError(
            f"model_name = {config.model_name!r}: its tokenizer gives id {highest}, the model has "
            f"{model.vocabulary} ids; "
            "take the tokenizer that belongs to the model, or resize the model's embeddings"
        )
    steps = GlobalBatchSampler(data.samples, size, 1, 0, 1, config.seed).steps_per_epoch
    steps = min(steps, config.debug_steps or steps)
    files, empty = local_files(config.dataset_name, config.dataset_config), data.meta["rows"] - data.meta["documents"]
    found = [str(files)] if files else []
    chats, loss = describe_chats(data)
    samples = data.samples if data.other else len(data)
    left_out = describe_left_out(data)
    if data.mask is None and (
        beside := chats_beside_text(config.dataset_name, config.dataset_config, config.text_column)
    ):
        found.append(f"the text in {config.text_column!r} is taken, not the chats in {beside!r} beside it")
    found += chats or ([f"rows without text {empty} of {data.meta['rows']:,}"] if files or empty else [])
    found += [f"{len(data.tokens):,} tokens", f"{samples:,} {kind} samples of {config.seq_length}"]
    chosen = [f"{steps} steps per epoch, {size} samples each", *apart, *loss, *left_out]
    chosen += describe_held_out(config, data)
    if prompts:
        count = f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}"
        chosen.append(f"{count} continued by up to {NEW_TOKENS} tokens at each evaluation")
    if removed:
        chosen.append(f"removed from the cache, unused for {UNUSED_DAYS} days or abandoned: {len(removed)} folders")
    return steps, data, f"{config.dataset_name}: {', '.join(found)}", "; ".join(chosen)


def _samples(config: Config, model: ModelFacts) -> tuple[TokenDataset, list[str]]:
    """(the run's samples, how packed documents are kept apart and what is lost of them, or why they are not packed)."""
    names = (*SOURCE, "seq_length", "eval_samples", "eval_dataset_name")
    settings = {name: getattr(config, name) for name in names}
    settings["eval_samples"] = _held_out(config, settings)
    data = load_samples(**settings, packing=config.packing)
    if data.packing != "documents":
        return data, []
    try:
        check_lengths(model.config, config.seq_length)
        how = check_apart(model.config, config.precision, bool(config.use_gpu))
    except ConfigError as error:
        if config.packing != "auto":
            raise
        why = str(error).partition(" (")[2].partition("). ")[0]
        return load_samples(**settings, packing=True), [f"packing = True, as documents can't be kept apart ({why})"]
    padding = 1 - data.lengths.sum() / (len(data.lengths) * data.seq_length)
    said = [f"whole documents packed{' (auto)' * (config.packing == 'auto')}, kept apart {how}, {padding:.1%} padding"]
    if data.cut_off:
        lost = data.cut_off / (data.cut_off + data.lengths.sum())
        said.append(f"{lost:.1%} of the tokens lost, as {data.too_long:,} documents are longer than {data.seq_length}")
        said[-1] += " (packing = True keeps them)" * bool(lost >= 0.01)
    return data, said


def _what_fits(config: Config, data: TokenDataset) -> str:
    """Settings with which there is at least one step, for those who have little data."""
    if data.samples >= config.dp_size:
        return f"This works: batch_size_per_gpu = {data.samples // config.dp_size}, gradient_accumulation_steps = 1"
    if data.packing is True and (length := len(data.tokens) // (2 * config.samples_per_step)) >= 8:
        return f"This works: seq_length = {length}"
    return f"Take more data, or a dp_size of at most {max(data.samples, 1)} with batch_size_per_gpu = 1"


def _held_out(config: Config, settings: dict[str, Any]) -> int:
    """How many samples to hold out: of "auto" at most `HELD_OUT`, and an eighth of what there is."""
    if config.eval_samples != "auto":
        return config.eval_samples
    if config.eval_dataset_name:
        return min(HELD_OUT, load_samples(**{**settings, "eval_samples": 1}, packing=config.packing).other.samples)
    everything = load_samples(**{**settings, "eval_samples": 0}, packing=config.packing)
    number = min(HELD_OUT, everything.samples // 8)
    while number:
        with contextlib.suppress(ConfigError):  # too few, or too much alike
            data = TokenDataset(everything.folder, config.seq_length, config.packing, number)
            if data.samples >= config.samples_per_step:
                return number
        number //= 2
    if config.eval_interval or config.sample_prompts.strip() or config.keep_checkpoints_by == "eval_loss":
        raise ConfigError(
            f"eval_samples = 'auto': dataset_name = {config.dataset_name!r} has {everything.samples} samples of "
            f"{config.seq_length} tokens, too few to hold some out, which eval_interval, sample_prompts and "
            "keep_checkpoints_by need; set eval_dataset_name, or take more data"
        )
    return 0


def describe_held_out(config: Config, data: TokenDataset) -> list[str]:
    """What a run is evaluated on, for preflight's table; nothing if it isn't.

    Raises:
        ConfigError: if the training has all documents that it is evaluated on.
    """
    if data.other:
        repeated, documents = repeated_documents(data)
        if repeated == documents:
            raise ConfigError(
                f"eval_dataset_name = {config.eval_dataset_name!r}: the text of all {documents:,} documents that it "
                f"would be evaluated on is in dataset_name = {config.dataset_name!r}, too; take a dataset that "
                "training does not see, or '', which holds out whole documents of that one"
            )
        also = f", of whose {documents:,} documents {repeated:,} are trained on, too" if repeated else ""
        samples = f"{data.eval_samples} of {data.other.samples:,} samples"
        return [f"evaluated on {samples} of {config.eval_dataset_name}{also}"]
    if not data.eval_samples:
        return ["no samples held out, as there are few"] if config.eval_samples == "auto" else []
    return [f"{data.eval_samples} samples held out, of {data.held_out} documents"]


def describe_left_out(data: TokenDataset) -> list[str]:
    """What of the rows is not trained on, for preflight's table: rows that the user left out, what templates drop."""
    remarks = Remarks.from_json(data.meta["remarks"])
    found = [f"left out as {kind}: {bad['count']:,} ({'; '.join(bad['first'])})" for kind, bad in remarks.bad.items()]
    return found + [f"{what} ({count:,})" for what, count in remarks.notes.items()]


def describe_text(data: TokenDataset) -> list[str]:
    """What documents begin and end with, for preflight's table."""
    begin, end = data.meta["begin"], data.meta["end"]
    return [f"documents begin with {begin!r} and end in {end!r}, as the tokenizer has it" if begin else
            f"documents end in {end!r}"]  # fmt: skip


def describe_chats(data: TokenDataset) -> tuple[list[str], list[str]]:
    """(what was found in chats, what becomes of them) for preflight's table."""
    if data.mask is None:
        return [], describe_text(data)
    meta, length = data.meta, data.seq_length
    found = [f"{meta['format']}: {meta['documents']:,} examples, {meta['turns']:,} turns",
             f"{meta['with_loss'] / meta['tokens']:.1%} of the tokens with loss"]  # fmt: skip
    if data.too_long:
        found.append(f"longer than {length} tokens: {data.too_long:,}")
    ends = {"template": "by the chat template", "header": "by the next header, as the chat template has no other",
            "tokenizer": "added to the last, as the chat template ends it by no token"}[meta["ends"]]  # fmt: skip
    chosen = "loss on all tokens, of all turns"
    if meta["loss_on"] == "assistant":
        end, example = meta["stop"], Remarks.from_json(meta["remarks"]).example
        chosen = f"loss on the assistant's turns, which end in {end!r} ({ends}): {example!r}"
        if not meta["stop"]:
            chosen = "loss on the assistant's turns, which end in no token: the tokenizer has none"
    if not meta["headed"]:
        chosen += "; headers have loss, too, as the chat template takes no add_generation_prompt"
    if meta["date"]:
        chosen += f"; the chat template writes the date, {meta['date']} (chat_date)"
    if meta["absent"]:
        chosen += f"; text to this tokenizer, which has no such tokens: {', '.join(meta['absent'])}"
    if data.too_long:
        cut = "go on in the next sample" if data.packing is True else "are cut there"
        left_out = f" ({data.left_out:,} left out, as no answer begins before)" if data.left_out else ""
        chosen += f"; longer examples {cut}{left_out}"
    return found, [chosen]
