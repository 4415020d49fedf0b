"""A checkpoint's files → a Hugging Face folder that `from_pretrained` loads. No GPU and no worker is needed.

    python -m tp2d_helpers.export CHECKPOINT [--model NAME] [--output FOLDER] [--trust-remote-code]

A DeepSpeed checkpoint under AutoTP has one file of weights per TP rank (and at ZeRO stage 3 one file of fp32 masters
per rank), each with the shards under the whole model's names. A weight is put together by comparing its shard's shape
with the whole shape: the dimension that differs is the one to concatenate. The files are memory-mapped, and one weight
at a time is put together, written and freed: memory peaks at a small multiple of the largest weight.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.utils import cached_file

from tp2d_helpers.config import reason
from tp2d_helpers.engine import PRECISIONS, load_config
from tp2d_helpers.sharding import meta_model
from tp2d_helpers.tokens import load_tokenizer

MAX_FILE_BYTES = 2 * 10**9  # the weights of a larger model are divided among several files
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors calls them
# All that DeepSpeed puts into its files besides tensors and plain containers.
SAFE = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]

Shard = tuple[torch.Size, list[torch.Tensor]]  # of a weight: its shape, and what gives it when flattened, end to end


def export_checkpoint(
    checkpoint: str | Path, model_name: str, folder: str | Path, trust_remote_code: bool = False
) -> Path:
    """Write `config.json`, `generation_config.json`, safetensors and tokenizer of a checkpoint's model.

    The weights are in the dtype they were trained in (bf16: the rounding of the fp32 masters).

    Args:
        checkpoint: the folder that Ray Train kept, with DeepSpeed's folder `step_<n>` in it. It is only read.
        model_name: the model that was trained; its config and tokenizer are copied.
        folder: where the export goes; it appears at once, when it is complete, in place of an older export.

    Raises:
        FileNotFoundError: if the checkpoint lacks a file.
        ValueError: if a file is damaged or holds code, if a weight of the model is not in the checkpoint or does not
            fit together, or if `folder` holds something other than an export.
    """
    folder, tag = Path(folder), checkpoint_tag(Path(checkpoint))
    _check_output(folder, model_name)
    hf_config = load_config(model_name, trust_remote_code)
    hf_config.dtype, ranks = _open(tag)
    whole = {name: parameter.to(hf_config.dtype) for name, parameter in meta_model(hf_config).named_parameters()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent) as scratch:
        new = Path(scratch, "new")
        hf_config.save_pretrained(new)
        load_tokenizer(model_name, trust_remote_code).save_pretrained(new)
        with contextlib.suppress(OSError):  # not every model has one
            shutil.copy(cached_file(model_name, "generation_config.json"), new)
        _write_weights(new, whole, ranks)
        if folder.exists():  # a folder can't be replaced in one step, but in two quick ones
            folder.rename(Path(scratch, "older"))
        new.rename(folder)
    return folder


def checkpoint_tag(folder: Path) -> Path:
    """DeepSpeed's own folder in a checkpoint, `step_<n>`; its file `latest`, which names it, is not needed.

    Raises `FileNotFoundError` if there is none, `ValueError` if there are several.
    """
    found = sorted(path for path in folder.glob("step_*") if path.is_dir() and not path.name.endswith("_universal"))
    if not found:
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no folder step_*")
    if len(found) > 1:
        raise ValueError(f"{folder} must have one folder step_*, and has {[path.name for path in found]}")
    return found[0]


def merge(name: str, shards: list[torch.Tensor], whole: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Put one weight together. Shards of the whole shape are replicas: the first one is taken.

    Raises:
        ValueError: if the shards' shapes don't add up to the whole.
    """
    if shards[0].shape == whole:
        return shards[0].to(dtype).contiguous()
    shapes = [list(shard.shape) for shard in shards]
    cut = next((dim for dim, (part, size) in enumerate(zip(shapes[0], whole, strict=False)) if part != size), 0)
    # Each shard has the whole shape but in the dimension that was cut, and there they add up to it.
    sizes = [shape[cut] for shape in shapes if [*shape[:cut], whole[cut], *shape[cut + 1 :]] == list(whole)]
    if len(sizes) < len(shapes) or sum(sizes) != whole[cut]:
        raise ValueError(f"{name}: shards {shapes} don't make {list(whole)}")
    merged = torch.empty(whole, dtype=dtype)  # `torch.cat` would need another copy where the dtype changes
    for part, shard in zip(merged.split(sizes, dim=cut), shards, strict=True):
        part.copy_(shard)
    return merged


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


def _write_weights(folder: Path, whole: dict[str, torch.Tensor], ranks: list[dict[str, Shard]]) -> None:
    """One safetensors file, or several and their index."""

    def weight(name: str) -> torch.Tensor:
        """A whole weight, put together from the ranks' shards."""
        if any(name not in shards for shards in ranks):
            raise ValueError(f"{name} is not in the checkpoint: was it trained from this model?")
        replicated = ranks[0][name][0] == whole[name].shape
        shards = [_read(*shards[name]) for shards in (ranks[:1] if replicated else ranks)]
        return merge(name, shards, whole[name].shape, whole[name].dtype)

    plan = split_torch_state_dict_into_shards(whole, max_shard_size=MAX_FILE_BYTES)
    for file, names in plan.filename_to_tensors.items():
        # `map` holds on to none of the weights.
        write_safetensors(folder / file, {name: whole[name] for name in names}, map(weight, names))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _read(shape: torch.Size, pieces: list[torch.Tensor]) -> torch.Tensor:
    """A shard; one that is in one piece stays a view of the file."""
    return pieces[0] if pieces[0].shape == shape else torch.cat(pieces)[: shape.numel()].view(shape)


