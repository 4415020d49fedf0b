"""Load → shard → DeepSpeed engine, in this order:

1. load the weights on the CPU, in the dtype they compute in (memory-mapped: the ranks of a node share the page cache);
2. `deepspeed.initialize` shards them by AutoTP, each rank copying only its slices to its device, and then wraps the
   optimizer by ZeRO, which keeps fp32 master weights of the shard;
3. compare the shape of every shard with the plan, so that a layer that stayed whole is an error and not a slow run.
"""

from __future__ import annotations

import collections
from collections.abc import Collection
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM

from tp2d_helpers import startup
from tp2d_helpers.config import ConfigError
from tp2d_helpers.model.apart import keep_documents_apart
from tp2d_helpers.model.decay import parameter_groups
from tp2d_helpers.model.divide import divide
from tp2d_helpers.model.facts import loading_arguments
from tp2d_helpers.model.kept import restore, wide
from tp2d_helpers.model.lora import add_adapters, convert_what_is_trained, join
from tp2d_helpers.model.mpu import ModelParallelUnit
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.rehearsal import rehearse
from tp2d_helpers.model.sharding import meta_model
from tp2d_helpers.model.table import check_shards
from tp2d_helpers.model.whole_weights import WholeWeights
from tp2d_helpers.speed.agreement import everywhere
from tp2d_helpers.speed.gradients import in_fp32, sum_gradients
from tp2d_helpers.speed.loss import loss_from_logits
from tp2d_helpers.speed.optimizations import optimize

# "fp8" is of matmuls (`speed/float8.py`); all else of such a run is bf16.
PRECISIONS = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def get_mixed_precision_dtype() -> torch.dtype:
    """bf16 on GPUs that compute in it (Ampere and newer), fp16 on older ones, fp32 on CPU.

    `torch.cuda.is_bf16_supported()` alone also says yes to GPUs that only emulate it, at a fraction of the speed.
    """
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _common_dtype() -> torch.dtype:
    """What the oldest device of the world computes in. Collective."""
    return min(everywhere(get_mixed_precision_dtype()), key=[torch.float32, torch.float16, torch.bfloat16].index)


def gradient_dtype(config: dict[str, Any], dtype: torch.dtype) -> torch.dtype:
    """What gradients are summed in, over micro-batches and replicas, in a run that computes in `dtype`."""
    settings = config.get("gradient_dtype", "auto"), config.get("master_weights", "fp32")
    return torch.float32 if in_fp32(*settings) else dtype


