"""The global batch that is asked for, cut into micro-batches: as they are set, or as the planner finds them fastest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.rehearsal import rehearse
from tp2d_helpers.planning.advice import advice, describe, describe_parts
from tp2d_helpers.planning.candidates import GIB, MODES, SAFE, Candidate, candidates
from tp2d_helpers.planning.constants import constants_of
from tp2d_helpers.planning.memory import Setting, memory_per_gpu
from tp2d_helpers.speed.devices import Device, devices_in, smallest
from tp2d_helpers.training.elastic import possible_dp_sizes

AUTO = ("batch_size_per_gpu", "activation_checkpointing")  # what the planner chooses


def fit_batch(config: Config) -> Config:
    """Let gradient_accumulation_steps follow from global_batch_size, if that and the micro-batch are set.

    1 of them counts as not set.

    Raises:
        ConfigError: for a global batch that can't be cut so, or a micro-batch that is "auto" without one.
    """
    samples, micro, count = config.global_batch_size, config.batch_size_per_gpu, config.gradient_accumulation_steps
    auto = micro == "auto"
    if not samples and auto:
        raise ConfigError(
            "batch_size_per_gpu = 'auto': global_batch_size must say how many samples an optimizer step takes (it is "
            f"0); set it, say to {16 * config.dp_size}"
        )
    if not samples:
        return config
    share = config.dp_size * (1 if auto else micro)
    if samples % share:
        names = f"dp_size = {share}" if auto else f"batch_size_per_gpu × dp_size = {micro} × {config.dp_size} = {share}"
        near = " or ".join(str(n * share) for n in (samples // share, samples // share + 1) if n)
        raise ConfigError(f"global_batch_size = {samples}: must be a multiple of {names}; take {near}")
    whole = samples // share  # of one sample each, if the micro-batch is still to be chosen
    if count > 1 and (whole % count if auto else whole != count):
        right = f"must divide the {whole} samples of each replica" if auto else f"must be {whole}"
        raise ConfigError(
            f"gradient_accumulation_steps = {count}: with global_batch_size = {samples}, dp_size = {config.dp_size} "
            f"and batch_size_per_gpu = {micro!r} it {right}; take 1 to let it follow"
        )
    return config if auto else config.change(gradient_accumulation_steps=whole)


def choose_batch(
    config: Config, model: ModelFacts, resources: dict[str, float]
) -> tuple[Config, list[tuple[str, str, str]]]:
    """Settle the micro-batch and the checkpointing where they are "auto": the fastest that fits.

    On CPUs, whose memory isn't planned, the micro-batch is a replica's whole share, and nothing is checkpointed.

    Args:
        config: from `fit_batch`.
        resources: Ray's. Of several types of GPUs, the one with the least memory counts.

    Returns:
        (the config in numbers, preflight's row about the batch; none if nothing was chosen). Its `global_batch_size`
        is 0: it follows from the others now.

    Raises:
        ConfigError: if nothing fits (with what would), or Ray doesn't say which GPUs there are.
    """
    autos = [name for name in AUTO if getattr(config, name) == "auto"]
    if not (autos or config.global_batch_size):
        return config, []
    values, found = {}, ""
    if autos and config.use_gpu:
        values, found = _fastest(autos, config, model, _smallest(autos, resources))
    elif autos:
        share = config.samples_per_step // config.dp_size // config.gradient_accumulation_steps
        whole = dict(zip(AUTO, (share, "none"), strict=True))
        values, found = {name: whole[name] for name in autos}, "CPU, memory is not planned"
    settled = config.change(**values, global_batch_size=0)
    chosen = (
        f"{settled.samples_per_step} samples per step = batch_size_per_gpu {settled.batch_size_per_gpu} × dp_size "
        f"{settled.dp_size} × gradient_accumulation_steps {settled.gradient_accumulation_steps}"
    )
    mode = f", activation_checkpointing {settled.activation_checkpointing!r}" * (AUTO[1] in autos)
    return settled, [("batch", found, chosen + mode)]


def _fastest(autos: list[str], config: Config, model: ModelFacts, device: Device) -> tuple[dict[str, Any], str]:
    """(what to set, of how many that fit). Raises `ConfigError` if none does."""
    fitting = _fitting(config, model, device)
    if not fitting:
        raise ConfigError(_nothing_fits(autos, config, model, device))
    best = fitting[0]
    full = f"{best.memory.total / GIB:.1f} of {device.memory:.1f} GiB"
    found = f"fastest of {len(fitting)} that fit: {full}, by the planner ({constants_of(device).source})"
    return {name: getattr(best.setting, name) for name in (*AUTO, "gradient_accumulation_steps")}, found


def _smallest(autos: list[str], resources: dict[str, float]) -> Device:
    devices = devices_in(resources)
    if not devices or None in devices.values():
        names = ", ".join(devices) or "no type of GPU"
        raise ConfigError(f"{' and '.join(autos)} = 'auto': Ray names {names}, whose memory is not known here; set it")
    return smallest(devices.values())


def _base(config: Config, model: ModelFacts) -> Setting:
    """What isn't chosen of a setting."""
    whole = bool(rehearse(model.config, config.tp_size).whole_logits)
    least = dict(batch_size_per_gpu=1, activation_checkpointing="none", whole_logits=whole)
    return Setting.of({**config.model_dump(), **least})


def _modes(config: Config) -> tuple[str, ...]:
    mode = config.activation_checkpointing
    return MODES if mode == "auto" else (mode,)


def _fitting(config: Config, model: ModelFacts, device: Device) -> list[Candidate]:
    """The candidates of the grid, the fastest first: what is set stays, and fits at `min_dp_size`, too."""
    found = candidates(
        model, device, config.num_workers, config.samples_per_step, config.seq_length, base=_base(config, model),
        tp_sizes=[config.tp_size], zero_stages=[config.zero_stage], modes=_modes(config),
        constants=constants_of(device),
    )  # fmt: skip
    micro, count, fitting = config.batch_size_per_gpu, config.gradient_accumulation_steps, []
    for candidate in found:
        setting = candidate.setting
        if micro not in ("auto", setting.batch_size_per_gpu):
            continue
        if micro == "auto" and count not in (1, setting.gradient_accumulation_steps):
            continue
        fewest = _with_fewest_replicas(config, setting)
        if memory_per_gpu(model.shard(config.tp_size), fewest).total <= SAFE * device.memory * GIB:
            fitting.append(candidate)
    return fitting


def _with_fewest_replicas(config: Config, setting: Setting) -> Setting:
    """At the smallest dp_size that the run may shrink to, where each replica has the most to do and to hold."""
    batch = {name: getattr(setting, name) for name in (*AUTO, "gradient_accumulation_steps")}
    fewest = possible_dp_sizes(config.change(**batch))[0]
    count = setting.gradient_accumulation_steps * setting.dp_size // fewest
    return replace(setting, dp_size=fewest, gradient_accumulation_steps=count)


def _nothing_fits(autos: list[str], config: Config, model: ModelFacts, device: Device) -> str:
    """What the smallest setting needs, and what would fit."""
    micro, share = config.batch_size_per_gpu, config.samples_per_step // config.dp_size
    if micro == "auto":
        count = config.gradient_accumulation_steps
        micro = 1 if count == 1 else share // count
    setting = replace(_base(config, model), batch_size_per_gpu=micro, gradient_accumulation_steps=share // micro,
                      activation_checkpointing=_modes(config)[-1])  # fmt: skip
    setting = _with_fewest_replicas(config, setting)
    memory = memory_per_gpu(model.shard(config.tp_size), setting)
    needed, most = memory.total / GIB, SAFE * device.memory
    return (
        f"{' and '.join(autos)} = 'auto': nothing fits into {most:.1f} GiB, {SAFE:.0%} of {device.name}'s. "
        f"{describe(setting)} needs {needed:.1f} GiB per GPU ({describe_parts(memory)}). "
        + advice(model, device, setting, memory)
    )
