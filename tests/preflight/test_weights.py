"""Weights that would not be loaded, all of them and as they are, are refused by the headers of their files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.utils import SafetensorsRepoMetadata
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tp2d_helpers.config import ConfigError
from tp2d_helpers.model.engine import load_model
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.preflight.weights import check_weights

Weights = dict[str, torch.Tensor]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3235\n"
ONE = "model.layers.1.mlp.up_proj.weight"
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=128)  # fmt: skip
# Families whose files have other names, or other shapes, than the model: transformers puts them together as it loads.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_layer=2, n_head=4, n_embd=32, vocab_size=128),
    "gpt_neox": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen3_moe": {**SMALL, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8},
    "phi3": {**SMALL, "pad_token_id": 0},
    "opt": dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
                word_embed_proj_dim=32),
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=128),
}  # fmt: skip


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """model(name, change, **fields): a copy of a tiny model with changed weights, and fields of its config.json."""

    def copy(name: str = "llama", change: Callable[[Weights], Weights] | None = None, **fields: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_model(name), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        if change:
            changed = change(load_file(folder / "model.safetensors"))
            save_file({name: weight.contiguous() for name, weight in changed.items()}, folder / "model.safetensors")
        return folder

    return copy


def found(folder: Path | str) -> str:
    return check_weights(str(folder), ModelFacts.read(str(folder)))


def refused(folder: Path | str, *parts: str) -> None:
    with pytest.raises(ConfigError) as error:
        found(folder)
    assert str(error.value).startswith(f"model_name = {str(folder)!r}: ")
    for part in parts:
        assert part in str(error.value)


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, name: change(weights[name])}


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if name not in names}


def with_more(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, **{name: torch.zeros(64) for name in names}}


# What is right


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "qwen2-untied", "qwen3", "mistral"])
def test_weights_that_are_all_there(tiny_model: Callable[[str], Path], name: str) -> None:
    assert found(tiny_model(name)) == "weights in 1 file, F32"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("form", ["safetensors", "parts", "pickle"])
def test_names_are_those_of_the_files(tmp_path: Path, kind: str, form: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind]), dtype=torch.bfloat16)
    if form == "pickle":
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "parts" else "1GB")
    files = len([*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")])
    assert found(tmp_path) == f"weights in {files} file{'s' * (files > 1)}, BF16"
    assert files > 1 or form != "parts"


def test_a_tied_weight_need_be_there_once(model: Callable[..., Path]) -> None:
    def head_only(weights: Weights) -> Weights:
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
        return weights

    assert found(model("qwen2-tied", head_only)) == "weights in 1 file, F32"


@pytest.mark.parametrize("more", [0, 1])
def test_a_tied_weight_that_is_there_twice(model: Callable[..., Path], more: int) -> None:
    """Under two names it may be the same; a head of its own would be lost in an export."""
    twice = lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + more}  # noqa: E731
    folder = model("qwen2-tied", twice)
    if more:
        refused(folder, "that lm_head.weight and model.embed_tokens.weight are one", "set tie_word_embeddings to false")
    else:
        assert found(folder) == "weights in 1 file, F32"


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
@pytest.mark.parametrize("kind, head", [("gpt2", "lm_head.weight"), ("opt", "lm_head.weight"),
                                        ("falcon", "lm_head.weight"), ("gpt_neox", "embed_out.weight")])  # fmt: skip
def test_a_head_of_its_own_is_found_by_any_name(tmp_path: Path, kind: str, head: str, form: str) -> None:
    config = AutoConfig.for_model(kind, **FAMILIES[kind], tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    weights, embedding = load_file(tmp_path / "model.safetensors"), model.get_input_embeddings().weight.detach()
    (tmp_path / "model.safetensors").unlink()
    for more in (0.0, 1.0):
        together = {**weights, head: embedding + more}
        if form == "pickle":
            torch.save(together, tmp_path / "pytorch_model.bin")
        else:
            save_file(together, tmp_path / "model.safetensors")
        if more:
            refused(tmp_path, head, "are one (tie_word_embeddings)", "they differ: set tie_word_embeddings to false")
        else:
            assert found(tmp_path) == "weights in 1 file, F32"


def test_names_without_the_base_models_prefix(model: Callable[..., Path]) -> None:
    """As `AutoModel` saves them; transformers adds it."""
    change = lambda weights: {name.removeprefix("model."): weight for name, weight in weights.items()}  # noqa: E731
    assert found(model("llama", change)) == "weights in 1 file, F32"


def test_weights_of_something_else_are_named(model: Callable[..., Path]) -> None:
    folder = model("llama", with_more("vision_tower.patch.weight", "model.rotary_emb.inv_freq"))
    assert found(folder) == "weights in 1 file, F32; not used: vision_tower.patch.weight"


# What is not


@pytest.mark.parametrize("change, parts", [
    (prefixed("_orig_mod."), ["model.safetensors lacks lm_head.weight", "drawn at random", "begin with '_orig_mod.'"]),
    (prefixed("module."), ["All names there begin with 'module.': save the model without its wrapper"]),
    (without(ONE), [f"model.safetensors lacks {ONE}, which would be drawn at random"]),
    (without("lm_head.weight"), ["lacks lm_head.weight"]),
    (replaced(ONE, torch.t), [f"{ONE} [64, 176], not [176, 64]", "other shapes than its config says"]),
    (replaced("lm_head.weight", lambda w: w[:-1]), ["lm_head.weight [2047, 64], not [2048, 64]"]),
    (replaced(ONE, lambda w: w.to(torch.int8)), ["is quantised", f"{ONE} is I8", "Take the original"]),
    (replaced(ONE, lambda w: w.to(torch.float8_e4m3fn)), ["is quantised", f"{ONE} is F8_E4M3"]),
    (lambda weights: {**without(ONE)(weights), ONE.replace("weight", "qweight"): torch.zeros(8, 64, dtype=torch.int32)},
     ["is quantised", "qweight is I32"]),
    (with_more("model.layers.2.input_layernorm.weight"), ["its config leaves out weights", "layers.2.input_layernorm"]),
    (with_more("model.layers.0.self_attn.q_proj.bias"), ["its config leaves out", "layers.0.self_attn.q_proj.bias"]),
])  # fmt: skip
def test_weights_of_another_config(model: Callable[..., Path], change: Callable, parts: list[str]) -> None:
    refused(model("llama", change), *parts)


@pytest.mark.parametrize("fields, parts", [
    (dict(num_hidden_layers=3), ["lacks model.layers.2."]),
    (dict(num_hidden_layers=1), ["leaves out", "model.layers.1."]),
    (dict(vocab_size=4096), ["lm_head.weight [2048, 64], not [4096, 64]"]),
    (dict(attention_bias=True), ["lacks model.layers.0.self_attn.k_proj.bias"]),
    (dict(quantization_config={"quant_method": "gptq", "bits": 4}), ["is quantised (quantization_config: gptq)"]),
])  # fmt: skip
def test_a_config_of_other_weights(model: Callable[..., Path], fields: dict[str, Any], parts: list[str]) -> None:
    refused(model("llama", **fields), *parts)


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    """It is one of those that are stacked into a weight of the model."""
    config = AutoConfig.for_model("mixtral", **FAMILIES["mixtral"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if ".experts.2." in name)
    save_file(without(name)(weights), tmp_path / "model.safetensors")
    refused(tmp_path, "model.layers.0.mlp.experts", "model.safetensors")


# Files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage, parts", [
    (cut, ["model.safetensors (", " bytes) is cut off, or is no file of weights"]),
    (lambda path: path.write_bytes(b""), ["model.safetensors (0 bytes) is cut off"]),
    (lambda path: path.write_text(POINTER), ["model.safetensors is a Git LFS pointer", "run `git lfs pull`"]),
    (lambda path: path.unlink(), ["has no weights (model.safetensors or pytorch_model.bin)"]),
    (lambda path: (path.parent / "adapter_config.json").write_text("{}"), ["holds an adapter", "merge it"]),
])  # fmt: skip
def test_damaged_file(model: Callable[..., Path], damage: Callable[[Path], None], parts: list[str]) -> None:
    folder = model("llama")
    damage(folder / "model.safetensors")
    refused(folder, *parts)


class Code:
    """Runs a command where a pickle is loaded without care."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("damage, parts", [
    (cut, ["pytorch_model.bin (", "is cut off"]),
    (lambda path: path.write_text(POINTER), ["pytorch_model.bin is a Git LFS pointer"]),
    (lambda path: path.write_bytes(pickle.dumps({"lm_head.weight": Code()})), ["is no file of weights"]),
    (lambda path: torch.save({"lm_head.weight": Code()}, path), ["is no file of weights", "UnpicklingError"]),
    (lambda path: torch.save({"state_dict": torch.load(path)}, path), ["holds ['state_dict'], and not weights"]),
    (lambda path: torch.save(without(ONE)(torch.load(path)), path), [f"pytorch_model.bin lacks {ONE}"]),
    (lambda path: torch.save(replaced(ONE, lambda w: w.char())(torch.load(path)), path), [f"{ONE} is torch.int8"]),
])  # fmt: skip
def test_damaged_pickle(
    model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], parts: list[str]
) -> None:
    folder = model("llama")
    monkeypatch.chdir(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert found(folder) == "weights in 1 file, F32"
    damage(folder / "pytorch_model.bin")
    refused(folder, *parts)
    assert not (folder / "ran").exists()


def test_a_pickle_of_old(model: Callable[..., Path]) -> None:
    """PyTorch before 1.6 wrote no zip files."""
    folder = model("llama")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert found(folder) == "weights in 1 file, F32"


@pytest.fixture
def in_parts(model: Callable[..., Path]) -> Path:
    """A model in several files, with an index."""
    folder = model("llama")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.mark.parametrize("number, damage, parts", [
    (2, lambda path: path.unlink(), ["model-00002-of-", "that model.safetensors.index.json names: missing"]),
    (2, lambda path: path.write_text(POINTER), ["model-00002-of-", "is a Git LFS pointer"]),
    (1, cut, ["model-00001-of-", "is cut off"]),
    (1, lambda path: save_file({"lm_head.weight": torch.zeros(2)}, path), ["model-00001-of-", "which its index says"]),
    (0, lambda path: path.write_text(POINTER), ["model.safetensors.index.json is a Git LFS pointer"]),
    (0, lambda path: path.write_text("{"), ["model.safetensors.index.json can't be read"]),
    (0, lambda path: path.write_text("{}"), ["model.safetensors.index.json can't be read (KeyError: 'weight_map')"]),
])  # fmt: skip
def test_damaged_parts(in_parts: Path, number: int, damage: Callable[[Path], None], parts: list[str]) -> None:
    files = [in_parts / "model.safetensors.index.json", *sorted(in_parts.glob("model-*.safetensors"))]
    assert found(in_parts) == f"weights in {len(files) - 1} files, F32"
    damage(files[number])
    refused(in_parts, *parts)


# The hub's cache


@pytest.fixture
def cached(in_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of `org/parts` in the cache of the hub's client; its files."""
    snapshot = tmp_path / "hub" / "models--org--parts" / "snapshots" / ("a" * 40)
    shutil.copytree(in_parts, snapshot)
    (tmp_path / "hub" / "models--org--parts" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--parts" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_hub_model_in_the_cache(cached: Path) -> None:
    files = sorted(cached.glob("model-*.safetensors"))
    model = ModelFacts.read(str(cached))
    assert check_weights("org/parts", model) == f"weights in {len(files)} files, F32"
    cut(files[0])
    with pytest.raises(ConfigError, match=r"model_name = 'org/parts': model-00001-of-\d+.safetensors .* is cut off"):
        check_weights("org/parts", model)


def test_a_hub_model_that_is_still_to_come(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, model = sorted(cached.glob("model-*.safetensors")), ModelFacts.read(str(cached))
    files[1].unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-\d+.safetensors of \d+ files .* missing"):
        check_weights("org/parts", model)
    monkeypatch.setattr("tp2d_helpers.preflight.weights.is_offline_mode", lambda: False)
    assert check_weights("org/parts", model) == "weights to be downloaded, not looked at"
    assert check_weights("org/unknown", model) == "weights to be downloaded, not looked at"


def test_the_headers_of_the_hub(in_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a download of many gigabytes."""

    def headers(name: str) -> SafetensorsRepoMetadata:
        files = {file.name: parse_local_safetensors_file_metadata(file) for file in in_parts.glob("*.safetensors")}
        place = {name: file for file, header in files.items() for name in header.tensors}
        return SafetensorsRepoMetadata(metadata={}, sharded=True, weight_map=place, files_metadata=files)

    model, files = ModelFacts.read(str(in_parts)), sorted(in_parts.glob("*.safetensors"))
    monkeypatch.setattr("tp2d_helpers.preflight.weights.is_offline_mode", lambda: False)
    monkeypatch.setattr("tp2d_helpers.preflight.weights.get_safetensors_metadata", headers)
    assert check_weights("org/far", model) == f"weights in {len(files)} files of the hub, F32"
    files[0].unlink()
    with pytest.raises(ConfigError, match=rf"'org/far': each of {len(files) - 1} files lacks .*, which would be drawn"):
        check_weights("org/far", model)


def test_a_head_of_its_own_on_a_worker(model: Callable[..., Path]) -> None:
    """Where preflight could not look, as the weights were still to be downloaded."""
    twice = lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}  # noqa: E731
    with pytest.raises(ConfigError, match="files have another one: set tie_word_embeddings to false"):
        load_model(str(model("qwen2-tied", twice)), torch.float32)
