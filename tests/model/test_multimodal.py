"""Folders whose text model is a part: it alone is loaded, trained and exported, and no weight of it is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from grid import Run, assert_equal_runs
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from tp2d_helpers.cache import build_once, cache_dir
from tp2d_helpers.checkpoint import export_checkpoint
from tp2d_helpers.config import ConfigError, make_config
from tp2d_helpers.demo import demo_documents, train_tokenizer
from tp2d_helpers.model.apart import check_apart
from tp2d_helpers.model.engine import load_model
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.rehearsal import rehearse
from tp2d_helpers.preflight.checks import check_model
from tp2d_helpers.preflight.weights import check_weights

Train = Callable[..., Run]
Change = Callable[[dict[str, Any]], Any]
TEXT = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            head_dim=8, vocab_size=2048, max_position_embeddings=256, pad_token_id=None)  # fmt: skip
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28,
             patch_size=14)  # fmt: skip
QWEN_TOWER = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64)
STATE = dict(layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8, linear_value_head_dim=8,
             linear_num_key_heads=4, linear_num_value_heads=4)  # fmt: skip
MIXED = dict(pad_token_id=0, hidden_size_per_layer_input=0, num_kv_shared_layers=0, global_head_dim=8,
             layer_types=["sliding_attention", "full_attention"])  # fmt: skip
# By model type: the text model's own fields and type, the tower's, the whole model's.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({}, TOWER | dict(model_type="siglip_vision_model"), dict(mm_tokens_per_image=4)),
    "mistral3": (dict(model_type="mistral"), TOWER | dict(model_type="pixtral", head_dim=16),
                 dict(tie_word_embeddings=False)),
    "qwen3_5": (STATE, QWEN_TOWER, dict(tie_word_embeddings=True)),
    "gemma4": (MIXED, TOWER | dict(head_dim=16, num_key_value_heads=2), dict(audio_config=None)),
    "llava": (dict(model_type="llama"), TOWER | dict(model_type="clip_vision_model"), {}),
    "idefics3": (dict(model_type="llama"), TOWER, {}),
    "qwen2_5_vl": ({}, QWEN_TOWER, {}),
}  # fmt: skip
TRAINED = [kind for kind in KINDS if kind != "qwen2_5_vl"]
CLASSES = {"gemma3": "Gemma3ForCausalLM", "mistral3": "MistralForCausalLM", "qwen3_5": "Qwen3_5ForCausalLM",
           "gemma4": "Gemma4ForCausalLM", "llava": "LlamaForCausalLM", "idefics3": "LlamaForCausalLM"}  # fmt: skip
TOKENS = torch.arange(40)[None] * 37 % 2000
LOST = ".layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="session")
def multimodal() -> Callable[[str], Path]:
    """multimodal(kind): the folder of a tiny model of text and images, as its class saves it, with random weights."""

    def build(folder: Path, kind: str) -> None:
        text, tower, more = KINDS[kind]
        tokenizer = train_tokenizer(demo_documents())
        ends = dict(bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
        config = AutoConfig.for_model(kind, text_config=TEXT | ends | text, vision_config=tower, **more)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in [*model.parameters(), *model.buffers()]:  # zeros in a bias and ones in a norm hide faults
                weight += 0.02 * torch.randn(weight.shape) if weight.is_floating_point() else 0
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # as the class of the type has it

    return lambda kind: build_once(cache_dir() / f"whole-{kind}", lambda scratch: build(scratch, kind))


@pytest.fixture
def changed(multimodal: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """changed(kind, weights, config): a copy of a folder, its weights and config.json changed by functions."""

    def copy(kind: str, weights: Change | None = None, config: Change | None = None) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(multimodal(kind), folder)
        if config:
            fields = json.loads((folder / "config.json").read_text())
            config(fields)
            (folder / "config.json").write_text(json.dumps(fields))
        if weights:
            found = load_file(folder / "model.safetensors")
            weights(found)
            save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


def lose(end: str) -> Change:
    """Drops the weight whose name ends so, of the text model."""
    return lambda weights: weights.pop(next(name for name in weights if name.endswith(end)))


@pytest.mark.parametrize("kind", TRAINED)
def test_the_text_model_is_loaded_whole(multimodal: Callable[[str], Path], kind: str) -> None:
    """Bit for bit, as the whole model has it, which has the same logits without images."""
    folder = multimodal(kind)
    facts = ModelFacts.read(str(folder))
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = load_model(str(folder), torch.float32).eval()
    assert type(loaded).__name__ == type(facts.meta).__name__ == CLASSES[kind]
    assert (facts.part_of, facts.config.model_type) == (kind, whole.config.text_config.model_type)
    assert facts.tied == (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == whole.config.tie_word_embeddings
    text = getattr(whole.model, "language_model", None) or whole.model.text_model
    ours, theirs = loaded.model.state_dict(), text.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(loaded.lm_head.weight, whole.lm_head.weight)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, whole(TOKENS).logits)


@pytest.mark.parametrize("kind, unused", [
    ("gemma3", "multi_modal_projector, vision_tower"), ("mistral3", "multi_modal_projector, vision_tower"),
    ("qwen3_5", "visual"), ("gemma4", "embed_vision, vision_tower"), ("idefics3", "connector, vision_model"),
])  # fmt: skip
def test_what_preflight_says(multimodal: Callable[[str], Path], kind: str, unused: str) -> None:
    folder = str(multimodal(kind))
    config = make_config(model_name=folder, tp_size=1, dp_size=1, use_gpu=False, seq_length=64)
    found = check_model(config, ModelFacts.read(folder))[0]
    assert f", the text model of {kind} alone, " in found and found.endswith(f"in 1 file, F32; not used: {unused}")


@pytest.mark.parametrize("kind", TRAINED)
def test_a_lost_weight_of_the_text_model_is_named(changed: Callable[..., Path], kind: str) -> None:
    folder = str(changed(kind, weights=lose(LOST)))
    with pytest.raises(ConfigError, match=f"lacks model{LOST}, which would be drawn at random".replace(".", r"\.")):
        check_weights(folder, ModelFacts.read(folder))


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "llava"])
def test_a_layer_that_the_config_leaves_out(changed: Callable[..., Path], kind: str) -> None:
    def shorten(fields: dict[str, Any]) -> None:
        fields["text_config"]["num_hidden_layers"] = 1
        fields["text_config"].pop("layer_types", None)

    folder = str(changed(kind, config=shorten))
    with pytest.raises(ConfigError, match=r"its config leaves out weights that are in .*: model\.layers\.1\."):
        check_weights(folder, ModelFacts.read(folder))


def test_names_of_todays_classes(changed: Callable[..., Path]) -> None:
    """In memory Gemma 3 has other names than in its published files."""

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights["model." + name.replace("language_model.model.", "language_model.")] = weights.pop(name)

    folder = str(changed("gemma3", weights=rename))
    assert check_weights(folder, ModelFacts.read(folder)) == (
        "weights in 1 file, F32; not used: multi_modal_projector, vision_tower"
    )


def test_what_only_the_whole_config_says(changed: Callable[..., Path]) -> None:
    """As in Gemma 3's published config.json, whose text part has few fields; the part's own word counts first."""

    def fields(config: dict[str, Any]) -> None:
        config.update(eos_token_id=[7, 9], bos_token_id=3, tie_word_embeddings=False, quantization_config={"bits": 4})
        del config["text_config"]["eos_token_id"]

    config = ModelFacts.read(str(changed("gemma3", config=fields))).config
    assert (config.eos_token_id, config.bos_token_id, config.tie_word_embeddings) == ([7, 9], 2047, False)
    assert config.quantization_config == {"bits": 4} and config.pad_token_id is None


def test_a_class_has_its_own_default(changed: Callable[..., Path]) -> None:
    """Mistral Small 3.1's config.json doesn't say that its head is its own; of the whole class it is the embedding."""
    folder = changed("mistral3", config=lambda fields: fields.pop("tie_word_embeddings"))
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings
    assert not ModelFacts.read(str(folder)).tied


@pytest.mark.parametrize("kind", ["mistral3", "gemma3"])
def test_a_head_where_the_config_says_that_the_embedding_is_it(changed: Callable[..., Path], kind: str) -> None:
    def add_head(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in weights if name.endswith("embed_tokens.weight"))
        weights["language_model.lm_head.weight"] = weights[name] + 1

    folder = str(changed(kind, add_head, lambda fields: fields.update(tie_word_embeddings=True)))
    with pytest.raises(ConfigError, match=r"in model\.safetensors they differ: set tie_word_embeddings to false"):
        check_weights(folder, ModelFacts.read(folder))


def test_a_text_model_without_a_class(multimodal: Callable[[str], Path]) -> None:
    """Qwen2.5-VL's text model is built by the whole class alone."""
    with pytest.raises(ConfigError, match="'qwen2_5_vl_text' is not a model that AutoModelForCausalLM builds"):
        rehearse(ModelFacts.read(str(multimodal("qwen2_5_vl"))).config, 1)


