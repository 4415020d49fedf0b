"""An export is the same model to transformers 4, to the pinned version and to the newest, for every type they know."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from elsewhere import (
    FACTORS,
    LONGROPE_OF_PHIMOE,
    NEWEST,
    OLD,
    TOKENS,
    UNKNOWN,
    distance,
    environment,
    fabricated,
    logits,
    run,
)
from families import TYPES
from other_version import TEXT
from tiny import tiny_shape
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tp2d_helpers.checkpoint.config_file import add_older_fields
from tp2d_helpers.checkpoint.hugging_face import PUBLISHED_AS, export_checkpoint
from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.demo import demo_documents, train_tokenizer
from tp2d_helpers.model.engine import load_model
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.lora import targets

YARN = dict(factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
# What version 4 writes, each unlike the default of its class.
FIELDS: dict[str, dict[str, Any]] = {
    "qwen2": dict(rope_scaling=dict(type="yarn", **YARN)),
    "llama": dict(rope_scaling=dict(rope_type="llama3", **LLAMA3)),
    "gemma3_text": dict(rope_local_base_freq=3e4, rope_scaling=dict(rope_type="linear", factor=4.0)),
    "phi3": dict(partial_rotary_factor=1.0, original_max_position_embeddings=128,
                 rope_scaling=dict(type="longrope", **FACTORS)),
    # Beyond the original length, its class of version 5 gives other logits than that of version 4, of one folder.
    "phimoe": LONGROPE_OF_PHIMOE,
    "olmo3": dict(rope_scaling=dict(rope_type="yarn", **YARN)),
    "stablelm": dict(partial_rotary_factor=0.5),
    "gpt_neox": dict(rotary_emb_base=5e5, rotary_pct=0.5),
    "apertus": dict(rope_scaling=dict(rope_type="llama3", **LLAMA3)),
    "qwen3_moe": dict(num_experts=4),
}  # fmt: skip
# Those that version 4 hasn't got.
NEW = {"qwen3_5_text", "ministral3", "nanochat", "granite_swa", "cohere2_moe", "cwm", "gemma4_text",
       "gemma4_unified_text", "granitemoe_swa", "hrm_text", "hy_v3", "hyperclovax", "jais2", "kolibri1", "mellum",
       "minimax_m2", "qwen3_5_moe_text"}  # fmt: skip
WITHOUT_ROPE = ("gpt2", "opt")
# Version 4 keeps the two scalars of Apertus' activation in bf16, whatever the model is in.
TOLERANCE = {"apertus": 1e-3}


def written_by_4(kind: str) -> dict[str, Any]:
    """The fields of a tiny model's config, as version 4 calls them."""
    rope = {} if kind in WITHOUT_ROPE else dict(rope_theta=5e5)
    shape = tiny_shape(kind, **TYPES[kind]) | dict(bos_token_id=2047, eos_token_id=2047) | rope
    return copy.deepcopy(shape | FIELDS.get(kind, {}))  # version 5 writes into what it is given


@pytest.mark.parametrize("kind", [*FIELDS, "mistral", "gpt2"])
@pytest.mark.parametrize("given", [True, False])
def test_fields_of_version_4(tmp_path: Path, kind: str, given: bool) -> None:
    """They are kept where the original has them, and made where it was written by version 5; 5 reads the same."""
    fields = written_by_4(kind) | dict(torch_dtype="float32")
    config = AutoConfig.for_model(**copy.deepcopy(fields))
    config.save_pretrained(tmp_path)
    add_older_fields(tmp_path, config, fields if given else {})
    said, read = json.loads((tmp_path / "config.json").read_text()), AutoConfig.from_pretrained(tmp_path)
    expected = {"rope_theta", *FIELDS.get(kind, {})} - {"rope_theta" if kind in ("gpt2", "gpt_neox") else ""}
    for name in [*expected, "torch_dtype"]:
        found = said[name]
        if name == "rope_scaling" and not given:  # where the original has "type", there are both names
            found = {part: found[part] for part in fields[name]}
        assert found == fields[name], name
    assert getattr(read, "rope_parameters", None) == getattr(config, "rope_parameters", None)
    assert said["torch_dtype"] == said["dtype"]


