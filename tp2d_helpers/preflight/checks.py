"""The checks of settings, versions, model, memory and precision. Each says what it found, or ends the run.

A check returns what was found and what was chosen, for preflight's table, or raises `ConfigError` with the value found
and what would be right.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from packaging.version import Version

from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.data.overlap import same_source
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.demo import display_name
from tp2d_helpers.model.engine import PRECISIONS
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.kept import check_kept
from tp2d_helpers.model.lora import adapter_parameters, kinds, targets
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.proof import prove
from tp2d_helpers.model.rehearsal import compare_losses, rehearse
from tp2d_helpers.model.styles import GATHERED
from tp2d_helpers.planning.advice import advice, describe, describe_parts
from tp2d_helpers.planning.candidates import GIB, SAFE
from tp2d_helpers.planning.memory import Setting, memory_per_gpu
from tp2d_helpers.preflight.weights import check_weights
from tp2d_helpers.speed.devices import Device, devices_in, smallest
from tp2d_helpers.speed.float8 import GRANULE
from tp2d_helpers.speed.gradients import in_fp32
from tp2d_helpers.speed.layers import decoder_layers
from tp2d_helpers.speed.mixtures import blocks_of_experts, routers
from tp2d_helpers.training.elastic import possible_dp_sizes

# Older ones lack what the run relies on (AutoTP by the model's plan with ZeRO, Ray Train V2), or were not tested.
OLDEST = {"torch": "2.11", "transformers": "5.17", "deepspeed": "0.19.8", "ray": "2.60"}


def check_resilience(config: Config) -> None:
    """Settings of evaluation, checkpoints and elasticity that contradict each other.

    Raises:
        ConfigError: for the first of them.
    """
    if config.keep_checkpoints_by == "eval_loss" and not config.eval_samples:
        raise ConfigError("keep_checkpoints_by = 'eval_loss': nothing is evaluated; set eval_samples, say to 16")
    evaluated = config.eval_dataset_name
    if evaluated == "auto":
        raise ConfigError(
            "eval_dataset_name = 'auto': must be a dataset's name; '' holds out documents of dataset_name"
        )
    if evaluated and (both := same_source(config.dataset_name, evaluated, config.dataset_config)):
        raise ConfigError(
            f"eval_dataset_name = {evaluated!r}: must be another dataset than the training's, and dataset_name = "
            f"{config.dataset_name!r} has {both}, too; with '', whole documents of that one are held out"
        )
    if config.eval_dataset_name and not config.eval_samples:
        raise ConfigError(f"eval_dataset_name = {config.eval_dataset_name!r}: eval_samples is 0; set it, say to 16")
    if config.eval_interval and not config.eval_samples:
        raise ConfigError(f"eval_interval = {config.eval_interval}: eval_samples is 0; set it, say to 16")
    if config.sample_prompts.strip() and not config.eval_samples:
        raise ConfigError("sample_prompts: they are continued at each evaluation; set eval_samples, say to 16")
    if config.min_dp_size > config.dp_size:
        raise ConfigError(f"min_dp_size = {config.min_dp_size}: must not be above dp_size, which is {config.dp_size}")


def check_versions() -> str:
    """The versions of the libraries that matter. Raises `ConfigError` for one older than what was tested."""
    found = {name: importlib.metadata.version(name) for name in OLDEST}
    for name, version in found.items():
        if Version(version) < Version(OLDEST[name]):
            raise ConfigError(f"{name} {version}: too old, {OLDEST[name]} is needed (pip install -r requirements.txt)")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def check_model(config: Config, model: ModelFacts) -> tuple[str, str]:
    """(what the model is, how it will be divided). Raises `ConfigError` if that can't be done."""
    if model.positions and config.seq_length > model.positions:
        raise ConfigError(f"seq_length = {config.seq_length}: the model's positions end at {model.positions}")
    if config.tp_size > 1:
        model.shard(config.tp_size)
    tokenizer = load_tokenizer(config.model_name, config.trust_remote_code)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what transformers makes of a folder without one
        raise ConfigError(f"model_name = {config.model_name!r}: has no tokenizer (tokenizer.json, or its older files)")
    weights = check_weights(config.model_name, model)
    if remark := getattr(tokenizer, "remark", ""):
        weights += f"; {remark}"
    decoder_layers(model.meta)
    unknown = torch.bfloat16 if config.use_gpu else torch.float32
    check_kept(model.meta, PRECISIONS.get(config.precision, unknown), config.model_dump())
    needs = rehearse(model.config, config.tp_size)
    if needs.own_loss:
        compare_losses(model.config)
    if config.tp_size > 1 or config.lora_rank or config.activation_checkpointing != "none":
        prove(model.config, config.tp_size, needs, config.model_dump())
    name = display_name(config.model_name)
    shards = f"{config.tp_size} shard{'s' * (config.tp_size > 1)}"
    replicas = f"{config.dp_size} replica{'s' * (config.dp_size > 1)}"
    special = ", equal to one process on a small model" * (config.tp_size > 1)
    special += ", loss computed from the logits" * needs.own_loss
    special += f", logits computed whole ({needs.whole_logits})" * bool(needs.whole_logits)
    special += f", gradients of {len(needs.summed)} whole weights summed over the ranks" * bool(needs.summed)
    kind = model.config.model_type + (f", the text model of {model.part_of} alone" if model.part_of else "")
    return f"{name}: {kind}, {model.parameters:,} parameters, {weights}", (
        f"{shards} × {replicas}, ZeRO stage {config.zero_stage}{special}"
    )