# Runs

SHORT = dict(debug_steps=6, warmup_steps=2)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_a_run_equals_one_process(train: Train, multimodal: Callable[[str], Path], kind: str) -> None:
    run = train(multimodal(kind), tp_size=2, dp_size=2, **SHORT)
    assert_equal_runs(run, train(multimodal(kind), **SHORT))
    assert run.sharded and not any(run.sharded.values())


@pytest.mark.parametrize("kind, tp_size, dp_size", [("gemma3", 2, 2), ("mistral3", 2, 2), ("qwen3_5", 1, 1),
                                                      ("gemma4", 1, 1)])  # fmt: skip
def test_the_export_is_the_text_model(
    train: Train, multimodal: Callable[[str], Path], tmp_path: Path, kind: str, tp_size: int, dp_size: int
) -> None:
    """Names are those that the text model's class saves, the weights and logits those that the run ended with."""
    whole = multimodal(kind)
    run = train(whole, tp_size=tp_size, dp_size=dp_size, **SHORT)
    place = Path(run.config["storage_path"], run.config["experiment_name"], "checkpoint_00000006")
    folder = export_checkpoint(place, str(whole), tmp_path / "export")
    trained = load_model(str(whole), torch.float32).eval()
    absent, unknown = trained.load_state_dict(run.weights, strict=False)
    assert not unknown and set(absent) <= dict(trained.named_buffers()).keys()
    trained.save_pretrained(tmp_path / "saved")
    files = [load_file(place / "model.safetensors") for place in (folder, tmp_path / "saved")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    fields = json.loads((folder / "config.json").read_text())
    assert (fields["model_type"], fields["architectures"]) == (trained.config.model_type, [CLASSES[kind]])
    exported, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(exported) is type(trained) and not any(info.values())
    with torch.no_grad():
        assert torch.equal(exported(TOKENS).logits, trained(TOKENS).logits)
    assert f"The text model of {kind} alone was trained" in (folder / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(folder)("a b").input_ids


def test_an_adapter_fits_the_text_model(train: Train, multimodal: Callable[[str], Path], tmp_path: Path) -> None:
    whole = multimodal("gemma3")
    run = train(whole, tp_size=2, dp_size=2, lora_rank=4, **SHORT)
    place = Path(run.config["storage_path"], run.config["experiment_name"], "checkpoint_00000006")
    (place.parent / "config.json").write_text(json.dumps(run.config))
    folder = export_checkpoint(place, str(whole), tmp_path / "export")
    adapted = peft.PeftModel.from_pretrained(load_model(str(whole), torch.float32), folder / "adapter").eval()
    merged, base = (load_model(str(place), torch.float32).eval() for place in (folder, whole))
    with torch.no_grad():
        logits, wanted, before = (model(TOKENS).logits for model in (adapted, merged, base))
    assert (logits - wanted).abs().max() < 1e-5 and (wanted - before).abs().max() > 1e-3
    assert "The adapter fits what `load_model(" in (folder / "README.md").read_text()


def test_documents_are_kept_apart(multimodal: Callable[[str], Path]) -> None:
    assert check_apart(ModelFacts.read(str(multimodal("gemma3"))).config, "fp32", use_gpu=False) == "by a mask"