def test_a_field_that_is_at_odds_is_not_kept(tmp_path: Path) -> None:
    """Version 5 goes by `rope_parameters`, and so must version 4."""
    config = AutoConfig.for_model("llama", rope_parameters=dict(rope_type="default", rope_theta=5e5))
    config.save_pretrained(tmp_path)
    add_older_fields(tmp_path, config, dict(rope_theta=1e4, rope_scaling=dict(rope_type="linear", factor=2.0)))
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["rope_theta"] == 5e5 and said["rope_scaling"] is None


def saved(folder: Path) -> tuple[dict[str, torch.Size], list[str]]:
    """(shapes of the weights by name, architectures as published models have them)."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    own = json.loads((folder / "config.json").read_text())["architectures"]
    return {name: weight.shape for name, weight in weights.items()}, [PUBLISHED_AS.get(name, name) for name in own]


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma4_unified_text"])
def test_heads_of_gemma_4(tmp_path: Path, kind: str) -> None:
    """By the names that published folders have, and other programs go by; not where these can't say it."""
    config = AutoConfig.for_model(**tiny_shape(kind, **TYPES[kind]))
    config.save_pretrained(tmp_path)
    add_older_fields(tmp_path, config, {})
    said = json.loads((tmp_path / "config.json").read_text())
    heads = {name: said[name] for name in ("global_head_dim", "num_global_key_value_heads") if name in said}
    assert heads == {name: TYPES[kind][name] for name in heads} and "global_head_dim" in heads
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps(said | {"per_layer_config": {"0": {"head_dim": 16}}}))
    other = AutoConfig.from_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    add_older_fields(tmp_path, other, {})
    assert "global_head_dim" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["4", "5"])
