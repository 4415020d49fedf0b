"""How full a GPU gets: weights, gradients, optimizer, activations, logits and buffers, from a run's config alone.

The counts are of what DeepSpeed 0.19.8 and PyTorch's autograd keep, as formulas. The part that doesn't depend on the
batch is `traffic.state_bytes`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from tp2d_helpers.config import OPTIMIZATIONS
from tp2d_helpers.model.shard import Shard
from tp2d_helpers.planning.traffic import state_bytes
from tp2d_helpers.speed.cross_entropy import ROWS, worth_chunks
from tp2d_helpers.speed.gradients import BUCKET, in_fp32
from tp2d_helpers.speed.graphs import host_bound
from tp2d_helpers.speed.optimizations import chosen_optimizations, peers_copy
from tp2d_helpers.speed.reductions import ROWS_TO_HALVE

# What autograd keeps of a decoder layer between its forward and backward pass, with flash attention, in tensors of
# (hidden, query, key_value, mlp_in, mlp_out, gathered, normed heads) width per token: see `Shard`. `hidden` and
# `gathered` are whole on each rank of a TP group, the others are divided by tp_size: Korthikanti et al. 2022, section
# 4, without its sequence parallelism.
#   eager     what the two blocks take; q, k, v; the attention's output; gate, silu(gate), up, their elementwise
#             product. And what norms keep (`Norms.each`; of Llama's, the input in fp32, which counts twice, and the
#             normalised input)
#   compiled  the layer's input, the attention block's output, and the MLP's if that is normed; q, k, v; the attention's
#             output; gate, up. The norms' outputs and the MLP's product, which matmuls of the backward pass read, are
#             made again
#   full      the layer's input
#   fp8       compiled, and what is an input of a matmul, in a byte
# tests/planning/test_memory.py counts the tensors of the first two; it and test_step_time.py have peaks of H200 GPUs.
ACTIVATIONS = {
    "eager": (2, 2, 2, 2, 0, 1, 0), "compiled": (2, 2, 2, 1, 0, 1, 1), "full": (1, 0, 0, 0, 0, 0, 0),
    "fp8": (3, 1.5, 2, 1, 0, 1, 1),
}  # fmt: skip
BACKWARD = (4, 2, 2, 1, 1, 1, 0)  # gradients of a layer's activations, there at once while its backward pass runs

# Bytes per logit of this rank at the loss, besides the `width` of the logit itself: fp32 logits, their exponentials or
# softmax and, where it isn't computed in place, one more. `cross_entropy.CrossEntropy` adds the gradient only if it is
# compiled ("fused"), else three fp32 tensors and a mask in its backward pass ("separate").
LOSS_BYTES = {"whole": 8, "vocabulary": 12, "separate": 13, "fused": 2}

STAGE_3_BUCKET = 500_000_000  # elements of a DeepSpeed gradient bucket (`reduce_bucket_size`)
STAGE_3_LIVE = 1_050_000_000  # elements that stage 3 keeps gathered: `max_live_parameters` and one prefetch bucket
STAGE_3_GROUP = 1_000_000_000  # elements that stage 3 steps at a time (`sub_group_size`)

ON_GPU = frozenset(OPTIMIZATIONS)  # `optimizations = "auto"`, below ZeRO 3, each where it can be


@dataclass(frozen=True)
class Setting:
    """What a run's memory and speed depend on, by the names in `Config`. Sizes are in samples, lengths in tokens.

    `width` is the bytes of a weight or activation. `optimizations` has names of `config.OPTIMIZATIONS`.
    """

    tp_size: int = 1
    dp_size: int = 1
    zero_stage: int = 1
    batch_size_per_gpu: int = 1
    gradient_accumulation_steps: int = 1
    seq_length: int = 512
    activation_checkpointing: str = "none"  # or full
    master_weights: str = "fp32"
    gradient_dtype: str = "auto"
    lora_rank: int = 0  # with adapters beside all matrices of a layer: of fewer, it is a bound
    precision: str = "auto"
    width: int = 2
    optimizations: frozenset[str] = frozenset()
    whole_logits: bool = False  # a model whose loss can't take its logits in chunks (`Rehearsal.whole_logits`)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Setting:
        """The part of a run's config (`Config.model_dump()`, or the workers' dict) that counts."""
        values = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        precision, use_gpu = config.get("precision", "auto"), config.get("use_gpu", True)
        fp32 = precision == "fp32" or (precision == "auto" and not use_gpu)
        chosen, _ = chosen_optimizations(dict(config), bool(use_gpu))
        return cls(**{"width": 4 if fp32 else 2, **values, "optimizations": frozenset(chosen)})

    @property
    def gradient_width(self) -> int:
        """Bytes of a gradient's sum over micro-batches and replicas."""
        return 4 if in_fp32(self.gradient_dtype, self.master_weights) else self.width

    @property
    def sums(self) -> bool:
        """Whether gradients are summed where they aren't made: over micro-batches or replicas."""
        return self.zero_stage == 3 or self.gradient_accumulation_steps > 1 or self.dp_size > 1

    @property
    def one_pass_step(self) -> bool:
        """Whether the optimizer's step is `optimizer.fuse_step`'s, and not DeepSpeed's."""
        return "fused_step" in self.optimizations and self.zero_stage in (1, 2) and self.master_weights == "fp32"

    @property
    def copied_in_halves(self) -> bool:
        """Whether half of a block's output is all-reduced while the rest is computed (`reductions.row_matmul`)."""
        return peers_copy(self.optimizations, self.tp_size) and self.tokens >= ROWS_TO_HALVE

    def replays(self, shard: Shard) -> bool:
        """Whether the passes of a shard's model are CUDA graphs, where "auto" allows them."""
        small = host_bound(shard.layer_weights, self.tokens)
        return "cuda_graph" in self.optimizations and self.activation_checkpointing == "none" and small

    @property
    def loss(self) -> str:
        """Which of `LOSS_BYTES` the loss is."""
        if "fused_loss" in self.optimizations:
            return "fused" if "compile" in self.optimizations else "separate"
        return "vocabulary" if self.tp_size > 1 else "whole"

    def in_chunks(self, shard: Shard) -> bool:
        """Whether of logits and their gradient there is a chunk at a time (`cross_entropy.HeadLoss`)."""
        can = "fused_loss" in self.optimizations and self.zero_stage < 3 and not self.whole_logits
        return can and worth_chunks(self.tokens, shard.hidden, not self.lora_rank)

    def trained(self, shard: Shard) -> int:
        """Parameters of a rank that have gradients and an optimizer's state: all, or with LoRA the adapters."""
        return shard.adapters(self.lora_rank) if self.lora_rank else shard.parameters

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.batch_size_per_gpu * self.seq_length

    @property
    def global_tokens(self) -> int:
        """Tokens of one optimizer step, over all replicas."""
        return self.tokens * self.gradient_accumulation_steps * self.dp_size


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU at the fullest moment of a step."""

    weights: float
    gradients: float
    optimizer: float  # masters and moments
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Name → bytes."""
        names = {"optimizer": "masters and moments"}
        return {names.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}