def check_lora(config: Config, model: ModelFacts) -> list[tuple[str, str, str]]:
    """Preflight's row about LoRA; none without. Raises `ConfigError` for targets or a dropout that can't be."""
    if not config.lora_rank:
        return []
    layers = targets(model.meta, config.lora_targets)
    names, styles = kinds(layers), Plan.of(model.meta, config.tp_size).styles
    if gathered := kinds(name for name in layers if styles.get(name) == GATHERED):
        others = ",".join(name for name in names if name not in gathered)
        raise ConfigError(
            f"lora_targets = {config.lora_targets!r}: at tp_size {config.tp_size} the outputs of {', '.join(gathered)} "
            f"are gathered, and no adapter can stand beside them; take {others}"
        )
    if config.lora_dropout and rehearse(model.config, config.tp_size).divided_dropout:
        raise ConfigError(
            f"lora_dropout = {config.lora_dropout:g}: at tp_size {config.tp_size} the model has dropout on attention "
            "heads or other activations that are divided, where each rank needs its own random numbers, and LoRA's "
            "needs the same on all. Set lora_dropout to 0, or the model's (attention_dropout in its config.json)"
        )
    trained = adapter_parameters(model.meta, config.model_dump())
    found = f"{trained:,} parameters are trained, {100 * trained / model.parameters:.2g} % of the model's"
    on = f"rank {config.lora_rank}, alpha {config.lora_alpha:g}, on {', '.join(names)}"
    if blocks_of_experts(model.meta):
        weighed = any(model.meta.get_submodule(name) in routers(model.meta) for name in layers)
        on += f"; experts{' and routers' * (not weighed)} stay frozen"
    return [("LoRA", found, on)]


def check_memory(config: Config, model: ModelFacts, resources: dict[str, float]) -> list[tuple[str, str, str]]:
    """Preflight's row about memory; none without GPUs, or where Ray doesn't say which they are.

    It is of the fewest replicas that the run may go on with, which have the most to hold.

    Args:
        resources: Ray's, which name the types of a cluster's GPUs. If they differ, the one with the least memory
            counts: a worker may get it.

    Raises:
        ConfigError: see `memory_on`.
    """
    devices = devices_in(resources)
    if not config.use_gpu or not devices:
        return []
    if unknown := [name for name, device in devices.items() if device is None]:
        return [("memory", f"{', '.join(unknown)}: not a GPU that is known here", "no prediction")]
    fewest = possible_dp_sizes(config)[0]
    count = config.gradient_accumulation_steps * config.dp_size // fewest
    least = config.change(dp_size=fewest, gradient_accumulation_steps=count, min_dp_size=0)
    found, parts = memory_on(least, model, smallest(devices.values()))
    return [("memory", found + f" at dp_size {fewest}" * (fewest < config.dp_size), parts)]


def memory_on(config: Config, model: ModelFacts, device: Device) -> tuple[str, str]:
    """(what is predicted of the GPU's memory, of what parts) for preflight's table.

    Raises:
        ConfigError: if it is more than the GPU has. Between `SAFE` and all of the GPU, the row says that it is tight.
    """
    setting, shard = Setting.of(config.model_dump()), model.shard(config.tp_size)
    if setting.in_chunks(shard) and rehearse(model.config, config.tp_size).whole_logits:
        setting = replace(setting, whole_logits=True)
    memory = memory_per_gpu(shard, setting)
    share = memory.total / GIB / device.memory
    found = f"{memory.total / GIB:.1f} of {device.memory:.1f} GiB per GPU"
    if share > 1:
        raise ConfigError(
            f"{describe(setting)}: needs {memory.total / GIB:.1f} GiB per GPU ({describe_parts(memory)}), and "
            f"{device.name} has {device.memory:.1f} GiB. {advice(model, device, setting, memory)}"
        )
    tight = "; tight: it may run out of memory" if share > SAFE else ""
    return found, describe_parts(memory) + tight


