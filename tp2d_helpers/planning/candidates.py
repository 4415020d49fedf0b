"""Which (tp, dp, micro-batch, checkpointing) fit into given GPUs, and which of them is fastest.

One function, `candidates`, serves the choice before a run, the refusal in preflight, and the ways out that an
out-of-memory error names (`advice`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tp2d_helpers.config import ConfigError
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.shard import Shard
from tp2d_helpers.planning.constants import Constants
from tp2d_helpers.planning.memory import ON_GPU, Memory, Setting, memory_per_gpu
from tp2d_helpers.planning.step_time import Network, StepTime, step_time
from tp2d_helpers.speed.devices import Device
from tp2d_helpers.speed.optimizations import STAGE_3_CANNOT

GIB = 2**30
MODES = ("none", "full")  # of activation checkpointing, from fastest to smallest
# Of the GPU's memory, the share that tensors may take. The CUDA context, NCCL's buffers and the gaps between tensors
# need some 5 %, and the estimate may be 10 % off.
SAFE = 0.9


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
    model: ModelFacts,
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
    constants: Constants | None = None,
) -> list[Candidate]:
    """All ways to run `global_batch` samples per step on `gpus` that fit, the fastest first.

    Args:
        base: the rest of the setting (master weights, width, optimizations); the default is what runs on GPUs.
        tp_sizes: to try; the default is every divisor of `gpus` within a node.
        limit: bytes of tensors per GPU; the default is `SAFE` of the device's memory.
        constants: of the machine; the default is those of H200.
    """
    base, network = base or Setting(optimizations=ON_GPU), network or Network()
    limit = SAFE * device.memory * GIB if limit is None else limit
    found = []
    for tp in tp_sizes or _divisors(gpus):
        shard = _shard(model, tp) if gpus % tp == 0 and tp <= max(network.gpus_per_node, base.tp_size) else None
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
                    found.append(Candidate(setting, memory, step_time(shard, setting, device, network, constants)))
    return sorted(found, key=lambda candidate: -candidate.tokens_per_second_per_gpu)


def fastest(model: ModelFacts, device: Device, gpus: int, global_batch: int, seq_length: int, **more: Any) -> Candidate:
    """The fastest of `candidates`, with its arguments.

    Raises:
        ConfigError: if none fits.
    """
    found = candidates(model, device, gpus, global_batch, seq_length, **more)
    if not found:
        raise ConfigError(
            f"nothing fits into {gpus} × {device.name} of {device.memory:.0f} GiB at a global batch of {global_batch} "
            f"samples of {seq_length} tokens; take more GPUs, shorter samples, zero_stage 3 or a smaller model"
        )
    return found[0]


def _shard(model: ModelFacts, tp_size: int) -> Shard | None:
    try:
        return model.shard(tp_size)
    except ConfigError:
        return None


def _of_stage_3(setting: Setting) -> Setting:
    """What the engine makes of a setting at ZeRO 3."""
    return replace(setting, optimizations=setting.optimizations - STAGE_3_CANNOT)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
