"""How long a step takes on given GPUs, and how that scales over nodes: seconds, out of a run's config alone.

A roofline (Williams et al. 2009) with the terms that it needs and no more: matmuls at a share of the peak plus
their own traffic, element-wise passes and the optimizer at the bandwidth of the memory, collectives at that of the
links, and never faster than the host launches kernels. `Constants` has every number that isn't a datasheet's.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from tp2d_helpers.model.shard import Matmul, Shard
from tp2d_helpers.model.styles import COLUMN
from tp2d_helpers.planning.constants import HOST_LAYER, HOST_STEP, Constants
from tp2d_helpers.planning.memory import Setting
from tp2d_helpers.planning.traffic import all_reduces, zero_bytes
from tp2d_helpers.speed.cross_entropy import ROWS
from tp2d_helpers.speed.devices import Device


@dataclass(frozen=True)
class Network:
    """How GPUs are joined into nodes: `bandwidth` is byte/s between nodes, per GPU (400 Gbit/s each by default)."""

    gpus_per_node: int = 8
    bandwidth: float = 50e9


# Element-wise passes over (hidden, query + key_value, mlp_in, gathered) per token and layer, forward and backward: see
# `Shard`. The last is a count, not a fit: experts' rows are gathered, weighted, put back and added.
PASSES = {"eager": (160, 36, 6.5, 10), "compiled": (30, 8, 6, 6)}
LOSS_PASSES = {"whole": 34, "vocabulary": 60, "separate": 88, "fused": 8}  # bytes read and written per logit
STEP_BYTES = {"fused": 28 + 7, "deepspeed": 160}  # per parameter of the partition: see `_optimizer`


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step. Communication is what isn't hidden; `host` what the GPU waits for launches."""

    matmuls: float
    attention: float
    element_wise: float
    tp_communication: float
    dp_communication: float
    optimizer: float
    host: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Reached:
    """What work gets of a device and its network: FLOP/s, byte/s, seconds."""

    matmuls: float
    attention: float
    memory: float
    links: float
    network: float
    gpus_per_node: int
    latency: float
    fp8: float

    @classmethod
    def of(cls, device: Device, network: Network, constants: Constants) -> Reached:
        """The constants' shares of the datasheet."""
        return cls(
            device.peak * constants.matmuls, device.peak * constants.attention,
            device.memory_bandwidth * constants.memory, device.link_bandwidth * constants.links,
            network.bandwidth * constants.network, network.gpus_per_node, constants.latency, constants.fp8,
        )  # fmt: skip

    def rate(self, ranks: int) -> float:
        """byte/s of a ring: of the links within a node, of the network as soon as it leaves one."""
        return self.links if ranks <= self.gpus_per_node else self.network


def step_time(
    shard: Shard,
    setting: Setting,
    device: Device,
    network: Network | None = None,
    constants: Constants | None = None,
) -> StepTime:
    """Seconds of one optimizer step.

    The work adds up, and takes at least as long as the host needs to launch it all. ZeRO's collectives hide behind the
    last backward pass (stage 2: behind all of them), as far as they are no longer than that, and unless it is a graph.
    Those of stage 3, which a layer waits for before it can compute, hide behind nothing.
    """
    constants, count = constants or Constants(), setting.gradient_accumulation_steps
    reached = Reached.of(device, network or Network(), constants)
    replays = setting.replays(shard)
    how = "graph" if replays else "compiled" if "compile" in setting.optimizations else "eager"
    matmuls, attention = _matmuls(shard, setting, reached), _attention(shard, setting, reached)
    element_wise, tp = _element_wise(shard, setting, reached), _tp_seconds(shard, setting, reached)
    micro = matmuls + attention + element_wise + tp
    backward = 2 / 3 * micro * {2: count, 3: 0}.get(setting.zero_stage, 1)
    hidden = 0 if replays else constants.hidden  # a graph hands out all gradients at its end
    dp = _dp_seconds(shard, setting, reached, hidden * backward)
    optimizer = _optimizer(shard, setting, reached)
    launches = HOST_LAYER[how] * shard.layers * count + HOST_STEP
    return StepTime(
        matmuls * count, attention * count, element_wise * count, tp * count, dp, optimizer,
        host=max(0.0, constants.host * launches - micro * count - dp - optimizer),
    )  # fmt: skip


def _matmuls(shard: Shard, setting: Setting, reached: Reached) -> float:
    """Matmuls of a micro-batch: 2·m·k·n operations each, thrice (forward, and two in the backward pass).

    m is the tokens. Each also moves its three matrices once, which is what makes narrow matmuls slow.
    """
    once = 2 if setting.lora_rank else 3  # no gradients of what is frozen; adapters are too narrow to count
    times = once + (setting.activation_checkpointing == "full")
    head = Matmul("", shard.hidden, shard.vocabulary)
    m, work, moved = setting.tokens, 0.0, 0.0
    for matmul in (*shard.layer_matmuls, head):
        t = once if matmul is head else times
        faster = reached.fp8 if setting.precision == "fp8" and matmul is not head else 1
        work += t * 2 * m * matmul.active / (reached.matmuls * faster)
        moved += t * setting.width * (m * matmul.per_token * (matmul.inputs + matmul.outputs) + matmul.weights)
    return work + moved / reached.memory


