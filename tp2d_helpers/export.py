"""A checkpoint's files → a Hugging Face folder that `from_pretrained` loads. No GPU and no worker is needed.

A DeepSpeed checkpoint under AutoTP has one file of weights per TP rank (and at ZeRO stage 3 one file of fp32 masters
per rank), each with the shards under the whole model's names. A weight is put together by comparing its shard's shape
with the whole shape: the dimension that differs is the one to concatenate.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import GenerationConfig

from tp2d_helpers.engine import load_config, meta_model
from tp2d_helpers.tokens import load_tokenizer

# All that DeepSpeed puts into its files besides tensors and plain containers.
SAFE = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def export_checkpoint(
    checkpoint: str | Path, model_name: str, folder: str | Path, trust_remote_code: bool = False
) -> Path:
    """Write `config.json`, `generation_config.json`, safetensors and tokenizer of a checkpoint's model.

    The weights are in the dtype they were trained in (bf16: the rounding of the fp32 masters).

    Args:
        checkpoint: the folder that Ray Train kept, with DeepSpeed's `latest` in it.
        model_name: the model that was trained; its config and tokenizer are copied.
        folder: where the export goes; it appears at once, when it is complete, in place of an older one.

    Raises:
        FileNotFoundError: if the checkpoint lacks a file.
        ValueError: if a weight of the model is not in it, or does not fit together.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    tag = checkpoint / (checkpoint / "latest").read_text().strip()
    hf_config = load_config(model_name, trust_remote_code)
    shards = _load_shards(tag)
    dtype = torch.bfloat16 if _trained_in(tag, "bf16") else torch.float16 if _trained_in(tag, "fp16") else torch.float32
    whole = {name: parameter.to(dtype) for name, parameter in meta_model(hf_config).named_parameters()}
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    plan = split_torch_state_dict_into_shards(whole, max_shard_size="2GB")
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: merge(name, [shard[name] for shard in shards], whole[name].shape, dtype) for name in names}
        save_file(tensors, scratch / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    hf_config.dtype = dtype
    hf_config.save_pretrained(scratch)
    load_tokenizer(model_name, trust_remote_code).save_pretrained(scratch)
    with contextlib.suppress(OSError):  # not every model has one
        GenerationConfig.from_pretrained(model_name).save_pretrained(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return folder


def merge(name: str, shards: list[torch.Tensor], whole: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Put one weight together. Shards of the whole shape are replicas: the first one is taken.

    Raises:
        ValueError: if the shards' shapes don't add up to the whole.
    """
    differing = [dim for dim in range(len(whole)) if shards[0].shape[dim] != whole[dim]]
    merged = torch.cat(shards, dim=differing[0]) if differing else shards[0]
    if merged.shape != whole:
        raise ValueError(f"{name}: shards {[list(s.shape) for s in shards]} don't make {list(whole)}")
    return merged.to(dtype).contiguous()


def _load(path: Path) -> dict:
    """Load one file, memory-mapped, executing nothing from it but the classes in `SAFE`."""
    with torch.serialization.safe_globals(SAFE):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _trained_in(tag: Path, precision: str) -> bool:
    config = _load(sorted(tag.glob("*mp_rank_00_model_states.pt"))[0])["ds_config"]
    return bool(config.get(precision, {}).get("enabled"))


def _load_shards(tag: Path) -> list[dict[str, torch.Tensor]]:
    """The weights by name of each TP rank, in the order of the ranks."""
    files = sorted(tag.glob("mp_rank_*_model_states.pt"))
    if files:  # ZeRO stages 0 to 2
        return [_load(file)["module"] for file in files]
    files = sorted(tag.glob("zero_pp_rank_0_mp_rank_*_model_states.pt"))
    if not files:
        raise FileNotFoundError(f"{tag} holds no *_model_states.pt")
    return [dict(_stage3_weights(tag, tp_rank, _load(file))) for tp_rank, file in enumerate(files)]


def _stage3_weights(tag: Path, tp_rank: int, states: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """The TP shard at ZeRO stage 3: each DP rank has an equal slice, padded, of every flattened weight."""
    flat = []
    for dp_rank in range(states["dp_world_size"]):
        (file,) = tag.glob(f"*zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt")
        flat.append(torch.cat([group.flatten() for group in _load(file)["optimizer_state_dict"]["fp32_flat_groups"]]))
    offset = 0
    for name, shape in ((name, shape) for group in states["param_shapes"] for name, shape in group.items()):
        size = -(-shape.numel() // len(flat))
        yield name, torch.cat([part[offset : offset + size] for part in flat])[: shape.numel()].view(shape)
        offset += size
