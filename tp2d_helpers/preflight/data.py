"""The check of the data: tokenised, cut into samples, and described in preflight's table."""

from __future__ import annotations

import itertools

from tp2d_helpers.cache.clear import UNUSED_DAYS, clear_cache
from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.data.dataloader import GlobalBatchSampler
from tp2d_helpers.data.dataset import TokenDataset, load_samples
from tp2d_helpers.data.files import local_files
from tp2d_helpers.data.overlap import repeated_documents
from tp2d_helpers.data.tokens import SOURCE
from tp2d_helpers.model.apart import check_apart
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.ropes import check_lengths
from tp2d_helpers.training.samples import NEW_TOKENS, encode_prompts


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
        held_out = f" and {config.eval_samples} held out (eval_samples)" if len(data) > data.samples else ""
        raise ConfigError(
            f"dataset_name = {config.dataset_name!r}: {data.samples} {kind} samples of {config.seq_length} tokens "
            f"({len(data.tokens):,} tokens in all){held_out}, fewer than one global batch of {size} "
            f"(batch_size_per_gpu {config.batch_size_per_gpu} × dp_size {config.dp_size} × "
            f"gradient_accumulation_steps {config.gradient_accumulation_steps}). Take a smaller one, shorter samples "
            "or more data."
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
    found += chats or ([f"rows without text {empty} of {data.meta['rows']:,}"] if files or empty else [])
    found += [f"{len(data.tokens):,} tokens", f"{samples:,} {kind} samples of {config.seq_length}"]
    chosen = [f"{steps} steps per epoch, {size} samples each", *apart, *loss]
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
        samples = f"{config.eval_samples} of {data.other.samples:,} samples"
        return [f"evaluated on {samples} of {config.eval_dataset_name}{also}"]
    return [f"{config.eval_samples} samples held out, of {data.held_out} documents"] if config.eval_samples else []


def describe_chats(data: TokenDataset) -> tuple[list[str], list[str]]:
    """(what was found in chats, what becomes of them) for preflight's table; nothing of plain text."""
    if data.mask is None:
        return [], []
    meta, kept, length = data.meta, data.meta["documents"], data.seq_length
    found = [f"{meta['format']}: {kept:,} examples, {meta['turns']:,} turns",
             f"{meta['with_loss'] / meta['tokens']:.1%} of the tokens with loss"]  # fmt: skip
    if meta["rows"] > kept:
        found.append(f"left out, without an answer: {meta['rows'] - kept:,} of {meta['rows']:,}")
    if data.too_long:
        found.append(f"longer than {length} tokens: {data.too_long:,}")
    chosen = {
        "assistant": "loss on the assistant's turns with their stop tokens",
        "all": "loss on all tokens, of all turns",
    }[meta["loss_on"]]
    if data.too_long:
        cut = "go on in the next sample" if data.packing is True else "are cut there"
        left_out = f" ({data.left_out:,} left out, as no answer begins before)" if data.left_out else ""
        chosen += f"; longer examples {cut}{left_out}"
    return found, [chosen]