def _attention(shard: Shard, setting: Setting, reached: Reached) -> float:
    """Flash attention: 6·L·a·s operations per token (`ModelFacts.flops_per_token`), 4/3 of it if recomputed."""
    operations = 6 * shard.layers * shard.query * setting.seq_length * setting.tokens
    again = 4 / 3 if setting.activation_checkpointing == "full" else 1
    return again * operations / reached.attention


def _element_wise(shard: Shard, setting: Setting, reached: Reached) -> float:
    compiled = "compile" in setting.optimizations
    widths = (shard.hidden, shard.query + shard.key_value, shard.mlp_in, shard.gathered)
    passes = sum(map(operator.mul, PASSES["compiled" if compiled else "eager"], widths))
    again = 1 if setting.activation_checkpointing == "none" else 4 / 3
    layers = again * shard.layers * setting.width * passes
    sums = (setting.width + 2 * setting.gradient_width) * setting.trained(shard) if setting.sums else 0
    # The head's gradient in fp32: read and written at each chunk, then read once and written in the weight's dtype.
    chunks = -(-setting.tokens // ROWS) if setting.in_chunks(shard) and not setting.lora_rank else 0
    head = shard.hidden * shard.vocabulary * (8 * chunks + (4 + setting.width) * bool(chunks))
    return (setting.tokens * (layers + LOSS_PASSES[setting.loss] * shard.vocabulary) + head + sums) / reached.memory


def _tp_seconds(shard: Shard, setting: Setting, reached: Reached) -> float:
    """All-reduces of a micro-batch's hidden states over the TP group, as far as nothing hides them.

    With one per block, those of the backward pass hide behind the gradients of the column-wise layers' weights, and
    those of the forward pass by half where peers copy.
    """
    if setting.tp_size == 1:
        return 0.0
    once_per_block, layers = "block_all_reduce" in setting.optimizations, shard.all_reduces
    count = all_reduces(shard, once_per_block)
    if setting.activation_checkpointing == "full":
        count += layers.forward
    size = 2 * (setting.tp_size - 1) / setting.tp_size * setting.width * setting.tokens * shard.hidden
    rate = reached.rate(setting.tp_size)
    each = size / rate + reached.latency * math.log2(setting.tp_size)
    hides = once_per_block and not setting.lora_rank
    behind = _weight_gradients(shard, setting, reached) if hides else 0.0
    halves = layers.forward / 2 if setting.copied_in_halves else 0
    return (count - halves) * each - min(behind, layers.blocks * each)


def _weight_gradients(shard: Shard, setting: Setting, reached: Reached) -> float:
    """Matmuls of a micro-batch that make the gradients of the column-wise weights: all but a block's last."""
    columns = sum(matmul.active for matmul in shard.layer_matmuls if matmul.style == COLUMN)
    return 2 * setting.tokens * columns / reached.matmuls


def _dp_seconds(shard: Shard, setting: Setting, reached: Reached, hidden: float) -> float:
    """ZeRO's collectives, less the part of them that runs during `hidden` seconds of computation.

    The gather of the new weights after the step, of stages 1 and 2, has nothing to hide behind.
    """
    dp, stage = setting.dp_size, setting.zero_stage
    if dp == 1:
        return 0.0
    rate = reached.rate(setting.tp_size * dp)
    sent = shard.parameters if stage == 3 else setting.trained(shard)
    count, widths = setting.gradient_accumulation_steps, (setting.width, setting.gradient_width)
    total = zero_bytes(sent, dp, stage, count, *widths) / rate
    gather = (dp - 1) / dp * setting.width * setting.trained(shard) / rate if stage in (1, 2) else 0.0
    return max(0.0, total - gather - hidden) + gather + reached.latency * math.log2(dp)


def _optimizer(shard: Shard, setting: Setting, reached: Reached) -> float:
    """AdamW reads gradient (2 bytes), master and moments (12), writes these and the weight (14): 28 per parameter.

    The pass for the norm before it reads 2, at 1.2 TB/s on an H200: as long as 7 take. Sums in fp32 are 2 more in each.
    """
    kind = "fused" if setting.one_pass_step else "deepspeed"
    size = STEP_BYTES[kind] + (2 + 2 if setting.sums and setting.gradient_width > setting.width else 0)
    return size * setting.trained(shard) / (setting.dp_size if setting.zero_stage else 1) / reached.memory
