"""A checkpoint's files → a Hugging Face folder that `from_pretrained` loads. No GPU and no worker is needed.

A DeepSpeed checkpoint under AutoTP has one file of weights per TP rank (and at ZeRO stage 3 one file of fp32 masters
per rank), each with the shards under the whole model's names. A weight is put together by comparing its shard's shape
with the whole shape: the dimension that differs is the one to concatenate. The files are memory-mapped, and one weight
at a time is put together, written and freed: memory peaks at a small multiple of the largest weight.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file

from tp2d_helpers.checkpoint.adapters import Adapters, base_model
from tp2d_helpers.checkpoint.card import model_card, run_settings
from tp2d_helpers.checkpoint.config_file import add_older_fields
from tp2d_helpers.checkpoint.disk import check_space
from tp2d_helpers.checkpoint.identity import PARTS, check_model, model_identity
from tp2d_helpers.checkpoint.mark import check_output, write_mark
from tp2d_helpers.checkpoint.run_folder import checkpoint_tag
from tp2d_helpers.checkpoint.shards import Pieces, open_shards, whole_weight
from tp2d_helpers.checkpoint.tokenizer_files import write_tokenizer
from tp2d_helpers.data.chat_tokens import stop_token
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.plan import Plan

MAX_FILE_BYTES = 2 * 10**9  # the weights of a larger model are divided among several files
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.bool: "BOOL",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}  # fmt: skip — as safetensors calls them
# Published models call a class otherwise than transformers, and vLLM and llama.cpp know it by that name alone.
PUBLISHED_AS = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}


def export_checkpoint(
    checkpoint: str | Path, model_name: str, folder: str | Path, trust_remote_code: bool = False
) -> Path:
    """Write `config.json`, `generation_config.json`, safetensors, tokenizer and model card of a checkpoint's model.

    With LoRA, the weights have the adapters merged into them, and a folder `adapter` in it has these alone, for peft.

    The safetensors have the names and values that `save_pretrained` would give the trained model: its weights, in the
    dtype they were trained in (bf16: the rounding of the fp32 masters), and its persistent buffers. To publish it:
    `hf upload <user>/<repository> <run>/export`.

    Args:
        checkpoint: the folder that Ray Train kept, with DeepSpeed's folder `step_<n>` in it. It is only read.
        model_name: the model that training began with, wherever it is now; its config, tokenizer and code are copied.
        folder: where the export goes; it appears at once, when it is complete, in place of an older export.

    Raises:
        FileNotFoundError: if the checkpoint lacks a file.
        ValueError: if a file is damaged or holds code, if a weight of the model is not in the checkpoint or does not
            fit together, if the model is not the one that the run began with, if `folder` holds something other than an
            export, or if there is too little room for it.
    """
    folder, tag = Path(folder), checkpoint_tag(Path(checkpoint))
    check_output(folder, model_name)
    model, settings = ModelFacts.read(model_name, trust_remote_code), run_settings(tag.parent)
    whole, weight, adapters = _trained(tag, model, model_name, settings, trust_remote_code)
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder, sum(tensor.nbytes for tensor in whole.values()), "the export")
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        _write_config(new, model, model_name, settings, trust_remote_code)
        _write_weights(new, model.meta, whole, weight)
        if adapters:
            adapters.save(new / "adapter")
        model_card(tag.parent, model_name, model.part_of).save(new / "README.md")
        write_mark(new)
        check_output(folder, model_name)  # it may have taken minutes
        if folder.exists():  # a folder can't be replaced in one step, but in two quick ones
            folder.rename(Path(scratch, "older"))
        new.rename(folder)
    return folder


def _trained(
    tag: Path, model: ModelFacts, model_name: str, settings: dict[str, Any], trust_remote_code: bool
) -> tuple[dict[str, torch.Tensor], Callable[[str], torch.Tensor], Adapters | None]:
    """(by name, weights and buffers of the shapes and dtypes to write, what gives one of them, LoRA's adapters).

    Raises:
        ValueError: if they would be put together with a model that the run did not begin with.
    """
    model.config.dtype, ranks = open_shards(tag)
    whole = {name: parameter.to(model.config.dtype) for name, parameter in model.meta.named_parameters()}
    tied = dict(model.meta.named_parameters(remove_duplicate=False))  # under each of their names
    names = {other: name for name, weight in model.meta.named_parameters() for other in tied if tied[other] is weight}
    whole |= {name: _buffer(name, ranks) for name in model.meta.state_dict() if name not in tied}
    plan = Plan.of(model.meta, len(ranks))
    lora = settings | {"model_name": model_name} if settings.get("lora_rank") else {}
    adapters = Adapters(model, plan, ranks, lora) if lora else None
    # What a model's class keeps from training is in no checkpoint.
    frozen = {name for name, weight in tied.items() if not weight.requires_grad and name not in ranks[0]}
    parts = PARTS if adapters or frozen else [part for part in PARTS if part != "weights"]
    identity = model_identity(model_name, trust_remote_code)
    check_model(settings, identity, model_name, parts, cure=", or name the folder where it is now (--model)")
    if adapters and not settings.get("model"):
        warnings.warn(f"the run doesn't say what it began with: merged into {model_name} as it is now", stacklevel=3)
    base = base_model(model, model_name, settings, trust_remote_code) if adapters or frozen else None
    # Of what isn't trained, its class may keep some in another dtype.
    same = [name for name in whole if name in frozen or (adapters and name in tied and not adapters.changes(name))]
    whole |= {name: torch.empty_like(base.get_parameter(name), device="meta") for name in same}

    def weight(name: str) -> torch.Tensor:
        """A whole weight, or buffer."""
        if adapters and name in tied:
            return adapters.merge(name, base)
        if name in frozen:
            return base.get_parameter(name).detach().contiguous()
        return whole_weight(name, ranks, whole[name].shape, whole[name].dtype, plan.cuts.get(names.get(name, name)))

    return whole, weight, adapters


def _write_config(
    folder: Path, model: ModelFacts, model_name: str, settings: dict[str, Any], trust_remote_code: bool
) -> None:
    """All but the weights: config, code that the model comes with, tokenizer, what generation needs."""
    own = type(model.meta).__name__
    model.config.architectures = [PUBLISHED_AS.get(own, own)]
    if model.meta.is_remote_code():  # the config and the tokenizer see to their own files
        custom_object_save(model.meta, folder, config=model.config)
    model.config.save_pretrained(folder)
    given, _ = model.config.get_config_dict(model_name)
    add_older_fields(folder, model.config, given.get("text_config", {}) if model.part_of else given)
    # With the chat template that the run was trained by: what answers must be asked in the same form.
    template = settings.get("template")  # older runs recorded no more than the file's name
    if not template and (file := settings.get("chat_template")):
        template = load_tokenizer(model_name, trust_remote_code, file).chat_template
    tokenizer = load_tokenizer(model_name, trust_remote_code)
    write_tokenizer(folder, model_name, tokenizer, template, trust_remote_code)
    with contextlib.suppress(OSError):  # not every model has one
        shutil.copy(cached_file(model_name, "generation_config.json"), folder)
    if settings.get("chats"):
        _end_turns(folder, model, tokenizer)


def _end_turns(folder: Path, model: ModelFacts, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """See that generation stops where the chats' answers do: a base model knows its end-of-text token alone."""
    stop, known = stop_token(tokenizer), GenerationConfig.from_model_config(model.config)
    if (folder / "generation_config.json").exists():
        known = GenerationConfig.from_pretrained(folder)
    ends = known.eos_token_id if isinstance(known.eos_token_id, list) else [known.eos_token_id]
    if stop is not None and stop not in ends:
        known.eos_token_id = [end for end in ends if end is not None] + [stop]
        known.save_pretrained(folder)


def write_safetensors(path: Path, plan: dict[str, torch.Tensor], tensors: Iterable[torch.Tensor]) -> None:
    """Write a safetensors file from contiguous tensors that come one at a time, in the order of `plan`.

    `plan` has for each name a tensor, meta ones will do, of the shape and dtype that come. The library's own writer
    wants all tensors at once. Source of the format: https://github.com/huggingface/safetensors#format
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in plan.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.view(-1).view(torch.uint8).numpy())  # as bytes: numpy has no bf16
            del tensor  # before the next one is made


def _buffer(name: str, ranks: list[dict[str, Pieces]]) -> torch.Tensor:
    """Shape and dtype of a persistent buffer, which every rank has whole."""
    if name not in ranks[0]:
        raise ValueError(f"{name} is not in the checkpoint: was it trained from this model?")
    return torch.empty_like(ranks[0][name][1][0], device="meta")


def published(
    model: torch.nn.Module, whole: dict[str, torch.Tensor], weight: Callable[[str], torch.Tensor]
) -> tuple[dict[str, torch.Tensor], Callable[[str], torch.Tensor]]:
    """The names and forms of a model's published files, where `transformers` has its own for what is in memory.

    Args:
        model: without storage.
        whole: by the names in memory, tensors of the shapes and dtypes to write; meta ones will do.
        weight: gives one of them, by its name.

    Returns:
        (the same by published names, what gives one of those). It comes from one weight in memory; only where the
        published one is made of several are all of them held at once.
    """

    def revert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights as they are published."""
        return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, weights).items()}

    targets = revert(dict(whole))
    try:
        parts = {name: revert({name: tensor}) for name, tensor in whole.items()}
    except Exception:  # one of several alone
        parts = {}
    shapes = {target: tensor.shape for part in parts.values() for target, tensor in part.items()}
    if shapes != {target: tensor.shape for target, tensor in targets.items()}:
        return targets, revert({name: weight(name) for name in whole}).__getitem__
    sources = {target: name for name, part in parts.items() for target in part}
    several = functools.lru_cache(maxsize=1)(lambda source: revert({source: weight(source)}))

    def target(name: str) -> torch.Tensor:
        """A published weight; of those that share a source, which come one after the other, it is made once."""
        source = sources[name]
        return several(source)[name] if len(parts[source]) > 1 else revert({source: weight(source)})[name]

    return targets, target


def _write_weights(
    folder: Path, model: torch.nn.Module, whole: dict[str, torch.Tensor], weight: Callable[[str], torch.Tensor]
) -> None:
    """One safetensors file, or several and their index.

    Args:
        model: without storage.
        whole: by its names, tensors of the shapes and dtypes to write.
        weight: gives one of them, by its name.
    """
    targets, target = published(model, whole, weight)
    # Each with a storage of its own: of an expert, that of all experts would be counted.
    own = {name: torch.empty_like(tensor, device="meta") for name, tensor in targets.items()}
    plan = split_torch_state_dict_into_shards(own, max_shard_size=MAX_FILE_BYTES)
    for file, names in plan.filename_to_tensors.items():
        # `map` holds on to none of the weights.
        write_safetensors(folder / file, {name: targets[name] for name in names}, map(target, names))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