def _open(tag: Path) -> tuple[torch.dtype, list[dict[str, Shard]]]:
    """The dtype that was trained in, and each TP rank's shards by name: mapped into memory, not read."""
    stage_3 = any(tag.glob("zero_pp_rank_*_model_states.pt"))
    pattern = "zero_pp_rank_0_" * stage_3 + "mp_rank_{:02d}_model_states.pt"
    needed = ["module", "param_shapes", "dp_world_size", "mp_world_size", "ds_config"]
    states = [_load(tag / pattern.format(0), *needed)]
    states += [_load(tag / pattern.format(rank), *needed) for rank in range(1, states[0]["mp_world_size"])]
    enabled = [name for name in PRECISIONS if states[0]["ds_config"].get(name, {}).get("enabled")]
    dtype = PRECISIONS[enabled[0] if enabled else "fp32"]
    if stage_3:
        return dtype, [_stage3_shards(tag, tp_rank, state) for tp_rank, state in enumerate(states)]
    return dtype, [{name: (weight.shape, [weight]) for name, weight in state["module"].items()} for state in states]


def _stage3_shards(tag: Path, tp_rank: int, states: dict[str, Any]) -> dict[str, Shard]:
    """Every flattened weight is cut into one equal piece per DP rank, the last one padded. A DP rank's file has its
    pieces, fp32, end to end in the order of `param_shapes`, as a list of tensors: one per ZeRO sub-group.
    """
    shapes = {name: torch.Size(shape) for group in states["param_shapes"] for name, shape in group.items()}
    sizes = {name: -(-shape.numel() // states["dp_world_size"]) for name, shape in shapes.items()}
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    for dp_rank in range(states["dp_world_size"]):
        file = f"zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt"
        path = next(tag.glob(f"*{file}"), tag / file)  # DeepSpeed puts the dtype in front
        groups = _load(path, "optimizer_state_dict")["optimizer_state_dict"].get("fp32_flat_groups", [])
        found, needed = sum(group.numel() for group in groups), sum(sizes.values())
        if found != needed:
            raise ValueError(f"{path} has {found} fp32 master weights; by the model's shapes it must have {needed}")
        for (name, size), end in zip(sizes.items(), itertools.accumulate(sizes.values()), strict=True):
            pieces[name] += _cut(groups, end - size, end)
    return {name: (shape, pieces[name]) for name, shape in shapes.items()}


def _cut(groups: list[torch.Tensor], start: int, end: int) -> Iterator[torch.Tensor]:
    """The elements from `start` to `end` of flat tensors thought of as end to end: views, not copies."""
    for group in groups:
        yield group.detach()[max(start, 0) : max(end, 0)]
        start, end = start - group.numel(), end - group.numel()


def _load(path: Path, *needed: str) -> dict[str, Any]:
    """Load one file, memory-mapped, executing nothing from it but the classes in `SAFE`; check that it has the keys."""
    with open(path, "rb") as file:  # the system's errors are good enough, and name the path
        if not file.read(1):
            raise ValueError(f"{path} is empty")
    try:
        with torch.serialization.safe_globals(SAFE):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"{path} holds code that is not executed: {name[1] if name else reason(error)}") from None
    except Exception as error:  # of several types, by the place where the file ends
        raise ValueError(f"{path} is truncated, or no file of PyTorch's ({reason(error)})") from None
    missing = [key for key in needed if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is no file of a DeepSpeed checkpoint: it has no {', '.join(missing)}")
    return content


def _check_output(folder: Path, model_name: str) -> None:
    """Only an older export is replaced: of a mistyped folder, all would be gone."""
    if folder.resolve() == Path(model_name).resolve():
        raise ValueError(f"{folder} is the model that training began with: take another folder")
    if folder.exists() and any(folder.iterdir()) and not any(folder.glob("model*.safetensors")):
        raise ValueError(f"{folder} holds something other than an export: take another folder, or remove it")


def _recorded_model(path: Path) -> str:
    """`model_name` in the settings that a run recorded."""
    try:
        return str(json.loads(path.read_text())["model_name"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} does not say which model was trained ({reason(error)}): name it by --model") from None


def main(arguments: list[str] | None = None) -> None:
    """Export, and print the folder. A mistake is one line on stderr, and exit code 1."""
    parser = argparse.ArgumentParser(description="Make a Hugging Face folder from a checkpoint; print its path.")
    parser.add_argument("checkpoint", type=Path, help="a folder checkpoint_<n> of a run")
    parser.add_argument("--model", help="the model that was trained (default: model_name in the run's config.json)")
    parser.add_argument("--output", type=Path, help="(default: the folder `export` beside the checkpoint)")
    parser.add_argument("--trust-remote-code", action="store_true", help="execute code that comes with the model")
    given = parser.parse_args(arguments)
    try:
        run = checkpoint_tag(given.checkpoint).resolve().parents[1]
        model = given.model or _recorded_model(run / "config.json")
        print(export_checkpoint(given.checkpoint, model, given.output or run / "export", given.trust_remote_code))
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()
