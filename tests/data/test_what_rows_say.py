"""What rows say beside roles and contents: it reaches the template, or the row is refused, or that is counted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from templates_of import encoded, encoder_of, learn, speaking, tokenizer_of

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chat_tokens import ChatEncoder, read_segments
from tp2d_helpers.data.chats import LOSS, from_json, to_json
from tp2d_helpers.data.tokens import prepare_tokens
from tp2d_helpers.demo import demo_documents, train_tokenizer

TOOL = {"type": "function", "function": {
    "name": "lookup", "description": "Looks a word up.", "parameters": {"type": "object", "properties": {
        "word": {"type": "string", "description": "which"}}}}}  # fmt: skip
RESULT = {"role": "tool", "content": "A."}
EMPTY = "<think>\n\n</think>\n\n"  # Qwen3's, where there is no thought


def user(content: Any = "Who?", **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def answer(content: Any = "Nobody.", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "lookup", "arguments": arguments}, **fields}


def chat(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages) or [user(), answer()], **columns}


def after_user(name: str, row: dict[str, Any]) -> str:
    """What follows the last "Who?", marked."""
    return str(learn(encoder_of(name), row)).rpartition("Who?")[2]


def learnt(name: str, row: dict[str, Any]) -> list[str]:
    """The parts with loss."""
    return [part.partition("⟧")[0] for part in str(learn(encoder_of(name), row)).split("⟦")[1:]]


def refusal(name: str, row: dict[str, Any]) -> str:
    with pytest.raises(BadRow) as raised:
        learn(encoder_of(name), row)
    return f"{raised.value.kind}: {raised.value.reason}"


# Flags.


@pytest.mark.parametrize("flag", LOSS)
@pytest.mark.parametrize("value, parts", [(0, 1), (0.0, 1), (False, 1), (1, 2), (True, 2), (None, 2)])
def test_flags(flag: str, value: Any, parts: int) -> None:
    row = chat(user(), answer(**{flag: value}), user(), answer("Then all."))
    assert learnt("qwen2_5", row) == ["Nobody.<|im_end|>", "Then all.<|im_end|>"][-parts:]


@pytest.mark.parametrize("messages, reason", [
    ([user(), answer(weight="no")], "not_a_chat: message 2: 'weight' must be 0, 1, true or false, and is str ('no')"),
    ([user(), answer(weight=0.5)], "not_a_chat: message 2: 'weight' must be 0, 1, true or false, and is float ('0.5')"),
    ([user(), answer(weight=1, train=False)], "not_a_chat: message 2: train and weight contradict each other"),
    ([user(weight=1), answer()], "not_a_chat: message 1 (user): only an assistant's turn can be learnt"),
    ([user(), answer(weight=0)], "no_answer: no turn of an assistant is to be learnt"),
])  # fmt: skip
def test_flags_that_cannot_be(messages: list[dict[str, Any]], reason: str) -> None:
    assert refusal("qwen2_5", chat(*messages)) == reason


def test_flags_leave_no_trace() -> None:
    assert (
        learn(encoder_of("qwen3"), chat(user(weight=0), answer(train=True))).ids
        == learn(encoder_of("qwen3"), chat()).ids
    )


# Contents.


@pytest.mark.parametrize("content, found", [
    ([{"type": "text", "text": "No"}, {"type": "text", "text": "body."}], EMPTY + "Nobody."),
    (["Nobody."], EMPTY + "Nobody."), ([{"text": "Nobody.", "image": None}], EMPTY + "Nobody."),
    ([{"type": "thinking", "thinking": "Hm."}, {"text": "Nobody."}], "<think>\nHm.\n</think>\n\nNobody."),
    ("", EMPTY), (" \n", EMPTY + " \n"), ("None null [] {}", EMPTY + "None null [] {}"),
    ("<think>Hm.</think>Nobody.", "<think>\nHm.\n</think>\n\nNobody."),
])  # fmt: skip
def test_contents(content: Any, found: str) -> None:
    assert learnt("qwen3", chat(user(), answer(content))) == [found + "<|im_end|>"]


@pytest.mark.parametrize("content, reason", [
    ([{"type": "image", "image": "a.png"}, {"type": "text", "text": "x"}], "has a part of the type str ('image')"),
    ([{"type": "text", "text": None}], "has a part of the type"), ([None], "has a part of the type"),
    ([{"type": "tool_use", "name": "lookup", "input": {}}], "has a part of the type str ('tool_use')"),
    (0, "must be text, and is int ('0')"), (None, "must be text, and is missing"), ({}, "must be text, and is dict"),
])  # fmt: skip
def test_contents_that_are_none(content: Any, reason: str) -> None:
    assert refusal("qwen3", chat(user(), answer(content))).startswith("not_a_chat: message 2 of messages: 'content'")
    assert reason in refusal("qwen3", chat(user(), answer(content)))


@pytest.mark.parametrize("role, name", [
    ("Human", "user"), (" user ", "user"), ("USER", "user"), ("gpt", "assistant"), ("model", "assistant"),
    ("bot", "assistant"), ("chatgpt", "assistant"), ("Assistant", "assistant"), ("System", "system"),
])  # fmt: skip
def test_roles_by_other_names(role: str, name: str) -> None:
    rows = [chat({"role": each, "content": "Hear!"}, user(), answer()) for each in (role, name)]
    turns = [{"from": role, "value": "Hear!"}, {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Nobody."}]
    found = [learn(encoder_of("qwen2_5"), row) for row in [*rows, {"conversations": turns}]]
    assert found[0].ids == found[1].ids == found[2].ids and found[0].mask == found[1].mask == found[2].mask


@pytest.mark.parametrize("role", ["tool", "function", "observation", "tool_response", "function_response"])
def test_results_by_other_names(role: str) -> None:
    """ShareGPT's calls and results."""
    turns = [
        ("human", "Who?"),
        ("function_call", '{"name": "lookup", "arguments": {"word": "w"}}'),
        (role, "A."),
        ("gpt", "B."),
    ]
    row = {"conversations": [{"from": each, "value": value} for each, value in turns], "tools": json.dumps([TOOL])}
    messages = [user(), answer(None, tool_calls=[call({"word": "w"})]), {"role": "tool", "content": "A."}, answer("B.")]
    assert learn(encoder_of("qwen3"), row).ids == learn(encoder_of("qwen3"), chat(*messages, tools=[TOOL])).ids