def memory_per_gpu(shard: Shard, setting: Setting) -> Memory:
    """Bytes per GPU at the fullest of three moments of a step: at the loss, in a backward pass, or at its end.

    That is memory in tensors (`torch.cuda.max_memory_allocated`). The CUDA context, NCCL and the allocator's gaps come
    on top: see `candidates`.
    """
    trained = setting.trained(shard)
    state = state_bytes(trained, setting.dp_size, setting.zero_stage, setting.width, setting.gradient_width)
    if setting.lora_rank:  # what is frozen
        state["weights"] += setting.width * shard.parameters / (setting.dp_size if setting.zero_stage == 3 else 1)
    if setting.precision == "fp8":  # cast in two layouts
        state["weights"] += 2 * sum(matmul.weights for matmul in shard.layer_matmuls)
    optimizer = state["masters and moments"] / (2 if setting.master_weights == "bf16" else 1)
    earlier = state["gradients"] if setting.sums else 0  # there from the first step on, or of a micro-batch before
    last = earlier or setting.width * trained
    kept, layer = activation_bytes(shard, setting)
    gathered, buckets = _buffers(shard, setting)
    at_loss = Memory(state["weights"], earlier, optimizer, kept, logit_bytes(shard, setting), gathered + buckets)
    in_backward = Memory(state["weights"], earlier, optimizer, kept + layer, 0, gathered + buckets)
    at_end = Memory(state["weights"], last, optimizer, 0, 0, _step_copies(shard, setting) or buckets)
    if setting.replays(shard):  # what the graphs use stays theirs
        gradients = earlier + setting.width * trained
        at_end = replace(at_end, gradients=gradients, activations=kept, logits=at_loss.logits)
    return max(at_loss, in_backward, at_end, key=lambda moment: moment.total)


