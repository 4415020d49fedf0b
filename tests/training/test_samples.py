"""Texts while a run trains: the same on every grid, and those that the exported model writes; none twice."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grid import Run, run_grid
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.checkpoint.settings import record_run
from tp2d_helpers.config import ConfigError, make_config
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.launch import follow
from tp2d_helpers.preflight.checks import check_resilience
from tp2d_helpers.speed.optimizations import compilers
from tp2d_helpers.training.metrics import append, keep_until
from tp2d_helpers.training.samples import FILE, NEW_TOKENS, encode_prompts, highest, read_samples

SENTENCES = ["The raven is black as coal.", "A lemon tastes sour and fresh.", "Snow falls softly in winter.",
             "Water boils at hundred degrees.", "My brother plays the violin."]  # fmt: skip
PROMPTS = [" ".join(sentence.split()[:2]) for sentence in SENTENCES]  # more than a micro-batch
SAMPLED = dict(eval_samples=4, eval_interval=8, sample_prompts="\n".join(PROMPTS), learning_rate=5e-3, debug_steps=40)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of a number and a sentence, after which they end: what a model learns in seconds."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "sentences.jsonl"
    rows = [f"{number}. {draw.choice(SENTENCES)}" for number in range(1000)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def folder_of(run: Run) -> Path:
    return Path(run.config["storage_path"], run.config["experiment_name"])


@pytest.mark.parametrize("model, tp_size, dp_size, zero_stage", [
    ("qwen2-tied", 2, 1, 1), ("qwen2-tied", 1, 2, 1), ("qwen2-tied", 2, 2, 1), ("qwen2-tied", 1, 2, 3),
    ("qwen2-tied", 2, 2, 3), ("llama", 2, 2, 1), ("llama", 2, 2, 3),
])  # fmt: skip
def test_every_grid_writes_the_same(
    train: Callable[..., Run], text: str, model: str, tp_size: int, dp_size: int, zero_stage: int
) -> None:
    expected = read_samples(folder_of(train(model, dataset_name=text, **SAMPLED)))
    settings = dict(tp_size=tp_size, dp_size=dp_size, zero_stage=zero_stage)
    found = read_samples(folder_of(train(model, **settings, dataset_name=text, **SAMPLED)))
    assert found == expected
    assert [(record["step"], record["prompt"]) for record in found] == [
        (k, p) for k in (8, 16, 24, 32, 40) for p in PROMPTS
    ]
    texts = {record["step"]: [r["text"] for r in found if r["step"] == record["step"]] for record in found}
    assert texts[8] != texts[40] and len({*texts[40]}) > 1  # the prompt and the training matter


@pytest.mark.parametrize("model, tp_size", [("qwen2-tied", 1), ("llama", 2), ("mistral", 2)])
def test_the_exported_model_writes_the_same(
    train: Callable[..., Run], tmp_path: Path, text: str, model: str, tp_size: int
) -> None:
    run = train(model, tp_size=tp_size, dataset_name=text, **SAMPLED)
    folder = export_checkpoint(folder_of(run) / "checkpoint_00000040", run.config["model_name"], tmp_path / "export")
    exported, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(str(folder))
    for record in read_samples(folder_of(run))[-len(PROMPTS) :]:
        ids = tokenizer(record["prompt"], add_special_tokens=False, return_tensors="pt").input_ids
        answer = exported.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
        assert record["text"] == tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


def test_training_is_not_disturbed(train: Callable[..., Run], text: str) -> None:
    """Not even its dropout."""
    settings = dict(eval_samples=4, eval_interval=8, dataset_name=text, tp_size=2, dp_size=2)
    run = train("qwen2-dropout", sample_prompts="A lemon", **settings)
    without = train("qwen2-dropout", **settings)
    assert [r["eval_loss"] for r in run.records] == [r["eval_loss"] for r in without.records]
    assert run.losses() == without.losses()
    assert not (folder_of(without) / FILE).exists()


def _compiled(*_: Any) -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.skipif(not compilers(on_gpu=False), reason="torch.compile needs a C++ compiler on CPUs")
def test_nothing_is_compiled_for_them(text: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Their forward passes have the shape of the evaluation's, however long prompts are."""
    settings = dict(model_name=str(tiny_model("llama")), dataset_name=text, use_gpu=False, tp_size=2, dp_size=1,
                    batch_size_per_gpu=4, seq_length=64, debug_steps=2, eval_samples=4, optimizations="compile",
                    storage_path=str(tmp_path))  # fmt: skip
    runs = [make_config(**settings, eval_interval=1, experiment_name="without"), make_config(
        **settings, experiment_name="with", sample_prompts="A\nA lemon tastes", eval_interval=1)]  # fmt: skip
    without, sampled = (run_grid(run.model_dump(), after=_compiled) for run in runs)
    assert without == sampled and without[0] > 0
    assert read_samples(runs[1].run_dir)