def test_a_role_that_the_template_does_not_know() -> None:
    row = chat({"role": "critic", "content": "Bad."}, user(), answer())
    assert refusal("qwen3", row) == "not_written: message 1 (critic), content: the chat template leaves it out: 'Bad.'"


# Calls and columns.


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "llama3_1", "glm4moe", "gemma4", "muse_glimmer", "qwen3_8"])
def test_calls_in_every_form(name: str) -> None:
    """OpenAI's old form, flat ones, JSON text, and what arrow makes of them are one call."""
    result, forms = {"role": "tool", "content": "A."}, []
    for calls in (
        {"tool_calls": [call({"word": "w"})]}, {"tool_calls": [call('{"word": "w"}')]},
        {"tool_calls": [{"name": "lookup", "arguments": {"word": "w"}}]},
        {"tool_calls": json.dumps([call({"word": "w"})])},
        {"function_call": {"name": "lookup", "arguments": '{"word": "w"}'}, "tool_calls": []},
        {"tool_calls": [call({"word": "w"}, id=None, index=None)], "function_call": None, "reasoning_content": None},
    ):  # fmt: skip
        for tools in (
            {"tools": [TOOL]},
            {"tools": json.dumps([TOOL])},
            {"functions": [json.dumps(TOOL)], "tools": None},
        ):
            row = chat(user(), answer(None, **calls), result, answer("B."), **tools)
            forms.append(learn(encoder_of(name), row))
    assert all((form.ids, form.mask) == (forms[0].ids, forms[0].mask) for form in forms)
    assert all(part in str(forms[0]) for part in ("lookup", "Looks a word up.", "which"))
    assert "lookup" in learnt(name, row)[0] and "w" in learnt(name, row)[0]


@pytest.mark.parametrize("row, reason", [
    (chat(tools=TOOL), "not_a_chat: tools must be a list, and is dict"),
    (chat(tools="lookup"), "not_a_chat: tools must be a list, and is str ('lookup')"),
    (chat(tools=[{"type": "function"}]), "not_a_chat: tools: a tool must have a name"),
    (chat(chat_template_kwargs=[1]), "not_a_chat: chat_template_kwargs must be an object, and is list"),
    (chat(documents=[{"title": "T", "text": "Text."}]), "not_written: documents: the chat template leaves it out: "),
    (chat({"role": "system", "content": "S"}, user(), answer(), system="T"), "not_a_chat: a column system beside"),
    (chat(user(), answer(None, tool_calls=[call([1])])), "not_a_chat: message 2 of messages: a call's arguments"),
    (chat(user(), answer(None, tool_calls=[{"type": "function"}])), "not_a_chat: message 2 of messages: a call must"),
    (chat(user(), None), "not_a_chat: message 2 of messages must have a role and a content, and is missing"),
    (chat([user(), answer()]), "not_a_chat: message 1 of messages must have a role and a content, and is list"),
])  # fmt: skip
def test_what_is_refused(row: dict[str, Any], reason: str) -> None:
    assert refusal("qwen3", row).startswith(reason)


