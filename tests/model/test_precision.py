"""Low precision: what fp32 master weights keep and bf16 ones lose, and which precision a device gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import grid
import pytest
import safetensors.torch
import torch

from tp2d_helpers.config import make_config
from tp2d_helpers.model.engine import deepspeed_config, get_mixed_precision_dtype

WEIGHT = "model.layers.0.mlp.up_proj.weight"  # every entry of it gets a gradient; divided by rows under AutoTP


def _masters(engine: Any, tp_group: Any, dp_group: Any) -> torch.Tensor:
    """This TP rank's shard of the weights that the optimizer updates. Collective."""
    parameter = dict(engine.module.named_parameters())[WEIGHT]
    assert parameter.dtype == torch.bfloat16
    return deepspeed.utils.safe_get_full_fp32_param(parameter).clone()


@pytest.fixture(scope="module")
def moved(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], float]:
    """moved(master_weights): the share of the masters of `WEIGHT` that 20 steps at learning rate 1e-5 have changed."""

    def share(master_weights: str) -> float:
        model, folder = tiny_model("qwen2-tied"), str(tmp_path_factory.mktemp("run"))
        config = make_config(
            model_name=str(model), dataset_name="demo", use_gpu=False, tp_size=2, dp_size=2, batch_size_per_gpu=2,
            seq_length=64, debug_steps=20, learning_rate=1e-5, weight_decay=0.0, master_weights=master_weights,
            storage_path=folder,
        )  # fmt: skip
        shards = grid.run_grid({**config.model_dump(), "precision": "bf16"}, after=_masters)
        assert torch.equal(shards[0], shards[2]) and torch.equal(shards[1], shards[3])  # ranks 0 and 2 are one DP group
        start = safetensors.torch.load_file(model / "model.safetensors")[WEIGHT].bfloat16().float()
        return (torch.cat(shards[:2]).float() != start).float().mean().item()

    return share


def test_fp32_masters_take_every_update(moved: Callable[[str], float]) -> None:
    share = moved("fp32")
    assert share > 0.99, f"{share:.1%} of the masters moved"


def test_bf16_masters_lose_updates(moved: Callable[[str], float]) -> None:
    """bf16 has 8 bits: an update of 1e-5 is lost on every weight larger than 1e-5 · 2⁹ = 0.005."""
    share = moved("bf16")
    assert 0.01 < share < 0.6, f"{share:.1%} of the masters moved"


@pytest.mark.parametrize("master_weights", ["fp32", "bf16"])
def test_bf16_config(master_weights: str) -> None:
    low = deepspeed_config(make_config(master_weights=master_weights).model_dump(), torch.bfloat16)["bf16"]
    assert low["enabled"]
    assert {low["bf16_master_weights_and_grads"], low["bf16_optimizer_states"]} == {master_weights == "bf16"}


def test_fp16_has_dynamic_loss_scaling() -> None:
    """Gradients under 6e-8 vanish in fp16; a fixed scale would be too small for some models, too large for others."""
    config = deepspeed_config(make_config(tp_size=1, dp_size=1).model_dump(), torch.float16)
    parsed = deepspeed.DeepSpeedConfig(config).float16_config
    assert parsed.enabled and parsed.loss_scale == 0  # DeepSpeed's sign for dynamic
    assert "bf16" not in config


def test_fp32_config_has_no_low_precision() -> None:
    assert not {"bf16", "fp16"} & set(deepspeed_config(make_config().model_dump(), torch.float32))


@pytest.mark.parametrize(
    "cuda, bf16, dtype", [(False, False, torch.float32), (True, True, torch.bfloat16), (True, False, torch.float16)]
)
def test_dtype_of_a_device(monkeypatch: pytest.MonkeyPatch, cuda: bool, bf16: bool, dtype: torch.dtype) -> None:
    """A GPU that only emulates bf16 (`including_emulation`) gets fp16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    assert get_mixed_precision_dtype() == dtype
