"""The model card of an export."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from grid import ROOT, Run
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from tp2d_helpers.checkpoint.card import hub_id, model_card, shown
from tp2d_helpers.checkpoint.files import write_json
from tp2d_helpers.checkpoint.run_folder import write_manifest
from tp2d_helpers.checkpoint.settings import record_run
from tp2d_helpers.config import Config
from tp2d_helpers.training.metrics import append

Train = Callable[..., Run]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """checkpoint(**settings): of a run of three steps, with two of them done, without weights."""

    def make(**settings: str) -> Path:
        config = Config(storage_path=str(tmp_path), experiment_name="fine", learning_rate=3e-5, **settings)
        folder = config.run_dir / "checkpoint_00000002"
        folder.mkdir(parents=True)
        record_run(config)
        append(config.run_dir / "metrics.jsonl", [dict(step=i, loss=4.0 / i, tokens=1000) for i in (1, 2, 3)])
        where = dict(step=2, epoch=0, epoch_step=2, world_size=4, tp_size=2, dp_size=2, zero_stage=1, precision="bf16")
        write_manifest(folder, 0, {}, **where, metrics={"loss": 2.0, "eval_loss": 1.5})
        return folder

    return make


def test_names_of_the_hub(checkpoint: Callable[..., Path]) -> None:
    card = model_card(checkpoint(dataset_name="Salesforce/wikitext"), "Qwen/Qwen2.5-0.5B")
    assert card.data.to_dict() == dict(
        base_model="Qwen/Qwen2.5-0.5B", datasets=["Salesforce/wikitext"], library_name="transformers",
        pipeline_tag="text-generation",
    )  # fmt: skip
    for part in ("# fine\n", "Trained from Qwen/Qwen2.5-0.5B on Salesforce/wikitext, for 2 optimizer steps (2,000 tok",
                 "| training loss, first step | 4.0000 |", "| training loss, last step | 2.0000 |",
                 "| held-out loss (perplexity) | 1.5000 (4.48) |", "| tensor parallel × data parallel | 2 × 2 |",
                 "| precision | bf16 |", "| learning_rate | 3e-05 |", "| deepspeed | 0."):  # fmt: skip
        assert part in card.content, part


def test_a_split_is_no_part_of_the_datasets_name(checkpoint: Callable[..., Path]) -> None:
    """And prompts, which have line breaks, would break the table."""
    settings = dict(dataset_name="Salesforce/wikitext:validation", sample_prompts="One\nTwo")
    card = model_card(checkpoint(**settings), "Qwen/Qwen2.5-0.5B")
    assert card.data.datasets == ["Salesforce/wikitext"] and "Two" not in card.content


def test_local_names(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """No path of this machine, and no metadata that the hub would look for in vain."""
    folder = checkpoint(dataset_name=f"{tmp_path}/secret/text.jsonl,{tmp_path}/more.jsonl")
    card = model_card(folder, f"{tmp_path}/models/llama")
    assert card.data.to_dict() == dict(library_name="transformers", pipeline_tag="text-generation")
    assert "Trained from llama on text.jsonl,more.jsonl" in card.content
    assert str(tmp_path) not in card.content and "secret" not in card.content
    assert shown("/home/me/.cache/tp2d/qwen2.5-0.5b-py3.11.7-torch2.13.0+cpu") == "qwen2.5-0.5b"
    demo = model_card(folder, "/home/me/.cache/tp2d/demo-py3.11.7-torch2.13.0+cpu").content
    assert "Trained from random weights in the shape 'demo' on" in demo


def test_what_is_missing_is_not_told(tmp_path: Path) -> None:
    """A checkpoint that was taken out of its run."""
    (tmp_path / "checkpoint_00000002").mkdir()
    content = model_card(tmp_path / "checkpoint_00000002", "gpt").content
    assert "Trained from gpt, by tensor parallelism" in content and "##" not in content and "None" not in content
    write_json(tmp_path / "config.json", {"dataset_name": "demo", "data": None})
    assert "Trained from gpt on demo, by" in model_card(tmp_path / "checkpoint_00000002", "gpt").content


def test_card_of_a_run(train: Train) -> None:
    """By the command line, from the files alone; read as the hub reads it."""
    run = train("qwen2-tied", zero_stage=1, tp_size=2, dp_size=1, eval_samples=4)
    config = Config(**run.config)
    record_run(config)
    command = [sys.executable, "-m", "tp2d_helpers.checkpoint.export", str(config.run_dir / "checkpoint_00000020")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    path = Path(done.stdout.splitlines()[-1], "README.md")
    assert path.parent == config.run_dir / "export"
    assert metadata_load(path) == yaml.safe_load(ModelCard.load(path).data.to_yaml())
    assert ModelCard.load(path).data.pipeline_tag == "text-generation"
    text = path.read_text()
    last = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    for part in (f"last step | {last['loss']:.4f} |", f"(perplexity) | {last['eval_loss']:.4f} (", "2 × 1",
                 "20 optimizer", f"learning_rate | {run.config['learning_rate']} |", "| ZeRO stage | 1"):  # fmt: skip
        assert part in text, part
    assert config.storage_path not in text and "/" not in text.split("## Settings")[1].split("##")[0]
    assert "None" not in text and "[" not in text, "no placeholders"


def test_the_base_is_an_id_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may look like an id."""
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [hub_id(name) for name in ("models/llama", str(tmp_path), "demo", "org/llama")] == [None] * 3 + ["org/llama"]