def settled_precision(config: Config, resources: dict[str, float]) -> str:
    """What "auto" comes to; it stays "auto" where Ray doesn't say which GPUs there are, or one is not known here."""
    devices = devices_in(resources).values()
    if config.precision != "auto" or not config.use_gpu:
        return "fp32" if config.precision == "auto" else config.precision
    if any(device and not device.bf16 for device in devices):
        return "fp16"
    return "bf16" if devices and all(devices) else "auto"


def check_precision(config: Config, resources: dict[str, float]) -> tuple[str, str]:
    """(what the devices compute in, what the run will), by the GPU types that Ray reports.

    Raises:
        ConfigError: for bf16 master weights or sums of gradients of a run that doesn't compute in bf16, for sums in
            fp32 where nothing takes them, and for fp16 on a CPU without it.
    """
    old = settled_precision(config.change(precision="auto"), resources) == "fp16"
    precision = settled_precision(config, resources).replace("auto", "bf16")
    if config.master_weights == "bf16" and precision != "bf16":
        raise ConfigError(
            f"master_weights = 'bf16': this run computes in {precision} (precision = {config.precision!r}); "
            "bf16 masters need precision 'bf16', all others take master_weights 'fp32'"
        )
    if config.gradient_dtype == "bf16" and precision != "bf16":
        raise ConfigError(
            f"gradient_dtype = 'bf16': this run computes in {precision} (precision = {config.precision!r}); "
            "take 'auto', or precision 'bf16'"
        )
    if config.gradient_dtype == "fp32" != precision and config.master_weights == "bf16":
        raise ConfigError(
            f"gradient_dtype = 'fp32': with master_weights = 'bf16' gradients are summed in {precision}; "
            "take 'auto', or another master_weights"
        )
    if precision == "fp16" and not (config.use_gpu or CPU_Accelerator().is_fp16_supported()):
        raise ConfigError("precision = 'fp16': this CPU lacks instructions for it (AVX512-FP16); take 'fp32' or 'bf16'")
    if precision == "fp8":
        check_fp8(config, resources)
    found = "CPU" if not config.use_gpu else f"{'no ' if old else ''}bf16 in hardware"
    precision += " with loss scaling" if precision == "fp16" else ""
    sums = "fp32" if in_fp32(config.gradient_dtype, config.master_weights) else precision[:4]
    computed = "fp8 matmuls in bf16" if precision == "fp8" else precision
    kept = f"{config.master_weights} master weights, {sums} gradient sums"
    return found, f"{computed}, {kept}, {'NCCL' if config.use_gpu else 'gloo'}"


def check_fp8(config: Config, resources: dict[str, float]) -> None:
    """Whether the matmuls of this run can be in fp8.

    Raises:
        ConfigError: if the GPUs lack it, or a setting is at odds with it.
    """
    take = "take precision 'bf16'"
    known = devices_in(resources).items()
    lacking = [name for name, device in known if device and not device.fp8] if config.use_gpu else ["CPUs"]
    if lacking:
        raise ConfigError(f"precision = 'fp8': {', '.join(lacking)} can't; it needs Hopper GPUs or newer; {take}")
    tokens = config.batch_size_per_gpu * config.seq_length if config.batch_size_per_gpu != "auto" else config.seq_length
    asked = config.optimizations.split(",")
    for wrong, found, right in (
        (config.zero_stage == 3, "zero_stage = 3", "weights are gathered as they are used there; take 1 or 2"),
        (config.lora_rank > 0, f"lora_rank = {config.lora_rank}", f"adapters train beside bf16 weights; {take}"),
        (
            config.tp_size > 1 and "auto" not in asked and "block_all_reduce" not in asked,
            f"optimizations = {config.optimizations!r}", "at tp_size > 1 it needs block_all_reduce",
        ),
        (
            tokens % GRANULE > 0, f"batch_size_per_gpu × seq_length = {tokens}",
            f"must be a multiple of {GRANULE}, as fp8 matmuls want it",
        ),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(f"precision = 'fp8' with {found}: {right}")
