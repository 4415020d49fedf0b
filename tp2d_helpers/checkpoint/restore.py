"""What DeepSpeed's loading of a checkpoint leaves out, or brings along that should stay away."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import transformers


def load_trained(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Load a checkpoint's weights. With LoRA it has the adapters alone: what is frozen is there already.

    Raises:
        RuntimeError: with the names, if it lacks something that is trained, or has something else.
    """
    frozen = {name for name, weight in dst.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    missing, unexpected = dst.load_state_dict(src, strict=False)
    if wrong := [*set(missing) - frozen, *unexpected]:
        raise RuntimeError(f"the checkpoint is of another model: {len(wrong)} weights differ, such as {wrong[0]}")


@contextlib.contextmanager
def settings_stay(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Keep what the user has set from the checkpoint that is loaded within, which brings the settings of its time."""
    clipping = engine.gradient_clipping()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    yield
    for group, settings in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(settings)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = clipping


@contextlib.contextmanager
def without_padding(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Hide a last parameter group of which this rank has padding only: DeepSpeed can't load it from a universal form.

    Norms and biases are so few that some of several hundred replicas have none.
    """
    partitions = getattr(engine.optimizer, "params_in_partition", [True])  # stage 3 divides each weight
    if not engine.load_universal_checkpoint() or partitions[-1]:
        yield
        return
    groups = engine.optimizer.param_groups
    engine.optimizer.param_groups = groups[:-1]
    yield
    engine.optimizer.param_groups = groups


def settle_on_new_grid(engine: deepspeed.DeepSpeedEngine, step: int, seed: int, scaler: dict[str, Any] | None) -> None:
    """Begin new random states; add what a universal checkpoint leaves out: where AdamW's steps are, the loss scale."""
    transformers.set_seed((seed + 1 + engine.random_stream + 1_000_003 * step) % 2**32)
    for parameter, values in engine.optimizer.optimizer.state.items():
        # The fused kernel wants it there. A copy: at stage 3 all groups have one tensor, which each would count up.
        values["step"] = values["step"].to(parameter.device, copy=True)
    if scaler:
        vars(engine.optimizer.loss_scaler).update(scaler)


def random_states() -> dict[str, Any]:
    """Of the generators that training draws from: PyTorch's on CPU and GPU, and Python's."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_random_states(states: dict[str, Any]) -> None:
    """Go on drawing where `random_states` was called."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
