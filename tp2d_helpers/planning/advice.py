"""The ways out of a setting that doesn't fit into a GPU, in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.planning.candidates import GIB, MODES, SAFE, Candidate, candidates
from tp2d_helpers.planning.constants import constants_of
from tp2d_helpers.planning.memory import Memory, Setting
from tp2d_helpers.planning.step_time import step_time
from tp2d_helpers.speed.devices import Device

WAYS = 3  # that a refusal names


def advice(model: ModelFacts, device: Device, setting: Setting, memory: Memory) -> str:
    """The ways out of a setting that doesn't fit, in words, with the GiB and the speed predicted of each.

    And that "auto" finds them by itself, if it does: what it takes is within `SAFE` of the GPU, as predicted.
    """
    found = ways_out(model, device, setting, min(SAFE * device.memory * GIB, SAFE * memory.total))
    if not found:
        return (
            "No micro-batch, checkpointing, ZeRO stage or tp_size on as many GPUs fits: take more GPUs, a smaller "
            f"model, or a seq_length below {setting.seq_length}."
        )
    before = step_time(model.shard(setting.tp_size), setting, device, constants=constants_of(device)).total
    texts = [_describe_way(setting, way, before) for way in found]
    ways = "What fits, with the same GPUs and global batch, the fastest first: " + "; or ".join(texts) + "."
    names = {"batch_size_per_gpu", "activation_checkpointing"}
    alone = any(_changes(setting, way.setting).keys() <= names for way in found)
    if alone and memory.total > SAFE * device.memory * GIB:
        samples = setting.global_tokens // setting.seq_length
        ways += f' batch_size_per_gpu = "auto" with global_batch_size = {samples} takes the fastest micro-batch that '
        ways += 'fits; activation_checkpointing can be "auto", too.'
    return ways


def ways_out(model: ModelFacts, device: Device, setting: Setting, limit: float) -> list[Candidate]:
    """Up to `WAYS` changes that need no more than `limit` bytes per GPU, with the same GPUs and global batch.

    The fastest of each single change (micro-batch, checkpointing, ZeRO stage, tp_size, gradient_dtype) come before
    several changes at once; the result is in the order of speed.
    """
    gpus, batch = setting.tp_size * setting.dp_size, setting.global_tokens // setting.seq_length
    stages = range(setting.zero_stage, 4) if setting.dp_size > 1 else [setting.zero_stage]
    modes = MODES[MODES.index(setting.activation_checkpointing) :]
    dtypes = {setting.gradient_dtype, "bf16"} if setting.width == 2 else {setting.gradient_dtype}
    found = [
        candidate
        for dtype in dtypes
        for candidate in candidates(
            model, device, gpus, batch, setting.seq_length, base=replace(setting, gradient_dtype=dtype),
            zero_stages=stages, modes=modes, limit=limit, constants=constants_of(device),
        )
    ]  # fmt: skip
    found.sort(key=lambda candidate: -candidate.tokens_per_second_per_gpu)
    best: dict[frozenset[str], Candidate] = {}
    for candidate in found:
        best.setdefault(frozenset(_changes(setting, candidate.setting)), candidate)
    best = {  # a change more must gain speed or save memory
        changed: way
        for changed, way in best.items()
        if not any(
            fewer < changed and other.time.total <= way.time.total and other.memory.total <= way.memory.total
            for fewer, other in best.items()
        )
    }
    single = [candidate for changed, candidate in best.items() if len(changed) == 1]
    others = [candidate for changed, candidate in best.items() if len(changed) > 1]
    return sorted((single + others)[:WAYS], key=lambda candidate: candidate.time.total)


def _changes(before: Setting, after: Setting) -> dict[str, Any]:
    """Settings that differ, without those that follow from another: accumulation and, from tp_size, dp_size."""
    names = ("tp_size", "zero_stage", "batch_size_per_gpu", "activation_checkpointing", "gradient_dtype")
    return {name: getattr(after, name) for name in names if getattr(after, name) != getattr(before, name)}


def _describe_way(before: Setting, way: Candidate, seconds: float) -> str:
    changed = _changes(before, way.setting)
    for name in ("dp_size", "gradient_accumulation_steps"):
        if getattr(way.setting, name) != getattr(before, name):
            changed[name] = getattr(way.setting, name)
    slower = way.time.total / seconds - 1
    speed = f"{100 * abs(slower):.0f} % {'slower' if slower > 0 else 'faster'}" if abs(slower) >= 0.005 else "as fast"
    settings = ", ".join(f"{name} = {value!r}" for name, value in changed.items())
    return f"{settings} ({way.memory.total / GIB:.1f} GiB, {speed})"


def describe(setting: Setting) -> str:
    """The setting in words, by the names that change it."""
    return (
        f"tp_size × dp_size = {setting.tp_size} × {setting.dp_size}, batch_size_per_gpu × seq_length = "
        f"{setting.batch_size_per_gpu} × {setting.seq_length}, zero_stage {setting.zero_stage}, "
        f"activation_checkpointing {setting.activation_checkpointing!r}"
    )


def describe_parts(memory: Memory) -> str:
    """'weights 7.6, gradients 7.6, … GiB', without what isn't there."""
    parts = [f"{name} {size / GIB:.1f}" for name, size in memory.parts().items() if size >= 0.05 * GIB]
    return ", ".join(parts or ["all parts below 0.1"]) + " GiB"
