"""Preflight says what is in chats, what of it has loss, and what becomes of examples that are too long."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.preflight import data, plan
from tp2d_helpers.preflight.data import check_data

CHATS = Path(__file__).parent.parent / "data" / "chats.jsonl"
# Without control tokens, so that the demo's tokenizer can write it: "Q:" and "A:" lines.
TEMPLATE = (
    "{% for m in messages %}{{ ('A:' if m.role == 'assistant' else 'Q:') + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


@pytest.fixture
def run(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """run(**settings): the config of a run on `CHATS` and a chat without an answer, in a cache of its own."""
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    shutil.copy(CHATS, tmp_path / "chats.jsonl")
    with open(tmp_path / "chats.jsonl", "a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "Anyone?"}]}) + "\n")
    settings = dict(model_name=str(tiny_model("llama")), dataset_name=str(tmp_path / "chats.jsonl"), use_gpu=False,
                    tp_size=1, dp_size=1, seq_length=32, chat_template=str(tmp_path / "own.jinja"),
                    leave_out_rows="no_answer")  # fmt: skip
    return lambda **more: make_config(**{**settings, **more})


def checked(config: Config) -> tuple[str, str]:
    _, _, found, chosen = check_data(config, ModelFacts.read(config.model_name))
    return found.partition("files used 1 of 1, ")[2], chosen


def test_what_is_said(run: Callable[..., Config]) -> None:
    found, chosen = checked(run(packing=False))
    assert found.startswith("messages: 6 examples, 21 turns, ") and "of the tokens with loss" in found
    assert "longer than 32 tokens: 3, " in found
    assert found.endswith("6 padded samples of 32")
    assert chosen == (
        "6 steps per epoch, 1 samples each; loss on the assistant's turns, which end in '<|endoftext|>' (added to the "
        "last, as the chat template ends it by no token): 'for\\n<|endoftext|>'; longer examples are cut there; "
        f"left out as no_answer: 1 (line 8 of {run().dataset_name}: no turn of an assistant is to be learnt); "
        "answers without a word, which are learnt as a stop token (1)"
    )
    _, chosen = checked(run(packing=False, seq_length=13))
    assert chosen.count("; longer examples are cut there (3 left out, as no answer begins before); left out")
    _, chosen = checked(run(packing=True))
    assert "; longer examples go on in the next sample; left out" in chosen
    found, chosen = checked(run(packing=False, loss_on="all", seq_length=256))
    assert "100.0% of the tokens with loss" in found and "; loss on all tokens, of all turns; answers without" in chosen
    assert "longer" not in found and "7 examples" in found  # a question, too, has something to learn


def test_packed_whole(run: Callable[..., Config]) -> None:
    """By default; what is lost of chats that are longer than a sample is said."""
    for packing in ("auto", "documents"):
        found, chosen = checked(run(packing=packing, seq_length=40))
        assert re.search(r", 5 packed samples of 40$", found)
        assert re.search(
            r"^5 steps per epoch, 1 samples each; whole documents packed( \(auto\))?, kept apart by a mask, "
            r"\d+\.\d% padding; "
            r"\d+\.\d% of the tokens lost, as \d documents are longer than 40 \(packing = True keeps them\); loss on",
            chosen,
        ), chosen
        assert ("(auto)" in chosen) == (packing == "auto")


def test_packed_across_where_they_cannot_be_kept_apart(
    run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "auto" takes what the model can; a setting of the user's is not changed, but refused."""

    def refuse(*_: Any) -> str:
        raise ConfigError("packing = 'documents': 'mamba' can't keep the documents of a sample apart (so). Take …")

    monkeypatch.setattr(data, "check_apart", refuse)
    config = run()
    _, samples, found, chosen = data.check_data(config, ModelFacts.read(config.model_name))
    assert samples.packing is True and "packed samples of 32" in found
    assert "; packing = True, as documents can't be kept apart (so); loss on" in chosen
    with pytest.raises(ConfigError, match="'mamba' can't keep"):
        checked(run(packing="documents"))


def test_without_a_template(run: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"its tokenizer has no chat template.*\(messages\) need. Set chat_template"):
        checked(run(chat_template=""))


def test_the_template_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers have another working directory."""
    monkeypatch.chdir(tmp_path)
    config, _ = plan.settle(make_config(chat_template="own.jinja", model_name="a", dataset_name="b"), {"CPU": 4.0})
    assert config.chat_template == str(tmp_path / "own.jinja")
    assert plan.settle(make_config(model_name="a", dataset_name="b"), {"CPU": 4.0})[0].chat_template == ""


def test_text_beside_chats(run: Callable[..., Config], tmp_path: Path) -> None:
    """What is taken of rows with both is said."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps({"text": "some text " * 40, "messages": chat}) + "\n")
    _, _, found, chosen = check_data(run(dataset_name=str(path)), ModelFacts.read(run().model_name))
    assert "the text in 'text' is taken, not the chats in 'messages' beside it" in found
    assert "documents end in '<|endoftext|>'" in chosen
