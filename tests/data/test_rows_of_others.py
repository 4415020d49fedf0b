"""Rows as other programs write them, which were once trained on otherwise, or refused without a word of where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from templates_of import encoder_of, learn, speaking
from test_what_rows_say import TOOL, answer, call, chat, learnt, refusal, user

from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chat_tokens import ChatEncoder
from tp2d_helpers.data.chats import from_json, to_json
from tp2d_helpers.data.text import load_text
from tp2d_helpers.demo import demo_documents, train_tokenizer


def by(template: str) -> ChatEncoder:
    tokenizer = train_tokenizer(demo_documents()[:3])
    speaking(tokenizer, template).chat_template = template
    return ChatEncoder(tokenizer, "messages")


def notes(name: str, row: dict[str, Any]) -> dict[str, int]:
    return dict(encoder_of(name).answers.find(from_json(to_json(row, "messages", "")["messages"])).notes)


@pytest.mark.parametrize("result", ["2", "", "lookup", "Who?"])
@pytest.mark.parametrize("name", ["gemma4", "gemma4_v5"])
def test_a_result_that_stands_elsewhere_too(name: str, result: str) -> None:
    """Gemma 4 writes results while it is at the call: they have no loss, whatever their words are."""
    turns = [user("Who? 1+2"), answer("", tool_calls=[call({"word": "w"})]), {"role": "tool", "content": result}]
    parts = learnt(name, chat(*turns, answer("So."), tools=[TOOL]))
    assert parts[0].startswith("<|tool_call>") and not any("tool_response>response" in part for part in parts)


@pytest.mark.parametrize("message", [{"role": "tool", "content": "3"}, {"role": "developer", "content": "3"}])
def test_a_turn_that_the_template_skips(message: dict[str, Any]) -> None:
    """Though its words are in another's turn."""
    encoder = by(
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role + '\n' + m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    if message["role"] == "tool":
        with pytest.raises(BadRow, match=r"message 3 .tool., content: the chat template leaves it out: '3'"):
            learn(encoder, chat(user("How much is 3?"), answer("I ask."), message, answer("It is 3.")))
    else:
        with pytest.raises(BadRow, match=r"message 1 .developer., content"):
            learn(encoder, chat({**message, "content": "Be kind"}, user("Who?"), answer("Nobody.")))


@pytest.mark.parametrize("end, learnt_end", [("{{ eos_token }}", True), ("\n", True), ("###", False)])
def test_what_follows_the_last_message(end: str, learnt_end: bool) -> None:
    """The end-of-text token is learnt where the template writes it, and where nothing stands in its place."""
    encoder = by("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + end)
    text = str(learn(encoder, chat()))
    assert ("<|endoftext|>⟧" in text) == learnt_end and (encoder.ends.token is not None) == learnt_end


@pytest.mark.parametrize("thoughts", [
    dict(reasoning_content=[{"type": "text", "text": "Hm."}]), dict(thought="Hm."),
    dict(reasoning="Hm.", reasoning_content="Hm."), dict(reasoning_details=[{"text": "Hm."}], reasoning="Hm."),
])  # fmt: skip
def test_thoughts_by_any_name(thoughts: dict[str, Any]) -> None:
    assert learnt("qwen3", chat(user(), answer("So.", **thoughts))) == ["<think>\nHm.\n</think>\n\nSo.<|im_end|>"]


@pytest.mark.parametrize("fields, words", [
    (dict(reasoning="One.", reasoning_content="Two."), "are different thoughts"),
    (dict(reasoning_content={"steps": []}), "'reasoning_content' must be text"),
    (dict(train_detail=[{"begin_offset": 0, "end_offset": 3, "train": False}]), "'train_detail' isn't understood"),
    (dict(tool_calls=5), "tool_calls must be a list, and is int"),
])  # fmt: skip
def test_what_is_not_understood(fields: dict[str, Any], words: str) -> None:
    assert words in refusal("qwen3", chat(user(), answer("So.", **fields)))


def test_calls_of_sharegpt_must_be_json() -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": "{'name': 'w'}"}]
    with pytest.raises(BadRow, match="message 2 of conversations: a call must be JSON"):
        to_json({"conversations": turns}, "conversations", "line 1")


@pytest.mark.parametrize("arguments", [r'{"q": "a \u0026 b"}', r'{"u": "https:\/\/x"}', '{"n": 1e3}'])
def test_arguments_that_others_write_as_json(arguments: str) -> None:
    assert arguments in learnt("qwen3", chat(user(), answer(None, tool_calls=[call(arguments)])))[0]


def test_columns_by_the_name_of_a_templates_own_variable() -> None:
    """They are not its arguments."""
    found = notes("qwen3", chat(content="hello", reasoning_content="x " * 600))
    assert set(found) == {
        f"columns that the template doesn't take: {name}" for name in ("content", "reasoning_content")
    }


def test_columns_of_a_csv_file() -> None:
    row = {"messages": json.dumps([user(), answer()]), "enable_thinking": "False"}
    assert str(learn(encoder_of("qwen3"), row)) == str(learn(encoder_of("qwen3"), chat(enable_thinking=False)))


def test_pictures_and_empty_answers() -> None:
    assert "column images: only text is trained on" in refusal("qwen3", chat(images=["a.png"]))
    assert notes("qwen3", chat(user(), answer(""))) == {"answers without a word, which are learnt as a stop token": 1}


def test_a_system_column_that_says_the_same() -> None:
    first = {"role": "system", "content": "Be brief."}
    same = str(learn(encoder_of("qwen3"), chat(first, user(), answer(), system="Be brief.")))
    assert same == str(learn(encoder_of("qwen3"), chat(first, user(), answer())))
    assert "another system message" in refusal("qwen3", chat(first, user(), answer(), system="Be long."))


def test_columns_of_bytes_are_named(tmp_path: Path) -> None:
    """Pictures in a table, which nothing here reads, are not left out without a word."""
    table = pyarrow.table({"messages": [[user("<image>?"), answer()]], "images": [[{"bytes": b"x", "path": "a.png"}]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = load_text(str(tmp_path / "a.parquet"))
    found = encoder_of("qwen3").answers.find(from_json(rows[0]["messages"]))
    assert found.notes == {"columns that the template doesn't take: images (bytes)": 1}
