"""A run goes on with the model that it began with, and is exported into it: the same contents, whatever the path."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import Run, run_grid
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tp2d_helpers.checkpoint import identity
from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.checkpoint.identity import check_model, differing, model_identity
from tp2d_helpers.checkpoint.settings import record_run
from tp2d_helpers.config import Config, ConfigError, make_config

LORA = dict(lora_rank=4, debug_steps=2, num_epochs=1)


def other_weights(folder: Path, name: str = "model.layers.1.mlp.up_proj.weight") -> None:
    """Another fine-tune of the same base: one value of one tensor is another; size and header stay."""
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[weights[name].numel() // 2] += 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny model, to change."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def test_contents_and_not_paths(model: Path, tmp_path: Path) -> None:
    then = model_identity(str(model))
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    assert model_identity(str(moved)) == then and None not in (then["config"], then["weights"])
    (moved / "README.md").write_text("Notes.")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(dict(reversed(config.items())) | {"transformers_version": "9"}))
    assert differing(then, model_identity(str(moved))) == []
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert differing(then, model_identity(str(moved))) == ["config"]
    other_weights(model)
    assert differing(then, model_identity(str(model))) == ["weights"]


def test_a_large_file_is_told_by_blocks_of_each_tensor(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE", 1000)
    monkeypatch.setattr(identity, "STRIDE", 2**40)
    then = model_identity(str(model))
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        other_weights(model, name)
        now = model_identity(str(model))
        assert differing(then, now) == ["weights"], name
        then = now


def test_several_files_and_pickles(model: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="200KB")
    (model / "model.safetensors").unlink(missing_ok=True)
    then = model_identity(str(model))["weights"]
    files = sorted(model.glob("model-*.safetensors"))
    weights = load_file(files[1])
    save_file({name: weight + 1 for name, weight in weights.items()}, files[1], metadata={"format": "pt"})
    assert len(files) > 2 and model_identity(str(model))["weights"] not in (then, None)
    files[1].unlink()
    assert model_identity(str(model))["weights"] is None
    for path in model.glob("model*"):
        path.unlink()
    torch.save({"a": torch.zeros(100_000)}, model / "pytorch_model.bin")
    assert model_identity(str(model))["weights"] is not None


def test_the_code_of_a_model_counts_where_it_is_trusted(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    (model / "configuration_own.py").write_text("class Own: ...\n")
    (model / "modeling_own.py").write_text("from .layers import Layer\n")
    (model / "layers.py").write_text("class Layer: ...\n")
    then = model_identity(str(model), trust_remote_code=True)
    (model / "unrelated.py").write_text("")
    assert model_identity(str(model), trust_remote_code=True) == then
    (model / "layers.py").write_text("class Layer: scale = 2\n")
    assert differing(then, model_identity(str(model), trust_remote_code=True)) == ["code"]
    assert model_identity(str(model))["code"] is None


def hub_cache(folder: Path, model: Path, commit: str, files: tuple[str, ...]) -> None:
    """As the hub's cache keeps a model of which these files were downloaded."""
    place = folder / "models--own--model"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit).mkdir(parents=True)
    for name in files:
        shutil.copy(model / name, place / "snapshots" / commit)


def test_the_commit_of_a_model_of_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its weights are here, the commit tells it; afterwards a copy of them elsewhere is the same."""
    find = identity.try_to_load_from_cache
    monkeypatch.setattr(identity, "try_to_load_from_cache", lambda *a, **k: find(*a, **k, cache_dir=tmp_path / "hub"))
    hub_cache(tmp_path / "hub", model, "a" * 40, ("config.json",))
    then = model_identity("own/model")
    assert then["commit"] == "a" * 40 and then["weights"] is None
    run = {"model": then, "model_name": "own/model"}
    with pytest.raises(ConfigError, match="its weights are not what this run was trained on: commit aaaaaaaaaaaa"):
        check_model(run, model_identity(str(model)), str(model))
    shutil.copy(model / "model.safetensors", tmp_path / "hub" / "models--own--model" / "snapshots" / ("a" * 40))
    check_model(run, model_identity(str(model)), str(model))
    hub_cache(tmp_path / "hub", model, "b" * 40, ("config.json", "model.safetensors"))
    check_model(run, model_identity("own/model"), "own/model")  # a commit that changed something else
    assert model_identity("not/there") == dict.fromkeys(("commit", *identity.PARTS))


# Workers.


def _other_model(names: dict[str, Any]) -> None:
    """A patch for `run_grid`: on rank 1 the model's folder has other weights."""
    if os.environ["RANK"] == "1":
        setup = names["setup_model_with_autotp"]

        def on_another_node(model_name: str, *args: Any) -> Any:
            place = shutil.copytree(model_name, Path(model_name).with_name("other-node"))
            other_weights(place)
            return setup(str(place), *args)

        names["setup_model_with_autotp"] = on_another_node


def test_a_node_with_another_model_is_found(model: Path, train: Callable[..., Run], tmp_path: Path) -> None:
    message = r"rank 1 has another model than the run \(weights \w+…, not weights \w+…\); all nodes must see the same"
    with pytest.raises(RuntimeError, match=message):
        train(model, dp_size=2, patch=_other_model)


def test_a_model_that_was_replaced_between_two_attempts(model: Path, train: Callable[..., Run]) -> None:
    config = Config(**train(model, **LORA).config).change(num_epochs=2, trust_checkpoint=True)
    record_run(config, model=model_identity(str(model)))
    other_weights(model)
    with pytest.raises(RuntimeError, match="rank 0 has another model than the run"):
        run_grid(config.model_dump())


# The export.


def exported(model: Path, folder: Path, **settings: Any) -> Path:
    """The last checkpoint of a run that was recorded as preflight does it."""
    fixed = dict(dataset_name="demo", use_gpu=False, tp_size=1, dp_size=1, batch_size_per_gpu=4, seq_length=64)
    config = make_config(
        **fixed, model_name=str(model), storage_path=str(folder / "runs"), precision="fp32", **settings
    )
    record_run(config, model=model_identity(str(model)))
    run_grid(config.model_dump())
    return config.run_dir / "checkpoint_00000002"


def test_adapters_are_merged_into_what_they_were_trained_on(model: Path, tmp_path: Path) -> None:
    checkpoint = exported(model, tmp_path, **LORA)
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    then = load_file(export_checkpoint(checkpoint, str(moved), tmp_path / "export") / "model.safetensors")
    other_weights(model)
    with pytest.raises(ValueError, match=r"its weights are not what this run was trained on: weights \w+… then"):
        export_checkpoint(checkpoint, str(model), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    again = load_file(export_checkpoint(checkpoint, str(moved), tmp_path / "export") / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in then.items())


def test_of_whole_weights_the_config_alone_must_be_that_of_the_run(model: Path, tmp_path: Path) -> None:
    checkpoint = exported(model, tmp_path, debug_steps=2, num_epochs=1)
    (model / "model.safetensors").unlink()  # not needed: all weights are in the checkpoint
    export_checkpoint(checkpoint, str(model), tmp_path / "export")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match="its config is not what this run was trained on"):
        export_checkpoint(checkpoint, str(model), tmp_path / "export")