def test_a_resumed_run_writes_none_twice(train: Callable[..., Run], text: str, tmp_path: Path) -> None:
    """From step 4, after a run that was cut off had written the texts of step 6."""
    life = dict(num_epochs=2, debug_steps=6, checkpoint_interval=4, eval_samples=4, eval_interval=3)
    settings = dict(**life, tp_size=2, dp_size=2, dataset_name=text, sample_prompts="A lemon\nSnow falls")
    whole = train("llama", **settings)
    config = make_config(**whole.config)
    shutil.copytree(config.run_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint_*6", "checkpoint_*8",
                                                                                  "checkpoint_*12"))  # fmt: skip
    stale = [record | {"text": "stale"} for record in read_samples(folder_of(whole)) if record["step"] <= 6]
    kept = [record | {"text": "kept"} for record in stale if record["step"] <= 4]
    (tmp_path / "copy" / FILE).unlink()
    append(tmp_path / "copy" / FILE, [*kept, *stale[len(kept) :]])
    run_grid(config.change(storage_path=str(tmp_path), experiment_name="copy").model_dump())
    expected = read_samples(folder_of(whole))
    assert sorted({record["step"] for record in expected}) == [3, 4, 6, 8, 9, 12]
    assert read_samples(tmp_path / "copy") == [*kept, *expected[len(kept) :]]


def _highest_of_ties(engine: Any, tp_group: dist.ProcessGroup, dp_group: dist.ProcessGroup) -> list[int]:
    """Of rows whose highest logit stands on both ranks, on the second one, is NaN, and is in the first place."""
    logits = torch.zeros(4, 2048)
    logits[0, [700, 900, 1500]] = logits[1, [1024, 2047]] = 1.0
    logits[2] = torch.nan
    part = logits.chunk(tp_group.size(), dim=1)[tp_group.rank()]
    return highest(part, engine.module.get_output_embeddings()).tolist()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_of_equal_logits_the_lowest_id(tiny_model: Callable[[str], Path], tmp_path: Path, tp_size: int) -> None:
    config = make_config(model_name=str(tiny_model("llama")), dataset_name="demo", tp_size=tp_size, dp_size=1,
                         seq_length=32, debug_steps=1, use_gpu=False, storage_path=str(tmp_path))  # fmt: skip
    assert run_grid(config.model_dump(), after=_highest_of_ties) == [[700, 1024, 0, 0]] * tp_size


# Prompts.


def settings_for(model: str, **settings: Any) -> dict[str, Any]:
    return make_config(**{"model_name": model, "seq_length": 64, **settings}).model_dump()


def test_prompts_are_lines(tiny_model: Callable[[str], Path]) -> None:
    model = str(tiny_model("llama"))
    tokenizer = load_tokenizer(model)
    found = encode_prompts(settings_for(model, sample_prompts="A loop\n\n  def f\nA loop\n"), chats=False)
    assert {prompt: tokenizer.decode(ids) for prompt, ids in found.items()} == {
        "A loop": "A loop",
        "  def f": "  def f",
    }
    assert encode_prompts(settings_for("no such model", sample_prompts=" \n"), chats=False) == {}


def test_of_chats_a_prompt_is_a_users_turn(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, template = str(tiny_model("llama")), tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ 'Q:' + m.content }}{% endfor %}{% if add_generation_prompt %} A:{% endif %}"
        "{% if 'no' in messages[0].content %}{{ raise_exception('Not so') }}{% endif %}"
    )
    settings = settings_for(model, sample_prompts="A loop", chat_template=str(template))
    assert load_tokenizer(model).decode(encode_prompts(settings, chats=True)["A loop"]) == "Q:A loop A:"
    with pytest.raises(ConfigError, match="sample_prompts: 'no': the chat template refuses it: Not so"):
        encode_prompts(settings | {"sample_prompts": "no"}, chats=True)


def test_prompts_that_do_not_fit(tiny_model: Callable[[str], Path]) -> None:
    settings = settings_for(str(tiny_model("llama")), sample_prompts="A loop\n" + "x " * 60)
    with pytest.raises(ConfigError, match=r"'x x .*' has \d+ tokens; must .* fit in seq_length, which is 64"):
        encode_prompts(settings, chats=False)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"sample_prompts: .* at each evaluation; set eval_samples, say to 16"):
        check_resilience(make_config(sample_prompts="A loop"))
    with pytest.raises(ConfigError, match=r"write one text with line breaks: 'A loop\\ndef'"):
        make_config(sample_prompts=["A loop", "def"])


# What the driver prints.


def test_progress_has_each_text_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(storage_path=str(tmp_path), experiment_name="run", trackers="none")
    record_run(config)
    path, old = config.run_dir / FILE, dict(step=3, prompt="A", text="old")
    append(path, [old])
    with follow(config, 9):
        keep_until(path, 3)  # a restarted run puts another file in its place
        append(path, [dict(step=6, prompt="A", text="b\n c"), dict(step=6, prompt="x" * 50, text="y" * 90)])
        time.sleep(1)
        keep_until(path, 3)
        append(path, [dict(step=6, prompt="A", text="b\n c"), dict(step=9, prompt="A", text="d")])
    printed = [line for line in capsys.readouterr().out.splitlines() if "→" in line]
    assert printed == [r"step 6: A → 'b\n c'", f"step 6: {'x' * 39}… → '{'y' * 79}…'", "step 9: A → 'd'"]