def activation_bytes(shard: Shard, setting: Setting) -> tuple[float, float]:
    """(kept from the forward passes of all layers, added while the backward pass of one runs), for a micro-batch.

    Kept are per token and layer `ACTIVATIONS` tensors, and of flash attention one fp32 number per head, the log of the
    softmax's sum. A checkpointed layer is computed again before its backward pass: its own activations are added. The
    norm before the head is compiled with nothing.
    """
    uncut = _uncut(shard, setting)
    mode = setting.activation_checkpointing
    kept = uncut if mode == "none" else ACTIVATIONS[mode]
    again = [max(0, whole - part) for whole, part in zip(uncut, kept, strict=True)]
    heads, mlp = (shard.query, shard.key_value), (shard.mlp_in, shard.mlp_out)
    widths = (shard.hidden, *heads, *mlp, shard.gathered, shard.normed_heads * sum(heads))

    def size(counts: Sequence[float]) -> float:
        """Bytes of so many tensors of each width."""
        sums = 4 * shard.heads if counts[1] else 0
        return setting.tokens * (setting.width * sum(map(operator.mul, counts, widths)) + sums)

    kept_of_adapters = 0  # A x, of r elements for each
    if setting.lora_rank and mode != "full":
        kept_of_adapters = setting.tokens * setting.width * setting.lora_rank * len(shard.adapted)
    mask = setting.tokens * setting.seq_length * setting.width if 0 < shard.window < setting.seq_length else 0
    others = 0.0  # of a layer
    if mode == "none":  # with the values, queries and keys before they were rotated
        others += shard.joined * setting.tokens * setting.width * sum(heads)
    if mode == "none" and mask and "compile" not in setting.optimizations:  # and keys and values, a copy per query head
        repeated = 2 * (shard.query - shard.key_value)
        others += shard.masked * (mask + setting.tokens * setting.width * repeated)
    head = setting.tokens * setting.width * shard.hidden * (shard.norms.each + 1)
    kept_of_layers = shard.layers * (size(kept) + others)
    return kept_of_layers + head + kept_of_adapters, size(again) + size(BACKWARD) + mask


def _uncut(shard: Shard, setting: Setting) -> tuple[float, ...]:
    """`ACTIVATIONS` of a layer that isn't checkpointed, with those that depend on its norms."""
    norms = shard.norms
    if "compile" in setting.optimizations:
        hidden, *others = ACTIVATIONS["fp8" if setting.precision == "fp8" else "compiled"]
        return hidden + norms.outputs / 2, *others
    hidden, *others, _ = ACTIVATIONS["eager"]
    return hidden + norms.count * norms.each, *others, norms.each


def logit_bytes(shard: Shard, setting: Setting) -> float:
    """Logits of a micro-batch [tokens, V/t], and what the loss makes of them before they are freed.

    In chunks: those of a chunk, and the gradients of the hidden states and, in fp32, of the head's weight. When the
    latter becomes one in the weight's dtype, there is no chunk any more.
    """
    of_positions = setting.width + LOSS_BYTES[setting.loss]
    if not setting.in_chunks(shard):
        return setting.tokens * shard.vocabulary * of_positions
    column = 0 if setting.lora_rank else shard.hidden
    per_id = 4 * column + max(ROWS * of_positions, setting.width * column)
    return shard.vocabulary * per_id + setting.tokens * setting.width * shard.hidden


def _buffers(shard: Shard, setting: Setting) -> tuple[float, float]:
    """(gathered weights of stage 3, gradient buckets): bytes."""
    width, stage = setting.width, setting.zero_stage
    if stage == 3:
        return width * min(shard.parameters, STAGE_3_LIVE), width * STAGE_3_BUCKET
    travelling = min(3 * BUCKET, setting.trained(shard)) if stage == 2 and setting.dp_size > 1 else 0
    return 0, setting.gradient_width * travelling


def _step_copies(shard: Shard, setting: Setting) -> float:
    """Gradients as the optimizer takes them: flat, and in fp32. The one-pass step takes them as they are."""
    if setting.zero_stage == 3:
        return 4 * min(setting.trained(shard) / setting.dp_size, STAGE_3_GROUP)
    partition = setting.trained(shard) / setting.dp_size
    if setting.master_weights == "bf16":
        return setting.width * partition
    if setting.one_pass_step:
        return 0
    return (setting.gradient_width + 4 * (setting.gradient_width != 4)) * partition
