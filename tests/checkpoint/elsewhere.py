"""Exports that other programs read: environments of their own, folders as they come out, logits to compare."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from other_version import TOKENS
from tiny import family
from transformers import AutoModelForCausalLM

from tp2d_helpers.cache import build_once, cache_dir
from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.model.engine import load_model

SCRIPT = Path(__file__).with_name("other_version.py")
OLD = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
NEWEST = ("transformers",)
UNKNOWN = "unknown"  # a type that a version hasn't got

FACTORS = dict(short_factor=[1.1, 1.2, 1.3, 1.4], long_factor=[2.0, 3.0, 4.0, 5.0])
LONGROPE_OF_PHIMOE = dict(original_max_position_embeddings=128, rope_scaling=dict(
    type="longrope", short_mscale=1.1, long_mscale=1.2, original_max_position_embeddings=128, **FACTORS))  # fmt: skip


@functools.cache
def environment(*packages: str) -> dict[str, str]:
    """The variables of one with these packages instead of the installed ones. Skips without an index."""

    def install(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip can't install {' '.join(packages)} here: {done.stderr.strip().splitlines()[-1]}")

    return os.environ | {"PYTHONPATH": str(build_once(cache_dir() / "-".join(packages), install))}


def run(environment: dict[str, str], *arguments: Any, script: Path = SCRIPT) -> None:
    subprocess.run([sys.executable, script, *map(str, arguments)], env=environment, check=True)


def fabricated(folder: Path, model: Path) -> Path:
    """A checkpoint that has a model's weights as they are."""
    tag, whole = folder / "step_00000001", load_model(str(model), torch.float32)
    tag.mkdir(parents=True)
    common = dict(param_shapes=[{n: p.shape for n, p in whole.named_parameters()}], dp_world_size=1, mp_world_size=1)
    torch.save(dict(module=whole.state_dict(), ds_config={}, **common), tag / "mp_rank_00_model_states.pt")
    return folder


def exports(shapes: dict[str, dict[str, Any]], folder: Path) -> dict[str, Path]:
    """Of a tiny model of each type, what a run of it would export."""
    models = {kind: family(kind, **shape) for kind, shape in shapes.items()}
    return {
        kind: export_checkpoint(fabricated(folder / "runs" / kind, model), str(model), folder / kind)
        for kind, model in models.items()
    }


def logits(folder: Path, **how: Any) -> torch.Tensor:
    """[2, 80, vocabulary] of `TOKENS`, in fp32."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
        return model.eval()(TOKENS, use_cache=False).logits


def distance(found: dict[str, Any], expected: torch.Tensor) -> float | str:
    """The largest difference of logits; what is wrong; `UNKNOWN`."""
    if "logits" in found:
        return (found["logits"] - expected).abs().max().item()
    return UNKNOWN if "does not recognize this architecture" in found["error"] else found["error"]
