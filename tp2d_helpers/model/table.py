"""What becomes of each weight, as a table; and whether AutoTP has made of each what was planned."""

from __future__ import annotations

from typing import Any

import torch

from tp2d_helpers.model.cuts import Cut
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.rehearsal import rehearse


def shard_table(model: torch.nn.Module, tp_size: int) -> list[list[Any]]:
    """What becomes of each kind of weight: rows of [name, cut, whole shape, shard shape, gradient, count].

    `setup_model_with_autotp` compares every shard with this plan. Layers of one kind share a row; a meta model will do.
    """
    rows: dict[str, list[Any]] = {}
    plan, summed = Plan.of(model, tp_size), rehearse(model.config, tp_size).summed
    head = model.get_output_embeddings()
    vocabulary = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    for name, parameter in model.named_parameters():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        cut, whole, shard = plan.cuts.get(name), list(parameter.shape), list(plan.shape(name, parameter.shape))
        how = "by vocabulary" if cut and id(parameter) in vocabulary else _how(cut, parameter.ndim)
        gradient = "summed over the TP ranks" if name in summed else "the same on all" if not cut else "its own"
        if cut and cut.copies > 1:
            gradient = f"summed over the {cut.copies} ranks that share it"
        rows.setdefault(kind, [f"`{kind}`", how, str(whole), str(shard), gradient, 0])[-1] += 1
    return list(rows.values())


def _how(cut: Cut | None, dimensions: int) -> str:
    """In words. PyTorch keeps a weight as [out, in]: cutting `out` divides the columns of the A in X·A."""
    if cut is None:
        return "none"
    experts = ", each expert" * (dimensions == 3)
    rows = cut.dim == (2 if experts else 0 if cut.transposed else 1)
    parts = f", {len(cut.ranges[0])} parts" * (len(cut.ranges[0]) > 1)
    return ("row-wise" if rows else "column-wise") + parts + experts


def shard_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of this rank's shard; ZeRO stage 3, which cuts it further, keeps it in `ds_shape`."""
    return getattr(parameter, "ds_shape", parameter.shape)


def check_shards(module: torch.nn.Module, planned: dict[str, torch.Size]) -> None:
    """Compare a sharded model with what was planned. Raises `RuntimeError` with the weights that differ."""
    found = {name: shard_shape(parameter) for name, parameter in module.named_parameters()}
    wrong = [f"{n}: {list(found.get(n, []))}, planned {list(s)}" for n, s in planned.items() if found.get(n) != s]
    if wrong:
        raise RuntimeError(f"AutoTP did not shard the model as planned ({len(wrong)} weights): " + "; ".join(wrong[:4]))
