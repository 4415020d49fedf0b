"""Does a run fit into its GPUs, what would, and which (tp, dp, micro-batch) is fastest of what does.

One function, `candidates`, serves the choice before a run, the refusal in preflight, and the ways out that an
out-of-memory error names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import transformers

from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.engine import STAGE_3_CANNOT, load_config
from tp2d_helpers.estimate import Device, Network, StepTime, device_named, step_time
from tp2d_helpers.memory import ON_GPU, Memory, Setting, Shard, memory_per_gpu

GIB = 2**30
MODES = ("none", "selective", "full")  # of activation checkpointing, from fastest to smallest
# Of the GPU's memory, the share that tensors may take. The CUDA context, NCCL's buffers and the gaps between tensors
# need some 5 %, and the estimate may be 10 % off.
SAFE = 0.9
WAYS = 3  # that a refusal names


@dataclass(frozen=True)
class Candidate:
    """A setting, and what is predicted of it."""

    setting: Setting
    memory: Memory
    time: StepTime

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Predicted, of all tokens."""
        return self.setting.global_tokens / self.time.total / (self.setting.tp_size * self.setting.dp_size)

    def row(self) -> list[Any]:
        """For `show_table`, under `HEADER`."""
        s, size, milliseconds = self.setting, round(self.memory.total / GIB, 1), round(self.time.total * 1e3)
        return [f"{s.tp_size} × {s.dp_size}", s.zero_stage, s.batch_size_per_gpu, s.gradient_accumulation_steps,
                s.activation_checkpointing, size, milliseconds, round(self.tokens_per_second_per_gpu)]  # fmt: skip


HEADER = ["tp × dp", "ZeRO", "micro-batch", "accumulation", "checkpointing", "GiB per GPU", "ms/step", "tokens/s/GPU"]


