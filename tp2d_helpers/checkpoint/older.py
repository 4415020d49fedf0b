"""Whether a checkpoint of an older form can be loaded: it can, where this version does with the model what that did."""

from __future__ import annotations

from typing import Any

from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.lora import ALL, LINEAR
from tp2d_helpers.model.rehearsal import rehearse
from tp2d_helpers.speed.mixtures import routers


def trains_otherwise(run: dict[str, Any]) -> bool:
    """Whether format 2 had other parameter groups or adapters for the model of a run than format 3 has.

    It let all weights of two dimensions decay, trained what the class freezes, and took routers for "all-linear".

    Args:
        run: its settings.
    """
    model = ModelFacts.read(run["model_name"], run.get("trust_remote_code", False))
    if run.get("lora_rank"):
        return run["lora_targets"] == ALL and any(type(router) in LINEAR for router in routers(model.meta))
    return bool(rehearse(model.config).undecayed) or not all(p.requires_grad for p in model.meta.parameters())
