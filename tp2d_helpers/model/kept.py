"""Weights that a class keeps in fp32, whatever a run computes in, such as the biases of a mixture's routers.

In bf16, which has 8 significant bits, some of them would be equal, and tokens would go to other experts. DeepSpeed
keeps such buffers, and casts all parameters.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from tp2d_helpers.config import ConfigError


def kept_in_fp32(model: torch.nn.Module, dtype: torch.dtype) -> list[str]:
    """The names of a model's parameters that `from_pretrained(dtype=dtype)` loads in fp32 nevertheless."""
    if dtype not in (torch.bfloat16, torch.float16):
        return []
    wanted = set(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16:
        wanted |= set(getattr(model, "_keep_in_fp32_modules", None) or [])
    pattern = "|".join(name.replace("*", ".*") for name in sorted(wanted))
    return [name for name, _ in model.named_parameters() if pattern and re.search(pattern, name)]


def check_kept(model: torch.nn.Module, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Refuse a run in which they would be rounded.

    Raises:
        ConfigError: if one is trained, as ZeRO's shards have one dtype, or at ZeRO 3, where all are shards.
    """
    kept = kept_in_fp32(model, dtype)
    trained = [name for name in kept if not config.get("lora_rank") and model.get_parameter(name).requires_grad]
    if not (trained or (kept and config.get("zero_stage", 1) == 3)):
        return
    name, kind = (trained or kept)[0], model.config.model_type
    cure = "take precision 'fp32', or LoRA, which leaves it as it is" if trained else "take zero_stage 1 or 2"
    raise ConfigError(
        f"precision = {config['precision']!r}: the class of {kind!r} keeps {name} in fp32, and "
        f"{'it would be trained' if trained else 'ZeRO 3 would keep it'} in {str(dtype).removeprefix('torch.')}; {cure}"
    )


def wide(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The frozen ones by name, to be put back by `restore`."""
    names = [name for name in kept_in_fp32(model, dtype) if not model.get_parameter(name).requires_grad]
    return {name: model.get_parameter(name).data for name in names}


def restore(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put back what DeepSpeed has cast."""
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        parameter.data = weight.to(parameter.device)
