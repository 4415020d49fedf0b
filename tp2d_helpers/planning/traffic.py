"""What a (tp, dp, ZeRO stage) costs per GPU: bytes held and bytes sent.

The counts are of what DeepSpeed 0.19.8 does, as formulas. A ring of n ranks moves 2·(n−1)/n of a tensor through each
rank for an all-reduce, and (n−1)/n of it for an all-gather or a reduce-scatter (Thakur et al. 2005). What a
micro-batch adds is in `memory`; `step_time` makes seconds of the bytes.
"""

from __future__ import annotations

from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.shard import Shard


def tp_bytes(model: ModelFacts, tp_size: int, tokens: int, width: int = 2, block_all_reduce: bool = True) -> float:
    """Bytes that tensor parallelism sends through each rank for one micro-batch, forward and backward.

    Args:
        tokens: of the micro-batch, batch × sequence.
        width: bytes of an activation (2 for bf16).
        block_all_reduce: one backward all-reduce per attention and MLP block; False: one per column-wise layer,
            as AutoTP does by itself.

    Returns:
        2·(t−1)/t · width · tokens · (hidden · (L·(2 + column-wise layers, or blocks) + 1 or 2) + numbers). The 2 of a
        layer are after attention and after the MLP or the experts, and one more after experts that are shared; the
        last term is the head's input gradient, and for tied models the vocabulary-parallel embedding's output. For
        `numbers` see `AllReduces`. The loss's own, three numbers per token, are left out.
    """
    shard = model.shard(tp_size)
    elements = shard.hidden * all_reduces(shard, block_all_reduce) + shard.all_reduces.numbers
    return 2 * (tp_size - 1) / tp_size * width * tokens * elements


def all_reduces(shard: Shard, block_all_reduce: bool) -> int:
    """All-reduces of a micro-batch's hidden states over the TP group, forward and backward."""
    layers = shard.all_reduces
    return layers.forward + (layers.blocks if block_all_reduce else layers.columns) + 1 + shard.tied


def zero_bytes(
    parameters: int, dp_size: int, stage: int, accumulation: int = 1, width: int = 2, gradient_width: int = 4
) -> float:
    """Bytes that ZeRO sends through each rank for one optimizer step, whatever the number of tokens.

    Stages 1 and 2 reduce each gradient to the replica that steps its weight, once per step and once per micro-batch,
    and gather the new weights once per step. Stage 3 reduce-scatters the gradients of each micro-batch and gathers the
    weights twice for it, for the forward and for the backward pass. That is a bound: what is needed again within 10⁹
    parameters (`stage3_max_reuse_distance`) stays gathered, so a model of less than half as many is gathered once.

    Args:
        parameters: of this rank's TP shard (`Shard.parameters`).
        width, gradient_width: bytes of a weight and of a gradient's sum.
    """
    reductions, gathers = {1: (1, 1), 2: (accumulation, 1), 3: (accumulation, 2 * accumulation)}[stage]
    return (dp_size - 1) / dp_size * parameters * (gradient_width * reductions + width * gathers)


def state_bytes(parameters: int, dp_size: int, stage: int, width: int = 2, gradient_width: int = 4) -> dict[str, float]:
    """Bytes per GPU that don't depend on the batch: weights, gradients, and Adam's fp32 masters and two moments.

    ZeRO divides by dp_size the optimizer's part from stage 1, the gradients from stage 2, the weights at stage 3
    (Rajbhandari et al. 2020, ZeRO, section 3, where gradients are summed in 2 bytes). Stage 0, plain data parallelism,
    is here to compare with.

    Args:
        parameters: of this rank's TP shard (`Shard.parameters`).
        width, gradient_width: bytes of a weight and of a gradient's sum.
    """
    return {
        "weights": width * parameters / (dp_size if stage >= 3 else 1),
        "gradients": gradient_width * parameters / (dp_size if stage >= 2 else 1),
        "masters and moments": 12 * parameters / (dp_size if stage >= 1 else 1),
    }