def load_model(model_name: str, dtype: torch.dtype, trust_remote_code: bool = False) -> torch.nn.Module:
    """Load the weights on the CPU; `deepspeed.initialize` moves each rank's shard, and no more, to its GPU.

    Raises:
        ConfigError: if the files have a head of their own, and the config says that it is the embedding.
    """
    startup.mark("process groups")
    settings = dict(dtype=dtype, trust_remote_code=trust_remote_code)
    part = loading_arguments(model_name, trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(model_name, **settings, **part)
    if part:  # else `save_pretrained` would write the names of the whole model's files again
        model._weight_conversions = None
    planned = meta_model(model.config)
    for name, weight in planned.named_parameters():  # loading forgets what the class has frozen
        model.get_parameter(name).requires_grad_(weight.requires_grad)
    if _tied(planned) and not _tied(model):  # known before, but of weights that were still to be downloaded
        raise ConfigError(
            f"model_name = {model_name!r}: its config says that its output head is the embedding "
            "(tie_word_embeddings), and its files have another one: set tie_word_embeddings to false in config.json"
        )
    model.config.use_cache = False
    startup.mark("weights")
    return model


def _tied(model: torch.nn.Module) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def deepspeed_config(
    config: dict[str, Any], dtype: torch.dtype, layers: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The DeepSpeed config of a run: AutoTP, ZeRO, precision, batch sizes.

    The batch sizes count samples: a step takes micro-batch × accumulation × dp_size of them, whatever tp_size is.

    Args:
        layers: how AutoTP cuts which layer, and whose gradients it sums (`Plan.partition_config`).
    """
    tp_size, zero_stage = config["tp_size"], config.get("zero_stage", 1)
    micro_batch, accumulation = config["batch_size_per_gpu"], config.get("gradient_accumulation_steps", 1)
    result: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * config["dp_size"],
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.get("max_grad_norm", 1.0),
        # Below stage 3, gradients are summed and travel by `sum_gradients`.
        "zero_optimization": {"stage": zero_stage, "overlap_comm": zero_stage == 3 and dtype != torch.float32},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # they wait for the GPU before and after each step
    }
    if zero_stage == 3 and dtype != torch.float32 and gradient_dtype(config, dtype) == torch.float32:
        result |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if tp_size > 1:
        # The head's output stays divided by vocabulary, and the cross-entropy is computed on the parts: the whole
        # logits, the largest activation of a small model, exist nowhere.
        result["tensor_parallel"] = {
            "autotp_size": tp_size,
            "vocab_parallel_lm_head": True,
            "partition_config": layers,
        }
    if dtype == torch.bfloat16:
        low = config.get("master_weights", "fp32") == "bf16"
        result["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": low, "bf16_optimizer_states": low}
    elif dtype == torch.float16:
        result["fp16"] = {"enabled": True}  # with dynamic loss scaling, DeepSpeed's default
    return result


def setup_model_with_autotp(
    model_name: str, tp_size: int, dp_size: int, world_rank: int, world_size: int, config: dict[str, Any]
) -> tuple[deepspeed.DeepSpeedEngine, dist.ProcessGroup, dist.ProcessGroup, int, int]:
    """Build the engine of this rank. Collective: every rank of the world calls it with the same arguments.

    Returns:
        (engine, tp_group, dp_group, tp_rank, dp_rank)

    Raises:
        ConfigError: if the model can't be sharded so.
        RuntimeError: if AutoTP left a weight in another shape than planned.
    """
    mpu = ModelParallelUnit.from_grid(tp_size, dp_size)
    if not torch.cuda.is_available():  # else DeepSpeed compiles, for a minute, a kernel that only inference uses
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    deepspeed.init_distributed()
    dtype, seed = PRECISIONS.get(config.get("precision")) or _common_dtype(), config.get("seed", 42)

    # Weights that a checkpoint lacks are drawn at random: the same on all ranks, as nothing equalises them over TP.
    transformers.set_seed(seed)
    model = load_model(model_name, dtype, config.get("trust_remote_code", False))
    plan, needs = Plan.of(model, tp_size), rehearse(model.config, tp_size)
    planned = plan.shapes(model, mpu.tp_rank)
    adapters = add_adapters(model, config, plan, mpu) if config.get("lora_rank") else {}
    if needs.own_loss:
        loss_from_logits(model)
    if config.get("packing") == "documents":
        keep_documents_apart(model)
    divide(model, plan, mpu.tp_group, mpu.tp_rank)
    layers, kept = plan.partition_config(needs.summed), wide(model, dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(model, config, needs.undecayed),
        config=deepspeed_config({**config, "tp_size": tp_size, "dp_size": dp_size}, dtype, layers),
        mpu=mpu,
    )
    check_shards(engine.module, planned)
    restore(engine.module, kept)
    if adapters:
        join(engine.module, adapters)
    convert_what_is_trained(engine.module)
    sum_gradients(engine, gradient_dtype(config, dtype), plan.uneven)
    optimize(engine, config, mpu.tp_group, needs.blocks)
    engine.whole_weights = WholeWeights(engine, mpu)
    # Dropout: alike within a TP group, whose ranks work on one batch, but on activations of which each has a part.
    engine.random_stream = world_rank if needs.divided_dropout else mpu.dp_rank
    transformers.set_seed(seed + 1 + engine.random_stream)
    return engine, mpu.tp_group, mpu.dp_group, mpu.tp_rank, mpu.dp_rank


def _optimizer(model: torch.nn.Module, config: dict[str, Any], undecayed: Collection[str]) -> torch.optim.Optimizer:
    """AdamW. Its learning rate is constant until it is given a schedule (training/schedule.py).

    Made before the weights are sharded: AutoTP puts the shards in their place. On GPUs a step is one kernel; that for
    CPUs rounds the last numbers of a tensor in another way, so that a weight would depend on what lies behind it.
    """
    return torch.optim.AdamW(
        parameter_groups(model, undecayed, config.get("weight_decay", 0.01)),
        lr=config.get("learning_rate", 1e-5),
        betas=(config.get("adam_beta1", 0.9), config.get("adam_beta2", 0.999)),
        eps=config.get("adam_epsilon", 1e-8),
        fused=torch.cuda.is_available(),
    )