def test_every_type_in_every_version(
    family: Callable[..., Path], generations: dict, tmp_path: Path, origin: str
) -> None:
    """From folders that version 4 wrote, and version 5; logits and tokens of the original and of its export."""
    old, newest = environment(*OLD), environment(*NEWEST)
    if origin == "4":
        (tmp_path / "shapes.json").write_text(json.dumps({kind: written_by_4(kind) for kind in TYPES}))
        run(old, "write", tmp_path, tmp_path / "shapes.json")
        train_tokenizer(demo_documents()).save_pretrained(tmp_path / "tokenizer")
    folders, exports, expected = {}, {}, {}
    for kind in TYPES:
        folder = tmp_path / kind if origin == "4" else family(kind, **TYPES[kind])
        if not (folder / "config.json").exists():  # a type that version 4 hasn't got
            continue
        if origin == "4":
            shutil.copytree(tmp_path / "tokenizer", folder, dirs_exist_ok=True)
            AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # as the class of the type has it
        checkpoint = fabricated(tmp_path / "runs" / kind, folder)
        exports[kind] = export_checkpoint(checkpoint, str(folder), tmp_path / f"x-{kind}")
        folders[kind], expected[kind] = folder, logits(folder)
        if origin == "4":  # by the names that loaders of other libraries know: experts one by one, say
            assert saved(exports[kind]) == saved(folder), kind
    found = {}
    for name, variables in (("4.57", old), ("newest", newest)):
        (tmp_path / name).mkdir()
        run(variables, "read", tmp_path / name, *exports.values())
        found[name] = {kind: torch.load(tmp_path / name / f"x-{kind}.pt") for kind in exports}
    if origin == "4":  # what goes in is the model that version 4 has, too
        run(old, "read", tmp_path, *folders.values())
    wrong = []
    for kind, export in exports.items():
        differences = {f"out: {name}": distance(found[name][kind], expected[kind]) for name in found}
        differences["out: pinned"] = (logits(export) - expected[kind]).abs().max().item()
        if origin == "4":
            differences["in: 4.57"] = distance(torch.load(tmp_path / f"{kind}.pt"), expected[kind])
        limit = TOLERANCE.get(kind, 1e-5)
        wrong += [f"{kind}, {name}: {d}" for name, d in differences.items()
                  if d != UNKNOWN and (isinstance(d, str) or d > limit)]  # fmt: skip
        file = Tokenizer.from_file(str(folders[kind] / "tokenizer.json")).encode(TEXT).ids
        read = [tokens[kind].get("ids", tokens[kind].get("tokenizer_error", "")) for name, tokens in found.items()
                if "ids" in tokens[kind] or differences[f"out: {name}"] != UNKNOWN]  # fmt: skip
        others = [ids for ids in (*read, load_tokenizer(str(folders[kind]))(TEXT)["input_ids"]) if ids != file]
        wrong += [f"{kind}, tokens: {ids}, not {file}" for ids in others]
        generations[origin, kind] = generations.get((origin, kind), {}) | differences | {"tokens": float(len(others))}
    assert not wrong, "\n".join(wrong)
    assert {kind for kind in exports if generations[origin, kind]["out: 4.57"] == UNKNOWN} == (
        set() if origin == "4" else NEW
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_every_adapter_in_peft(family: Callable[..., Path], generations: dict, tmp_path: Path, kind: str) -> None:
    """Random adapters on all linear layers: peft's own reading of them gives the logits of the merged export."""
    folder, found = family(kind, **TYPES[kind]), {}
    settings = dict(lora_rank=4, lora_alpha=16.0, lora_targets="all-linear", lora_dropout=0.1, model_name=str(folder))
    tag = fabricated(tmp_path / "run", folder) / "step_00000001"
    draw = torch.Generator().manual_seed(0)
    layers = targets(ModelFacts.read(str(folder)).meta, "all-linear")
    for name, (inputs, outputs) in layers.items():
        found[f"{name}_lora.A"] = torch.randn(4, inputs, generator=draw) / inputs**0.5
        found[f"{name}_lora.B"] = 0.1 * torch.randn(outputs, 4, generator=draw)
    states = torch.load(tag / "mp_rank_00_model_states.pt")
    buffers = {name: states["module"][name] for name, _ in load_model(str(folder), torch.float32).named_buffers()
               if name in states["module"]}  # fmt: skip
    torch.save(states | {"module": found | buffers}, tag / "mp_rank_00_model_states.pt")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="what it began with"):
        out = export_checkpoint(tmp_path / "run", str(folder), tmp_path / "out")
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        before, merged = base(TOKENS, use_cache=False).logits, logits(out)
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter")(TOKENS, use_cache=False).logits
    assert (merged - before).abs().max() > 0.1
    generations["5", kind] = generations.get(("5", kind), {}) | {"out: peft": (adapted - merged).abs().max().item()}
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_every_rope_is_what_version_4_reads(tmp_path: Path) -> None:
    """Or it is refused, whatever of its fields a config.json has."""
    cases, refused = [{}, dict(rope_scaling=None), dict(rope_theta=5e5), dict(rope_scaling=None, rope_theta=5e5)], set()
    for kind in TYPES.keys() - set(WITHOUT_ROPE):
        for number, fields in enumerate(cases):
            folder = tmp_path / f"{kind}-{number}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(tiny_shape(kind, **TYPES[kind], **fields)))
    folders = sorted(tmp_path.iterdir())
    run(environment(*OLD), "ropes", tmp_path, *folders)
    for folder in folders:
        expected = torch.load(tmp_path / f"{folder.name}.pt")
        try:
            facts = ModelFacts.read(str(folder))
            assert facts.meta
            model = AutoModelForCausalLM.from_config(facts.config)
        except ConfigError:
            refused.add(folder.name)
            continue
        found = {tuple(b.tolist()) for name, b in model.named_buffers() if name.endswith("inv_freq")}
        assert not expected or found == {tuple(one.tolist()) for one in expected}, folder.name
    assert {name for name in refused if name.rpartition("-")[0] not in NEW} == {
        *("apertus-1", "apertus-2", "apertus-3", "cohere-0", "cohere-1", "olmo3-0", "olmo3-1"),
    }
