"""What a worker that runs out of GPU memory says: the configuration, and the cheapest ways out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.planning.advice import advice, describe
from tp2d_helpers.planning.candidates import GIB
from tp2d_helpers.planning.memory import Setting, memory_per_gpu
from tp2d_helpers.speed import graphs
from tp2d_helpers.speed.devices import DEVICES, device_named


@contextlib.contextmanager
def explain_out_of_memory(config: Mapping[str, Any], model: ModelFacts | None = None) -> Iterator[None]:
    """Around a worker's code: what runs out of GPU memory in it ends with the configuration and the ways out.

    Args:
        config: the run's settings, by the names in `Config`.
        model: its facts; read if they are needed and not given.

    Raises:
        RuntimeError: one line, in place of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = _explain(config, model, str(error))
        raise RuntimeError(message) from None


def _explain(config: Mapping[str, Any], model: ModelFacts | None, said: str) -> str:
    setting = Setting.of(config)
    model = model or ModelFacts.read(config["model_name"], config.get("trust_remote_code", False))
    memory = memory_per_gpu(model.shard(setting.tp_size), setting)
    name, total, allocated = _gpu()
    total = total or memory.total / GIB
    device = device_named(name, total) or replace(DEVICES[0], name=name, memory=total)  # any speed ranks the ways
    asked = said.split(". ")[1] if said.count(". ") > 1 else said.split("\n")[0]
    took = f"tensors took {allocated:.1f} of the {device.memory:.1f} GiB of {name}"
    return (
        f"out of GPU memory at {describe(setting)}: {asked}; {took}, and {memory.total / GIB:.1f} were predicted. "
        + advice(model, device, setting, memory)
    )


def _gpu() -> tuple[str, float | None, float]:
    """(name, total memory, highest allocated) of this worker's GPU, in GiB."""
    if not torch.cuda.is_available():
        return "no GPU", None, 0.0
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.name, properties.total_memory / GIB, graphs.peak_memory() / GIB
