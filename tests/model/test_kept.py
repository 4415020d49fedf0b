"""What a class keeps in fp32 stays so in runs that compute in bf16, in the engine and in the export, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TYPES
from grid import run_grid
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.checkpoint.run_folder import newest_checkpoint
from tp2d_helpers.checkpoint.settings import record_run
from tp2d_helpers.config import ConfigError, make_config
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.kept import kept_in_fp32
from tp2d_helpers.preflight.checks import check_model


@pytest.fixture
def model(family: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """model(kind): in bf16, with biases of the size that GLM-5.2's have, where bf16 has 8 values."""

    def made(kind: str) -> Path:
        whole = AutoModelForCausalLM.from_pretrained(family(kind, **TYPES[kind]), dtype=torch.bfloat16)
        whole.save_pretrained(tmp_path / "model")
        weights, draw = load_file(tmp_path / "model" / "model.safetensors"), torch.Generator().manual_seed(5)
        for name in [name for name in weights if "e_score_correction_bias" in name]:
            weights[name] = 6.817 + 0.246 * torch.rand(weights[name].shape, generator=draw)
        save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        for file in family(kind, **TYPES[kind]).glob("tokenizer*"):
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
        return tmp_path / "model"

    return made


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    fixed = dict(dataset_name="demo", use_gpu=False, dp_size=1, batch_size_per_gpu=2, seq_length=64, debug_steps=2,
                 precision="bf16", learning_rate=1e-3, weight_decay=0.5)  # fmt: skip
    return fixed | dict(model_name=str(folder), storage_path=str(folder.parent)) | more


def dtypes(engine: Any, *_: Any) -> dict[str, torch.dtype]:
    """For `run_grid(after=)`."""
    module = engine.module
    return {name: weight.dtype for name, weight in [*module.named_parameters(), *module.named_buffers()]}


@pytest.mark.parametrize("kind, more", [
    ("ernie4_5_moe", dict(tp_size=1)), ("ernie4_5_moe", dict(tp_size=2)),
    ("ernie4_5_moe", dict(tp_size=2, lora_rank=2)), ("glm4_moe", dict(tp_size=2)),
])  # fmt: skip
def test_engine_and_export(model: Callable[[str], Path], kind: str, more: dict[str, Any]) -> None:
    folder = model(kind)
    config = make_config(**settings(folder, **more))
    found = run_grid(config.model_dump(), after=dtypes)[0]
    record_run(config)
    out = export_checkpoint(newest_checkpoint(config.run_dir)[0], str(folder), folder.parent / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    biases = [name for name in before if "e_score_correction_bias" in name]
    assert biases and all(torch.equal(before[name], after[name]) for name in biases)
    assert {found[name] for name in found if "e_score_correction_bias" in name} == {torch.float32}
    read = AutoModelForCausalLM.from_pretrained(out)
    assert read.dtype == torch.bfloat16
    if "lora_rank" in more:  # what has no adapter is as it was
        routers = kept_in_fp32(read, torch.bfloat16)
        assert len(routers) == 2 and all(found[name] == torch.float32 for name in routers)


@pytest.mark.parametrize("more, words", [
    (dict(), "keeps model.layers.1.mlp.gate.weight in fp32, and it would be trained in bfloat16; take"),
    (dict(lora_rank=2, zero_stage=3), "ZeRO 3 would keep it in bfloat16; take zero_stage 1 or 2"),
    (dict(lora_rank=2), ""),
    (dict(precision="fp32"), ""),
])  # fmt: skip
def test_what_would_be_rounded_is_refused(model: Callable[[str], Path], more: dict[str, Any], words: str) -> None:
    folder = model("ernie4_5_moe")
    config, facts = make_config(**settings(folder, **more)), ModelFacts.read(str(folder))
    if not words:
        check_model(config, facts)
        return
    with pytest.raises(ConfigError, match=f"^precision = 'bf16': the class of 'ernie4_5_moe'.*{words}"):
        check_model(config, facts)
