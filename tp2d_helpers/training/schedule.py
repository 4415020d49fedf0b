"""The learning rate as a function of the step, the settings and the length of the run. No checkpoint has a say in it.

So a resumed run is on the curve of the settings it is resumed with, at its step. The curves are those of
`transformers`; `warmup_steps` is read as its `TrainingArguments` read it.
"""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR

from tp2d_helpers.config import Config, ConfigError

# The last part of a run with warmup-stable-decay, and how the rate falls there: what equals a cosine in
# https://arxiv.org/abs/2405.18392 (sections 3 and 4).
DECAY_SHARE, DECAY_TYPE = 0.2, "1-sqrt"


def schedule_learning_rate(engine: deepspeed.DeepSpeedEngine, config: dict[str, Any], last_step: int) -> None:
    """Give the engine its schedule, at the step that it has reached. Call it when the checkpoint has been loaded.

    Args:
        last_step: the step that the run will end with.
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # ZeRO's is a wrapper
    for group in optimizer.param_groups:
        group["initial_lr"] = config["learning_rate"]
    # Not of the steps that fp16's loss scaling left out: the engine doesn't step the schedule there.
    done = engine.global_steps - engine.skipped_steps
    engine.lr_scheduler = _schedule(optimizer, config, last_step, done - 1)


def learning_rate_at(step: int, config: dict[str, Any], last_step: int) -> float:
    """The rate of optimizer step `step`, counted from 1, of a run that ends with step `last_step`."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config["learning_rate"])
    return config["learning_rate"] * _schedule(optimizer, config, last_step).lr_lambdas[0](step - 1)


def warmup(config: dict[str, Any], last_step: int) -> int:
    """Steps of warm-up: `warmup_steps`, or if it is below 1, that share of all steps, rounded up."""
    given = config["warmup_steps"]
    return given if isinstance(given, int) else math.ceil(given * last_step)


def check_schedule(config: Config, last_step: int) -> str:
    """What the learning rate will do, in words.

    Raises:
        ConfigError: if the warm-up leaves no step to decay in.
    """
    steps, text = warmup(config.model_dump(), last_step), f"{config.learning_rate:g}"
    text += f" after {steps} steps of warm-up" * bool(steps)
    if config.learning_rate_schedule == "constant":
        return text
    if steps >= last_step:
        raise ConfigError(
            f"warmup_steps = {config.warmup_steps}: the run has {last_step} steps, so none would be left for the "
            f"learning_rate_schedule {config.learning_rate_schedule!r}; warm up for fewer, or train for more"
        )
    return f"{text}, {config.learning_rate_schedule} to {config.min_learning_rate:g} at step {last_step}"


def _schedule(
    optimizer: torch.optim.Optimizer, config: dict[str, Any], last_step: int, last_epoch: int = -1
) -> LambdaLR:
    """Of `transformers`, for an optimizer made with `learning_rate`. The minimum comes after the last step."""
    kind, rate, lowest = (config[name] for name in ("learning_rate_schedule", "learning_rate", "min_learning_rate"))
    steps = warmup(config, last_step)
    if kind == "linear":
        return transformers.get_polynomial_decay_schedule_with_warmup(
            optimizer, steps, last_step, lr_end=lowest, power=1.0, last_epoch=last_epoch
        )
    if kind == "cosine":
        return transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, steps, last_step, min_lr=lowest, last_epoch=last_epoch
        )
    if kind == "warmup-stable-decay":
        decay = max(min(math.ceil(DECAY_SHARE * last_step), last_step - steps), 0)
        return transformers.get_wsd_schedule(
            optimizer, steps, decay, last_step, decay_type=DECAY_TYPE, min_lr_ratio=lowest / rate, last_epoch=last_epoch
        )
    return transformers.get_constant_schedule_with_warmup(optimizer, steps, last_epoch)
