"""The weights in a checkpoint's files: each rank's shards, mapped into memory, and a whole weight made of them."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from tp2d_helpers.config import reason
from tp2d_helpers.model.cuts import Cut
from tp2d_helpers.model.engine import PRECISIONS


def _zero_stage(kind: type, name: str) -> ZeroStageEnum:
    """A ZeRO stage by its name, and nothing else.

    It stands in for `getattr`, which must not be called from a file: Python 3.11.0 to 3.11.3, Debian 12's among them,
    writes a member of an enum as `getattr(ZeroStageEnum, name)`.
    """
    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError(f"GLOBAL getattr of {kind!r}, {name!r}")
    return ZeroStageEnum[name]


# All that DeepSpeed puts into its files besides tensors and plain containers.
SAFE = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, (_zero_stage, "builtins.getattr")]

Pieces = tuple[torch.Size, list[torch.Tensor]]  # of a shard: its shape, and what gives it when flattened, end to end


def merge(
    name: str, shards: list[torch.Tensor], whole: torch.Size, dtype: torch.dtype, cut: Cut | None
) -> torch.Tensor:
    """Put one weight together. Without a cut, all ranks have the whole: the first one is taken.

    Raises:
        ValueError: if the shards are not of the planned shapes.
    """
    planned = [cut.shape(whole, rank) for rank in range(len(cut.ranges))] if cut else [whole]
    if [shard.shape for shard in shards] != planned:
        found = [list(shard.shape) for shard in shards]
        raise ValueError(f"{name}: shards {found} don't make {list(whole)}: was it trained from this model?")
    if not cut:
        return shards[0].to(dtype).contiguous()
    merged = torch.empty(whole, dtype=dtype)
    for rank, shard in enumerate(shards):
        cut.put(merged, shard, rank)
    return merged


def read(shape: torch.Size, pieces: list[torch.Tensor]) -> torch.Tensor:
    """A shard; one that is in one piece stays a view of the file."""
    return pieces[0] if pieces[0].shape == shape else torch.cat(pieces)[: shape.numel()].view(shape)


def whole_weight(
    name: str, ranks: list[dict[str, Pieces]], shape: torch.Size, dtype: torch.dtype, cut: Cut | None
) -> torch.Tensor:
    """A whole weight, put together from the shards of the TP ranks, or taken from the first if they have it whole.

    Raises:
        ValueError: if a rank lacks it, or the shards don't make it.
    """
    if any(name not in shards for shards in ranks):
        raise ValueError(f"{name} is not in the checkpoint: was it trained from this model?")
    return merge(name, [read(*shards[name]) for shards in (ranks if cut else ranks[:1])], shape, dtype, cut)


def open_shards(tag: Path) -> tuple[torch.dtype, list[dict[str, Pieces]]]:
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


def _stage3_shards(tag: Path, tp_rank: int, states: dict[str, Any]) -> dict[str, Pieces]:
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
    buffers = {name: (tensor.shape, [tensor]) for name, tensor in states["module"].items() if name not in shapes}
    return buffers | {name: (shape, pieces[name]) for name, shape in shapes.items()}


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
