"""What a worker that runs out of GPU memory says: the configuration, and the cheapest ways out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers

from tp2d_helpers import graphs
from tp2d_helpers.engine import load_config
from tp2d_helpers.estimate import device_named
from tp2d_helpers.fit import GIB, advice, describe
from tp2d_helpers.memory import Setting, Shard, memory_per_gpu


@contextlib.contextmanager
def explain_out_of_memory(
    config: Mapping[str, Any], hf_config: transformers.PretrainedConfig | None = None
) -> Iterator[None]:
    """Around a worker's code: what runs out of GPU memory in it ends with the configuration and the ways out.

    Args:
        config: the run's settings, by the names in `Config`.
        hf_config: the model's; loaded if it is needed and not given.

    Raises:
        RuntimeError: one line, in place of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = _explain(config, hf_config, str(error))
        raise RuntimeError(message) from None


def _explain(config: Mapping[str, Any], hf_config: transformers.PretrainedConfig | None, said: str) -> str:
    setting = Setting.of(config)
    hf_config = hf_config or load_config(config["model_name"], config.get("trust_remote_code", False))
    memory = memory_per_gpu(Shard.of(hf_config, setting.tp_size), setting)
    name, total, allocated = _gpu()
    device = device_named(name) or device_named("H100")  # for a GPU that isn't known: its speed ranks the ways as well
    device = replace(device, memory=total or memory.total / GIB)
    asked = said.split(". ")[1] if said.count(". ") > 1 else said.split("\n")[0]
    took = f"tensors took {allocated:.1f} of the {device.memory:.1f} GiB of {name}"
    return (
        f"out of GPU memory at {describe(setting)}: {asked}; {took}, and {memory.total / GIB:.1f} were predicted. "
        + advice(hf_config, device, setting, memory)
    )


def _gpu() -> tuple[str, float | None, float]:
    """(name, total memory, highest allocated) of this worker's GPU, in GiB."""
    if not torch.cuda.is_available():
        return "no GPU", None, 0.0
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.name, properties.total_memory / GIB, graphs.peak_memory() / GIB
