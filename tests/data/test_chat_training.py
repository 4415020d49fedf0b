"""Training on chats is one and the same on every grid, and equals plain PyTorch; nothing but the answers is learnt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import Run, assert_equal_runs, assert_resumes_on_another_grid
from plain import plain_run
from transformers import AutoModelForCausalLM, GenerationConfig

from tp2d_helpers.checkpoint.files import read_json
from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.checkpoint.run_folder import newest_checkpoint
from tp2d_helpers.data.dataloader import GlobalBatchSampler
from tp2d_helpers.data.dataset import TokenDataset
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.data.tokens import prepare_tokens

GRID = dict(tp_size=2, dp_size=2)
TEMPLATES = Path(__file__).parent / "templates"


@pytest.mark.parametrize("settings", [
    dict(packing=True), dict(packing=False), dict(packing=True, gradient_accumulation_steps=2),
    dict(packing=False, gradient_accumulation_steps=2), dict(packing=False, zero_stage=3),
], ids=["packed", "padded", "packed, accumulated", "padded, accumulated", "padded, ZeRO 3"])  # fmt: skip
def test_grids_are_equal(train: Callable[..., Run], chat_model: Path, chats: str, settings: dict[str, Any]) -> None:
    settings = {"dataset_name": chats, "eval_samples": 6, "num_epochs": 2, "debug_steps": 8, **settings}
    reference = train(chat_model, **{**settings, "zero_stage": 1, "gradient_accumulation_steps": 1})
    run = train(chat_model, **settings, **GRID)
    assert_equal_runs(run, reference)
    plain = plain_run(run.config)
    assert_equal_runs(run, Run(plain.config, plain.records, plain.weights, {}, {}, {}))
    evaluated = [[record["eval_loss"] for record in r.records if record["eval_loss"]] for r in (run, reference)]
    assert len(evaluated[0]) == 2 and evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)


def test_the_loss_is_that_of_the_answers(train: Callable[..., Run], chat_model: Path, chats: str) -> None:
    """Of the first step and of what is held out, by hand: from the tokens that the mask names, stop tokens included."""
    settings = dict(dataset_name=chats, eval_samples=6, debug_steps=1, packing=False, learning_rate=1e-12)
    run = train(chat_model, **settings, **GRID)
    data = TokenDataset(prepare_tokens(str(chat_model), chats), 64, packing=False, eval_samples=6)
    untrained = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    stop = load_tokenizer(str(chat_model)).convert_tokens_to_ids("<|im_end|>")

    def mean(samples: list[int]) -> float:
        """Over all tokens with loss of the samples."""
        losses, stops = [], 0
        for i in samples:
            places = slice(data.starts[i], data.starts[i] + data.lengths[i])
            tokens, mask = torch.from_numpy(data.tokens[places].astype("int64")), data.mask[places]
            with torch.no_grad():
                chances = untrained(tokens[None]).logits[0].log_softmax(-1)
            learnt = [place for place in range(1, len(tokens)) if mask[place]]
            losses += [-chances[place - 1, tokens[place]].item() for place in learnt]
            stops += sum(int(tokens[place] == stop) for place in learnt)
        assert stops and len({len(losses), sum(data.lengths[samples]), len(samples)}) == 3
        return sum(losses) / len(losses)

    first = GlobalBatchSampler(data.samples, 4, 1, 0, 1, run.config["seed"]).global_batch_of(0).flatten().tolist()
    assert run.records[0]["loss"] == pytest.approx(mean(first), rel=1e-5)
    assert run.records[-1]["eval_loss"] == pytest.approx(mean([*range(data.samples, len(data))]), rel=1e-5)


def test_resumed_in_mid_epoch_on_another_grid(
    train: Callable[..., Run], chat_model: Path, chats: str, tmp_path: Path
) -> None:
    """From step 4 of an epoch of 6, where its run of 2 × 2 was cut off: as 1 × 2 with accumulation, the same steps."""
    life = dict(dataset_name=chats, packing=False, eval_samples=6, debug_steps=6, checkpoint_interval=4)
    whole = train(chat_model, **life, **GRID)
    assert_resumes_on_another_grid(whole, tmp_path)


def test_an_export_has_the_template_of_its_run(train: Callable[..., Run], chat_model: Path, chats: str) -> None:
    """Asked in another form than it was trained on, a model would not answer as it learnt to."""
    template = TEMPLATES / "chatml_marked.jinja"
    run = train(chat_model, dataset_name=chats, debug_steps=1, chat_template=str(template))
    folder = Path(run.config["storage_path"], run.config["experiment_name"])
    checkpoint = newest_checkpoint(folder)[0]
    manifest = read_json(checkpoint / "rank_0.json") | {"settings": run.config | {"chats": True}}  # as after preflight
    (checkpoint / "rank_0.json").write_text(json.dumps(manifest))
    exported = export_checkpoint(checkpoint, str(chat_model), folder / "export")
    assert load_tokenizer(str(exported)).chat_template == template.read_text()
    assert load_tokenizer(str(chat_model)).chat_template != template.read_text()
    stop = load_tokenizer(str(exported)).convert_tokens_to_ids("<|im_end|>")
    assert stop in GenerationConfig.from_pretrained(exported).eos_token_id
    assert stop not in {GenerationConfig.from_pretrained(chat_model).eos_token_id}