def candidates(
    hf_config: transformers.PretrainedConfig,
    device: Device,
    gpus: int,
    global_batch: int,
    seq_length: int,
    *,
    base: Setting | None = None,
    tp_sizes: Iterable[int] | None = None,
    zero_stages: Sequence[int] = (1,),
    modes: Sequence[str] = MODES,
    limit: float | None = None,
    network: Network | None = None,
) -> list[Candidate]:
    """All ways to run `global_batch` samples per step on `gpus` that fit, the fastest first.

    Args:
        base: the rest of the setting (master weights, width, optimizations); the default is what runs on GPUs.
        tp_sizes: to try; the default is every divisor of `gpus` within a node.
        limit: bytes of tensors per GPU; the default is `SAFE` of the device's memory.
    """
    base, network = base or Setting(optimizations=ON_GPU), network or Network()
    limit = SAFE * device.memory * GIB if limit is None else limit
    found = []
    for tp in tp_sizes or _divisors(gpus):
        shard = _shard(hf_config, tp) if gpus % tp == 0 and tp <= max(network.gpus_per_node, base.tp_size) else None
        dp = gpus // tp
        if shard is None or global_batch % dp:
            continue
        for micro in _divisors(global_batch // dp):
            grid = replace(base, tp_size=tp, dp_size=dp, seq_length=seq_length, batch_size_per_gpu=micro,
                           gradient_accumulation_steps=global_batch // dp // micro)  # fmt: skip
            for stage, mode in itertools.product(zero_stages, modes):
                setting = replace(_of_stage_3(grid) if stage == 3 else grid, zero_stage=stage,
                                  activation_checkpointing=mode)  # fmt: skip
                memory = memory_per_gpu(shard, setting)
                if memory.total <= limit:
                    found.append(Candidate(setting, memory, step_time(shard, setting, device, network)))
    return sorted(found, key=lambda candidate: -candidate.tokens_per_second_per_gpu)


def choose(
    hf_config: transformers.PretrainedConfig, device: Device, gpus: int, global_batch: int, seq_length: int, **more: Any
) -> Candidate:
    """The fastest of `candidates`, with its arguments.

    Raises:
        ConfigError: if none fits.
    """
    found = candidates(hf_config, device, gpus, global_batch, seq_length, **more)
    if not found:
        raise ConfigError(
            f"nothing fits into {gpus} × {device.name} of {device.memory:.0f} GiB at a global batch of {global_batch} "
            f"samples of {seq_length} tokens; take more GPUs, shorter samples, zero_stage 3 or a smaller model"
        )
    return found[0]


def check_gpu_memory(config: Config, resources: dict[str, float]) -> list[tuple[str, str, str]]:
    """Preflight's row about memory; none without GPUs, or where Ray doesn't say which they are.

    Args:
        resources: Ray's, which name the types of a cluster's GPUs. If they differ, the largest counts: what it refuses
            fits nowhere.

    Raises:
        ConfigError: see `check_memory`.
    """
    if not config.use_gpu:
        return []
    hf_config = load_config(config.model_name, config.trust_remote_code)
    devices = [device_named(name) for name in resources if name.startswith("accelerator_type:")]
    if not devices or None in devices:
        return []
    return [("memory", *check_memory(config, hf_config, max(devices, key=lambda device: device.memory)))]


def check_memory(config: Config, hf_config: transformers.PretrainedConfig, device: Device) -> tuple[str, str]:
    """(what is predicted of the GPU's memory, of what parts) for preflight's table.

    Raises:
        ConfigError: if it is more than the GPU has. Between `SAFE` and all of the GPU, the row says that it is tight.
    """
    setting = Setting.of(config.model_dump())
    memory = memory_per_gpu(Shard.of(hf_config, setting.tp_size), setting)
    share = memory.total / GIB / device.memory
    found = f"{memory.total / GIB:.1f} of {device.memory:.1f} GiB per GPU"
    if share > 1:
        raise ConfigError(
            f"{describe(setting)}: needs {memory.total / GIB:.1f} GiB per GPU ({describe_parts(memory)}), and "
            f"{device.name} has {device.memory:.1f} GiB. {advice(hf_config, device, setting, memory)}"
        )
    tight = "; tight: it may run out of memory" if share > SAFE else ""
    return found, describe_parts(memory) + tight


def advice(hf_config: transformers.PretrainedConfig, device: Device, setting: Setting, memory: Memory) -> str:
    """The ways out of a setting that doesn't fit, in words, with the GiB and the speed predicted of each."""
    found = ways_out(hf_config, device, setting, min(SAFE * device.memory * GIB, SAFE * memory.total))
    if not found:
        return (
            "No micro-batch, checkpointing, ZeRO stage or tp_size on as many GPUs fits: take more GPUs, a smaller "
            f"model, or a seq_length below {setting.seq_length}."
        )
    before = step_time(Shard.of(hf_config, setting.tp_size), setting, device).total
    texts = [_describe_way(setting, way, before) for way in found]
    return "What fits, with the same GPUs and global batch, the fastest first: " + "; or ".join(texts) + "."


def ways_out(
    hf_config: transformers.PretrainedConfig, device: Device, setting: Setting, limit: float
) -> list[Candidate]:
    """Up to `WAYS` changes that need no more than `limit` bytes per GPU, with the same GPUs and global batch.

    The fastest of each single change (micro-batch, checkpointing, ZeRO stage, tp_size) come before several changes at
    once; the result is in the order of speed.
    """
    gpus, batch = setting.tp_size * setting.dp_size, setting.global_tokens // setting.seq_length
    stages = range(setting.zero_stage, 4) if setting.dp_size > 1 else [setting.zero_stage]
    modes = MODES[MODES.index(setting.activation_checkpointing) :]
    found = candidates(
        hf_config, device, gpus, batch, setting.seq_length, base=setting, zero_stages=stages, modes=modes, limit=limit
    )
    best: dict[frozenset[str], Candidate] = {}
    for candidate in found:
        best.setdefault(frozenset(_changes(setting, candidate.setting)), candidate)
    single = [candidate for changed, candidate in best.items() if len(changed) == 1]
    others = [candidate for changed, candidate in best.items() if len(changed) > 1]
    return sorted((single + others)[:WAYS], key=lambda candidate: candidate.time.total)


def _changes(before: Setting, after: Setting) -> dict[str, Any]:
    """Settings that differ, without those that follow from another: accumulation and, from tp_size, dp_size."""
    names = ("tp_size", "zero_stage", "batch_size_per_gpu", "activation_checkpointing")
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


def _shard(hf_config: transformers.PretrainedConfig, tp_size: int) -> Shard | None:
    try:
        return Shard.of(hf_config, tp_size) if hf_config.get_text_config().vocab_size % tp_size == 0 else None
    except ConfigError:
        return None


def _of_stage_3(setting: Setting) -> Setting:
    """What the engine makes of a setting at ZeRO 3."""
    return replace(setting, optimizations=setting.optimizations - STAGE_3_CANNOT)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