def test_system_as_a_column() -> None:
    message = {"role": "system", "content": "Be brief."}
    wanted = learn(encoder_of("qwen3"), chat(message, user(), answer()))
    for row in (chat(system="Be brief."), {"prompt": "Who?", "completion": "Nobody.", "system": "Be brief."}):
        found = learn(encoder_of("qwen3"), row)
        assert (found.ids, found.mask) == (wanted.ids, wanted.mask)


@pytest.mark.parametrize("columns", [
    {"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": '{"enable_thinking": false}'},
    {"chat_template_kwargs": {"enable_thinking": False, "x": None}},
])  # fmt: skip
def test_arguments_of_the_template(columns: dict[str, Any]) -> None:
    """A prompt without thinking ends in an empty thought, which is no part of the answer."""
    assert after_user("qwen3", chat(**columns)).endswith(f"assistant\n{EMPTY}⟦Nobody.<|im_end|>⟧\n")
    assert after_user("qwen3", chat()).endswith(f"assistant\n⟦{EMPTY}Nobody.<|im_end|>⟧\n")


def test_columns_that_the_template_does_not_take_are_counted() -> None:
    found = learn(encoder_of("gptoss"), chat(enable_thinking=False, source="x"))
    assert found.notes["columns that the template doesn't take: enable_thinking"] == 1
    assert found.notes["columns that the template doesn't take: source"] == 1


def test_nothing_is_said() -> None:
    """Nulls and empty lists, as tables fill them in, at each depth."""
    nothing = dict(name=None, tool_calls=None, weight=None, reasoning_content=None, function_call=None)
    row = chat(user(**nothing), answer(**nothing), tools=None, functions=None, documents=None, system=None,
               chat_template_kwargs=None, enable_thinking=None)  # fmt: skip
    empty = chat(user(tool_calls=[]), answer(tool_calls=[]), tools=[], documents=[], system="", chat_template_kwargs={})
    for name in ("qwen3", "gptoss", "llama3_2", "glm4moe", "gemma4", "lfm2_2_5"):
        found = [learn(encoder_of(name), each) for each in (chat(), row, empty)]
        assert found[0].ids == found[1].ids == found[2].ids and not any(each.notes for each in found)


def test_calls_with_other_arguments_in_a_table(cache: Path, tmp_path: Path) -> None:
    """What is in a parquet file is what is in the same file as JSON."""
    tokenizer_of("qwen3").save_pretrained(tmp_path / "tokenizer")
    rows = [chat(user(), answer(None, tool_calls=[call({name: "w"})])) for name in ("word", "other")]
    datasets.Dataset.from_list(copy.deepcopy(rows)).to_parquet(tmp_path / "chats.parquet")
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = []
    for name in ("chats.jsonl", "chats.parquet"):
        folder = prepare_tokens(str(tmp_path / "tokenizer"), str(tmp_path / name))
        found.append([read_segments(folder, tokenizer_of("qwen3"), number) for number in (0, 1)])
    assert found[0] == found[1]


@pytest.mark.parametrize("arguments", ["not json", "[1]", '"text"', "{'word': 'w'}"])
def test_arguments_that_are_no_object(arguments: str) -> None:
    """Some templates write any text; what they would teach is no call."""
    for name in ("qwen3", "llama3_1"):
        found = refusal(name, chat(user(), answer(None, tool_calls=[call(arguments)])))
        assert found.startswith("not_a_chat: message 2") and "arguments must be a JSON object" in found


def test_tools_among_the_arguments_of_the_template() -> None:
    inside = learn(encoder_of("qwen3"), chat(chat_template_kwargs={"tools": [TOOL], "enable_thinking": False}))
    assert str(inside) == str(learn(encoder_of("qwen3"), chat(tools=[TOOL], enable_thinking=False)))


def test_a_long_column_that_the_template_takes() -> None:
    assert "column enable_thinking: the template takes it, and it is longer than 1000" in refusal(
        "qwen3", chat(enable_thinking="yes " * 300)
    )


