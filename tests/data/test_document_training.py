"""Training on packed documents is one and the same on every grid, and equals plain PyTorch on each by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import Run, assert_equal_runs, assert_resumes_on_another_grid
from plain import plain_run
from transformers import AutoModelForCausalLM

from tp2d_helpers.data.dataloader import GlobalBatchSampler
from tp2d_helpers.data.dataset import IGNORED, TokenDataset
from tp2d_helpers.data.tokens import prepare_tokens
from tp2d_helpers.speed import documents
from tp2d_helpers.training.samples import read_samples

Train = Callable[..., Run]
GRID = dict(tp_size=2, dp_size=2)
COMMON = dict(packing="documents", eval_samples=4, eval_interval=4, debug_steps=8)


@pytest.fixture(scope="module")
def kinds(chat_model: Path, chats: str, short_documents: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Model and settings: of text, for a model with windows shorter than documents, and of chats."""
    prompts = dict(sample_prompts="loops yield\nnames")
    return {
        "text": ("mistral", dict(dataset_name=short_documents, **prompts, **COMMON)),
        "chats": (chat_model, dict(dataset_name=chats, seq_length=160, **COMMON)),
    }


def _attend(names: dict[str, Any]) -> None:
    """What a GPU does, without its kernel."""
    setup = names["setup_model_with_autotp"]

    def switched(*args: Any) -> Any:
        found = setup(*args)
        found[0].module.set_attn_implementation(documents.NAME)
        return found

    names["setup_model_with_autotp"] = switched


def _without_positions(names: dict[str, Any]) -> None:
    """The mistake: the model is not told where documents begin."""
    step = names["train_step"]
    given = ("input_ids", "labels", "num_items_in_batch")
    names["train_step"] = lambda engine, batches: step(engine, [{n: b[n] for n in given} for b in batches])


def texts(run: Run) -> list[dict[str, Any]]:
    folder = Path(run.config["storage_path"], run.config["experiment_name"])
    return read_samples(folder) if run.config["sample_prompts"] else []


@pytest.mark.parametrize("kind, settings, patch", [
    ("text", dict(tp_size=2), None), ("text", dict(gradient_accumulation_steps=2, **GRID), None),
    ("text", dict(zero_stage=2, gradient_accumulation_steps=2, **GRID), _attend),
    ("text", dict(zero_stage=3, **GRID), None), ("chats", dict(gradient_accumulation_steps=2, **GRID), None),
])  # fmt: skip
def test_grids_are_equal(
    train: Train, kinds: dict[str, Any], kind: str, settings: dict[str, Any], patch: Callable | None
) -> None:
    model, common = kinds[kind]
    run, reference = train(model, patch=patch, **common, **settings), train(model, **common)
    assert_equal_runs(run, reference)
    evaluated = [[record["eval_loss"] for record in r.records if record["eval_loss"]] for r in (run, reference)]
    assert len(evaluated[0]) == 2 and evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
    assert texts(run) == texts(reference)


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_equals_plain_pytorch(train: Train, kinds: dict[str, Any], kind: str) -> None:
    model, common = kinds[kind]
    run = train(model, **common)
    plain = plain_run(run.config)
    assert_equal_runs(run, Run(plain.config, plain.records, plain.weights, {}, {}, {}))


def test_a_model_that_is_not_told_trains_otherwise(train: Train, kinds: dict[str, Any]) -> None:
    model, common = kinds["text"]
    with pytest.raises(AssertionError, match="loss"):
        assert_equal_runs(train(model, patch=_without_positions, **common), train(model, **common))


def test_the_loss_is_that_of_documents_one_by_one(train: Train, chat_model: Path, chats: str) -> None:
    """Of the first step and of what is held out: the mean over their targets, each document without any other."""
    settings = dict(dataset_name=chats, seq_length=160, packing="documents", eval_samples=4, debug_steps=1)
    run = train(chat_model, **settings, learning_rate=1e-12, **GRID)
    data = TokenDataset(prepare_tokens(str(chat_model), chats), 160, "documents", eval_samples=4)
    untrained = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)

    def mean(samples: list[int]) -> float:
        losses, targets = [], 0
        for place in (place for i in samples for place in range(data.bounds[i], data.bounds[i + 1])):
            tokens = slice(data.starts[place], data.starts[place] + data.sizes[place])
            ids = torch.from_numpy(data.tokens[tokens].astype("int64"))
            labels = ids.where(torch.from_numpy(data.mask[tokens] > 0), IGNORED)
            with torch.no_grad():
                losses.append(untrained(ids[None], labels=labels[None], num_items_in_batch=torch.ones(())).loss.item())
            targets += int((labels[1:] != IGNORED).sum())
        assert len(losses) > len(samples)
        return math.fsum(losses) / targets

    first = GlobalBatchSampler(data.samples, 4, 1, 0, 1, run.config["seed"]).global_batch_of(0).flatten().tolist()
    assert run.records[0]["loss"] == pytest.approx(mean(first), rel=1e-5)
    assert run.records[0]["tokens"] == sum(data.lengths[first])
    assert run.records[-1]["eval_loss"] == pytest.approx(mean([*range(data.samples, len(data))]), rel=1e-5)


def test_resumed_in_mid_epoch_on_another_grid(train: Train, kinds: dict[str, Any], tmp_path: Path) -> None:
    """From step 4 of an epoch of 6, where its run of 2 × 2 was cut off: as 1 × 2 with accumulation, the same steps."""
    model, common = kinds["chats"]
    whole = train(model, **{**common, "debug_steps": 6, "checkpoint_interval": 4, "eval_interval": 0}, **GRID)
    assert_resumes_on_another_grid(whole, tmp_path)
