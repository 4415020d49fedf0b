"""An export has the names and values that `save_pretrained` gives the trained model: published names, buffers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from grid import run_grid
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.config import make_config
from tp2d_helpers.demo import build_model

TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=2048, max_position_embeddings=128)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "gpt_neox": dict(model_type="gpt_neox"),  # its head is published as embed_out
    "mixtral": dict(model_type="mixtral", num_local_experts=4),  # experts are stacked in memory, single in the files
    # A persistent buffer per layer.
    "gemma4_text": dict(model_type="gemma4_text", head_dim=8, global_head_dim=8, hidden_size_per_layer_input=0,
                        num_global_key_value_heads=2, sliding_window=32, vocab_size_per_layer_input=2048),
}  # fmt: skip


def save(engine: Any, *_: Any) -> None:
    """What `transformers` itself writes; at ZeRO 3 of gathered weights."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        engine.module.save_pretrained(Path(engine.module.config.name_or_path).parent / "expected")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("model, stage", [("gpt_neox", 1), ("mixtral", 1), ("gemma4_text", 1), ("gemma4_text", 3)])
def test_as_save_pretrained(tmp_path: Path, model: str, stage: int) -> None:
    folder = tmp_path / "model"
    build_model({**TINY, **MODELS[model]}, folder, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    for name, buffer in whole.named_buffers():
        if name in whole.state_dict():
            buffer.copy_(torch.linspace(0.5, 1.5, buffer.numel()).view_as(buffer))
    whole.save_pretrained(folder)
    config = make_config(
        model_name=str(folder), dataset_name="demo", use_gpu=False, tp_size=1, dp_size=1, seq_length=32, debug_steps=2,
        learning_rate=1e-3, storage_path=str(tmp_path), experiment_name="run", zero_stage=stage,
    )  # fmt: skip
    run_grid(config.model_dump(), after=save)
    [checkpoint] = config.run_dir.glob("checkpoint_*")
    found = tensors(export_checkpoint(checkpoint, str(folder), tmp_path / "export"))
    expected = tensors(tmp_path / "expected")
    assert found.keys() == expected.keys() == tensors(folder).keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    for name, buffer in whole.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer), name