def test_thoughts_of_a_user() -> None:
    """They are a field that no template writes, and not an earlier answer's."""
    notes = (
        encoder_of("qwen3")
        .answers.find(from_json(to_json(chat(user(reasoning_content="Hm."), answer()), "messages", "")["messages"]))
        .notes
    )
    assert notes == {"fields that the template doesn't write: reasoning_content": 1}


def test_an_answer_after_an_answer_where_headers_end_them() -> None:
    """The assistant's own header is not what ends its answer."""
    text = str(learn(encoder_of("glm4moe"), chat(user(), answer("One."), answer("Two."))))
    assert "One.⟧<|assistant|>⟦" in text and text.endswith("Two.<|user|>⟧")


# Templates.


def encoder_by(template: Any, date: str = "2026-11-30") -> ChatEncoder:
    tokenizer = train_tokenizer(demo_documents()[:3])
    source = "".join(template.values()) if isinstance(template, dict) else template
    speaking(tokenizer, source).chat_template = template
    return ChatEncoder(tokenizer, "messages", date=date)


def test_templates_by_name() -> None:
    """The one for tools where there are tools, or the default."""
    body = "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{{ m.content }}<|im_end|>{% endfor %}"
    tools = "{% for t in tools %}{{ t.function.name ~ t.function.description }}{% endfor %}"
    tools += "{% for t in tools %}{% for k, v in t.function.parameters.properties.items() %}{{ k ~ v.description }}"
    named = {"default": "D:" + body, "tool_use": "T:" + tools + "{% endfor %}{% endfor %}" + body}
    encoder = encoder_by(named)
    assert str(learn(encoder, chat())).startswith("D:<|im_start|>user")
    assert str(learn(encoder, chat(tools=[TOOL]))).startswith("T:lookup")
    with pytest.raises(ConfigError, match="several chat templates, none by default; set"):
        encoder_by({"tool_use": body})


def test_a_template_that_writes_the_date() -> None:
    body = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    assert str(learn(encoder_by(body, "2024-02-29"), chat())).startswith("29 Feb 2024<|im_start|>Who?")
    assert "Today Date: 30 Nov 2026" in str(learn(encoder_of("llama3_2"), chat()))


@pytest.mark.parametrize("name, messages, parts", [
    ("glm4moe", [user(), answer(), user(), answer()], ["\n<think></think>\nNobody.<|user|>"] * 2),
    ("glm4moe", [user(), answer("", tool_calls=[call({})]), RESULT, answer("B.")],
     ["\n<think></think>\n<tool_call>lookup\n</tool_call><|observation|>", "\n<think></think>\nB.<|user|>"]),
    ("llama3_1", [user(), answer(None, tool_calls=[call({"word": "w"})]), RESULT, answer("B.")],
     ['{"name": "lookup", "parameters": {"word": "w"}}<|eot_id|>', "B.<|eot_id|>"]),
    ("gptoss", [user(), answer("B.", thinking="Hm.")],
     ["<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>B.<|return|>"]),
    ("gptoss", [user(), answer(), user(), answer()],
     ["<|channel|>final<|message|>Nobody.<|end|>", "<|channel|>final<|message|>Nobody.<|return|>"]),
    ("gemma4", [user(), answer(None, tool_calls=[call({"word": "w"})]), RESULT, answer("B.")],
     ['<|tool_call>call:lookup{word:<|"|>w<|"|>}<tool_call|><|tool_response>', "B.<turn|>"]),
])  # fmt: skip
def test_how_answers_end(name: str, messages: list[dict[str, Any]], parts: list[str]) -> None:
    assert learnt(name, chat(*messages)) == parts


@pytest.mark.parametrize("template", [
    "{{ '<|user|>' + messages[0].content + '<|assistant|>' + messages[1].content + '<|end|>' }}",
    "{{ messages[0].content }}<|assistant|>{{ messages[1]['content'] | trim }}",
])  # fmt: skip
def test_templates_without_a_loop(template: str) -> None:
    encoder = encoder_by(template)
    part = encoded(encoder, chat())
    decode = encoder.text.tokenizer.decode
    text = decode([t for t, has in zip(part.tokens.tolist(), part.mask.tolist(), strict=True) if has])
    assert text == "Nobody." + ("<|end|>" if "<|end|>" in template else encoder.text.tokenizer.eos_token)
    with pytest.raises(BadRow, match=r"message 3 \(user\), content: the chat template leaves it out: 'More'"):
        encoded(encoder, chat(user(), answer(), user("More"), answer("Last")))
