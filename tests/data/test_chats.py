"""Chats: every format read alike, loss on the assistant's words and stop tokens and on nothing else, or an error."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import expected
import numpy as np
import pytest

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data import text_tokens
from tp2d_helpers.data.chat_tokens import ChatEncoder, stop_token
from tp2d_helpers.data.chats import Conversation, from_json, to_json
from tp2d_helpers.data.dataset import IGNORED, TokenDataset
from tp2d_helpers.data.text import load_text
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.data.tokens import example_segments, prepare_tokens
from tp2d_helpers.demo import END_OF_TEXT, train_tokenizer

CHATS = Path(__file__).parent / "chats.jsonl"
TEMPLATES = Path(__file__).parent / "templates"
SIX = [json.loads(line)["messages"] for line in CHATS.read_text().splitlines() if line]


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Messages of these contents, of the user and the assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def marked(tokenizer: str, folder: Path) -> list[str]:
    """The examples in a folder of tokens, decoded, with ⟦ ⟧ around what has loss."""
    offsets, found = np.load(folder / "offsets.npy"), []
    tokens, mask = (np.fromfile(folder / name, kind) for name, kind in (("tokens.bin", "u4"), ("mask.bin", "u1")))
    assert len(tokens) == len(mask) == offsets[-1]
    for begin, end in itertools.pairwise(offsets):
        edges = np.flatnonzero(np.diff(mask[begin:end], prepend=0, append=0)) + begin
        pieces = np.split(tokens[begin:end], edges - begin)
        texts = [load_tokenizer(tokenizer).decode(piece) for piece in pieces]
        found.append("".join(text + "⟦⟧"[i % 2] * (i < len(edges)) for i, text in enumerate(texts)))
    return found


def assert_tokens(tokenizer: str, folder: Path, texts: list[str]) -> None:
    """Every token and whether it has loss: a token does if its characters are within ⟦ ⟧."""
    offsets = np.load(folder / "offsets.npy")
    tokens, mask = (np.fromfile(folder / name, kind) for name, kind in (("tokens.bin", "u4"), ("mask.bin", "u1")))
    assert len(offsets) == len(texts) + 1
    for begin, end, text in zip(offsets, offsets[1:], texts, strict=False):
        inside, depth = [], 0
        for character in text:
            depth += {"⟦": 1, "⟧": -1}.get(character, 0)
            inside += [depth] * (character not in "⟦⟧")
        whole = load_tokenizer(tokenizer)(re.sub("[⟦⟧]", "", text), return_offsets_mapping=True)
        assert tokens[begin:end].tolist() == whole["input_ids"]
        assert mask[begin:end].tolist() == [inside[start] for start, _ in whole["offset_mapping"]]


# What has loss.


@pytest.mark.parametrize("template, texts", [
    ("chatml", expected.CHATML), ("chatml_marked", expected.CHATML), ("llama3", expected.LLAMA3),
    ("gemma", expected.GEMMA),
])  # fmt: skip
def test_every_token(cache: Path, speaker: Callable, tmp_path: Path, template: str, texts: list[str]) -> None:
    tokenizer = speaker(template)
    path = lines(tmp_path / "chats.jsonl", *({"messages": messages} for messages in SIX[: len(texts)]))
    folder = prepare_tokens(tokenizer, path)
    assert_tokens(tokenizer, folder, texts)
    assert marked(tokenizer, folder) == texts


def test_many_chats_or_few_at_a_time(cache: Path, speaker: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens. The tokenizer is never given much more than `CHARACTERS` at once."""
    given, limit, tokenizer = [], 300, load_tokenizer(speaker("chatml"))
    call = type(tokenizer).__call__

    def counting(self: Any, text: Any, **options: Any) -> Any:
        given.append(sum(map(len, text)))
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    whole = prepare_tokens(speaker("chatml"), str(CHATS))
    assert given.pop() > 800 and max(given) < 200  # what went before are small texts by which the template is tried
    given.clear()
    identity = TokenDataset(whole, 16).identity
    shutil.rmtree(cache)
    monkeypatch.setattr(text_tokens, "CHARACTERS", limit)
    parts = prepare_tokens(speaker("chatml"), str(CHATS))
    longest = max(len(re.sub("[⟦⟧]", "", text)) for text in expected.CHATML)
    assert len(given) > 6 and max(given) <= limit + longest
    assert TokenDataset(parts, 16).identity == identity


def test_a_role_that_the_template_refuses(cache: Path, speaker: Callable) -> None:
    with pytest.raises(ConfigError, match=f"line 7 of {CHATS}: the chat template refuses it: System role not support"):
        prepare_tokens(speaker("gemma"), str(CHATS))


def test_loss_on_all(cache: Path, speaker: Callable) -> None:
    tokenizer = speaker("chatml")
    folders = [prepare_tokens(tokenizer, str(CHATS), loss_on=loss_on) for loss_on in ("assistant", "all")]
    assert marked(tokenizer, folders[1]) == [f"⟦{re.sub('[⟦⟧]', '', text)}⟧" for text in expected.CHATML]
    identities = [TokenDataset(folder, 16).identity for folder in folders]
    assert identities[0].pop("sha256") != identities[1].pop("sha256") and identities[0] == identities[1]


@pytest.mark.parametrize("marks", [
    "{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>",  # the stop token is left out
    "{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}",  # and more is marked than that
], ids=["too little", "too much"])  # fmt: skip
def test_marks_that_miss_the_stop_token(cache: Path, speaker: Callable, tmp_path: Path, marks: str) -> None:
    tokenizer, template = speaker("chatml"), tmp_path / "own.jinja"
    template.write_text(
        "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        + marks
        + "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    path = lines(tmp_path / "chats.jsonl", {"messages": turns("Hello", "Good day", "And now?", "Bye")})
    found = marked(tokenizer, prepare_tokens(tokenizer, path, chat_template=str(template)))
    assert "⟦Good day<|im_end|>⟧" in found[0] and "⟦Bye<|im_end|>⟧" in found[0] and found[0].count("⟦") == 2


@pytest.mark.parametrize("answer", ["ok", "日本", "café", "fine 🎉"])
def test_marks_and_characters_of_several_tokens(answer: str) -> None:
    """An answer's last character is of several tokens, and its stop token is left out of the marks: all have loss."""
    fast = train_tokenizer([])
    fast.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    encoder = ChatEncoder(fast, "messages")
    found = encoder.answers.find(Conversation(turns("hi", answer)))
    places = next(encoder.text.places([found.text]))
    mask, added = encoder.ends.mask(places, found.spans)
    assert places.ids[mask].tolist() == fast(answer)["input_ids"] + [fast.eos_token_id] and not added
    assert (encoder.ends.how, encoder.ends.token) == ("template", fast.eos_token_id)


def test_a_template_of_ones_own(cache: Path, speaker: Callable, tmp_path: Path) -> None:
    """One without control tokens: the tokenizer's ends the last turn. A change of the file is a change of the data."""
    tokenizer, template = speaker(), tmp_path / "own.jinja"
    path = lines(tmp_path / "pairs.jsonl", {"prompt": "1 + 1 =", "completion": " 2\n"})
    template.write_text("{{ messages | map(attribute='content') | join }}")
    ended = f"1 + 1 =⟦ 2\n{END_OF_TEXT}⟧"
    assert marked(tokenizer, prepare_tokens(tokenizer, path, chat_template=str(template))) == [ended]
    template.write_text("Sum: {{ messages | map(attribute='content') | join }}{{ eos_token if messages[1:] }}")
    ended = f"Sum: 1 + 1 =⟦ 2\n{END_OF_TEXT}⟧"
    assert marked(tokenizer, prepare_tokens(tokenizer, path, chat_template=str(template))) == [ended]


def test_a_template_that_rewrites_earlier_turns(cache: Path, speaker: Callable, tmp_path: Path) -> None:
    """As those do that leave thoughts out of all answers but the last."""
    template, path = tmp_path / "thinks.jinja", tmp_path / "chats.jsonl"
    template.write_text(
        "{% for m in messages %}{{ m.role + ':\n' + (m.content if loop.last else m.content.split('/')[-1])"
        " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    lines(path, {"messages": turns("a", "b", "c", "d")}, {"messages": turns("a", "x/b", "c", "d")})
    # The first is written as it is; in the second, "x" is gone as "c" follows.
    with pytest.raises(
        ConfigError, match=rf"line 2 of {path}: message 2 \(assistant\), content: .* leaves it out: 'x/b'"
    ):
        prepare_tokens(speaker(), str(path), chat_template=str(template))


# Formats.


def test_formats_are_read_alike(cache: Path, speaker: Callable, tmp_path: Path) -> None:
    chats = [*SIX, turns("One", "prompt", "two", "completion")]
    names = {"user": "human", "assistant": "gpt"}
    forms = {
        "messages": [{"messages": chat, "text_id": 1} for chat in chats],
        "conversations": [
            {"conversations": [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in chat]}
            for chat in chats
        ],
        "parts": [
            {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]} for chat in chats
        ],
    }
    tokenizer, whole = speaker("chatml"), []
    for form, rows in forms.items():
        for name in ("chats.jsonl", "chats.json", "chats.parquet"):
            path = tmp_path / form / name
            path.parent.mkdir(exist_ok=True)
            if name == "chats.parquet":
                datasets.Dataset.from_list(rows).to_parquet(path)
            else:
                path.write_text("\n".join(map(json.dumps, rows)) if name == "chats.jsonl" else json.dumps(rows))
            whole.append(prepare_tokens(tokenizer, str(path)))
    assert [marked(tokenizer, folder)[:6] for folder in whole] == [expected.CHATML] * len(whole)
    assert len({TokenDataset(folder, 16).identity["sha256"] for folder in whole}) == 1


def test_pairs(cache: Path, speaker: Callable, tmp_path: Path) -> None:
    """Only the completion is learnt, also where the prompt has answers in it."""
    path = lines(
        tmp_path / "pairs.jsonl",
        {"prompt": "Name a loop.", "completion": "for"},
        {"prompt": turns("One", "Two", "Three"), "completion": turns("Four", first="assistant")},
        {"prompt": turns("One", "Two"), "completion": turns("Three")},  # which is left out
    )
    for template in ("chatml", "chatml_marked"):
        tokenizer = speaker(template)
        assert marked(tokenizer, prepare_tokens(tokenizer, path, leave_out_rows="no_answer")) == [
            expected.CHATML[0],
            "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\nTwo<|im_end|>\n"
            "<|im_start|>user\nThree<|im_end|>\n<|im_start|>assistant\n⟦Four<|im_end|>⟧\n",
        ]


def test_what_else_messages_have() -> None:
    """Templates ask for it. What a table writes for "there is none" is left out."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    row = {"messages": [{"role": "user", "content": "f?", "name": None}, {"role": "assistant", "tool_calls": calls}]}
    assert from_json(to_json(row, "messages", "row 1")["messages"]).messages == [
        {"role": "user", "content": "f?"}, {"role": "assistant", "content": None, "tool_calls": calls}
    ]  # fmt: skip


def test_a_dataset_of_the_hub(cache: Path, speaker: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"messages": chat, "source": "x"} for chat in SIX])
    monkeypatch.setattr("tp2d_helpers.data.text._load_from_hub", lambda *_: rows)
    tokenizer = speaker("chatml")
    assert marked(tokenizer, prepare_tokens(tokenizer, "org/chats")) == expected.CHATML
    broken = datasets.Dataset.from_list([{"messages": SIX[0]}, {"messages": None}])
    monkeypatch.setattr("tp2d_helpers.data.text._load_from_hub", lambda *_: broken)
    with pytest.raises(ConfigError, match="row 2 of org/broken: messages must be a list of messages, and is missing"):
        prepare_tokens(tokenizer, "org/broken")


def test_text_comes_first(tmp_path: Path) -> None:
    """Where there are both, unless `text_column` names the chats."""
    path = lines(tmp_path / "both.jsonl", {"text": "a", "messages": SIX[0], "prompt": "b", "completion": "c"})
    assert load_text(path)["text"] == ["a"]
    assert load_text(path, text_column="messages").column_names == ["messages", "where", "bad"]
    text = lines(tmp_path / "text.jsonl", {"messages": "text by the name of messages"})
    assert load_text(text, text_column="messages")["messages"] == ["text by the name of messages"]


# Samples.


def test_padded_samples(cache: Path, speaker: Callable, tmp_path: Path) -> None:
    """Cut at `seq_length`; those without a target before that are left out and counted."""
    tokenizer = speaker("chatml")
    rows = [turns("Hi", "Hello there"), turns("x " * 40, "y"), turns("x", "y " * 40), turns("no answer")]
    path = lines(tmp_path / "c.jsonl", *({"messages": chat} for chat in rows))
    folder = prepare_tokens(tokenizer, path, leave_out_rows="no_answer")
    data, offsets = TokenDataset(folder, 32, packing=False), np.load(folder / "offsets.npy")
    assert (data.meta["rows"], data.meta["documents"], len(data), data.too_long, data.left_out) == (4, 3, 2, 2, 1)
    mask = np.fromfile(folder / "mask.bin", dtype=np.uint8)
    for i, document in enumerate((0, 2)):
        begin, end = offsets[document], min(offsets[document + 1], offsets[document] + 32)
        ids, labels = data[i]["input_ids"], data[i]["labels"]
        wanted = [int(t) if m else IGNORED for t, m in zip(data.tokens[begin:end], mask[begin:end], strict=True)]
        assert labels.tolist() == wanted + [IGNORED] * (32 - len(wanted))
        assert ids[: end - begin].tolist() == data.tokens[begin:end].tolist()
        assert data.targets[i] == (labels[1:] != IGNORED).sum() > 0 and data.lengths[i] == end - begin
    assert data.targets[1] > 10  # cut in its answer


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seq_length", [2, 7, 16, 64])
def test_targets_are_those_of_the_labels(cache: Path, speaker: Callable, packing: bool, seq_length: int) -> None:
    folder = prepare_tokens(speaker("chatml"), str(CHATS))
    data, tokens = TokenDataset(folder, seq_length, packing), len(np.memmap(folder / "tokens.bin", dtype=np.uint32))
    counted = [int((data[i]["labels"][1:] != IGNORED).sum()) for i in range(len(data))]
    assert counted == data.targets.tolist() and all(counted)
    assert not packing or len(data) < tokens // seq_length or seq_length > 16  # blocks without targets are left out


def test_held_out_chats(cache: Path, speaker: Callable, tmp_path: Path) -> None:
    rows = [turns(f"Question {i}", f"Answer {i}") for i in range(9)]
    folder = prepare_tokens(
        speaker("chatml"), lines(tmp_path / "c.jsonl", *({"messages": c} for c in [*rows, rows[1]]))
    )
    for packing in (True, False):
        data = TokenDataset(folder, 32, packing, eval_samples=2)
        labels = [data[i]["labels"] for i in range(data.samples, len(data))]
        text = load_tokenizer(speaker("chatml")).decode([int(t) for label in labels for t in label if t != IGNORED])
        assert "Answer 7" in text and "Answer 1" not in text  # the last row is a copy
    rows[8] = turns("a long question " * 40, "and a short answer")
    folder = prepare_tokens(speaker("chatml"), lines(tmp_path / "c.jsonl", *({"messages": chat} for chat in rows)))
    with pytest.raises(ConfigError, match="eval_samples = 2: no answer begins in the held-out samples; take more"):
        TokenDataset(folder, 16, eval_samples=2)


def test_an_example_to_look_at(cache: Path, speaker: Callable) -> None:
    settings = dict(model_name=speaker("chatml"), dataset_name=str(CHATS), dataset_config="", text_column="text",
                    text_files="document", dataset_percentage=100.0, trust_remote_code=False, chat_template="",
                    chat_date="auto", loss_on="assistant", leave_out_rows="")  # fmt: skip
    found = example_segments(settings, 2)
    assert "".join(f"⟦{text}⟧" if has_loss else text for text, has_loss in found) == expected.CHATML[2]
    assert example_segments({**settings, "dataset_name": "demo"})[0][1] is True


# Errors.


@pytest.mark.parametrize("row, message", [
    ('{"messages": [', "line 4 of .*c.jsonl: .* is no JSON object, as each line must be: Expecting value at char"),
    ({"messages": "Hello"}, "line 4 of .*c.jsonl: messages must be a list of messages, and is str .'Hello'"),
    ({"messages": []}, "line 4 of .*c.jsonl: messages must be a list of messages, and is empty"),
    ({"text": "Hello"}, "line 4 of .*c.jsonl: messages must be a list of messages, and is missing"),
    ({"messages": ["Hello"]}, "message 1 of messages must have a role and a content, and is str"),
    ({"messages": [{"content": "Hello"}]}, "message 1 of messages: 'role' must be text, and is missing"),
    ({"messages": [*turns("a"), {"role": "assistant"}]}, "message 2 of messages: 'content' must be text, and is miss"),
    ({"messages": [{"from": "gpt", "value": 5}]}, "message 1 of messages: 'value' must be text, and is int"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part of the type .*image"),
])  # fmt: skip
def test_broken_row(cache: Path, speaker: Callable, tmp_path: Path, row: Any, message: str) -> None:
    path = lines(tmp_path / "c.jsonl", {"messages": SIX[0]}, "", {"messages": SIX[1]}, row)
    with pytest.raises(ConfigError, match=message):
        prepare_tokens(speaker("chatml"), path)


def test_no_answers(cache: Path, speaker: Callable, tmp_path: Path) -> None:
    path = lines(tmp_path / "c.jsonl", *[{"messages": turns("Is anyone there?")}] * 3)
    with pytest.raises(ConfigError, match=r"3 of 3 rows .* no_answer .*: 3, line 1 of"):
        prepare_tokens(speaker("chatml"), path)
    with pytest.raises(ConfigError, match="leave_out_rows = 'no_answer': none of the 3 rows is left"):
        prepare_tokens(speaker("chatml"), path, leave_out_rows="no_answer")


def test_no_template(cache: Path, speaker: Callable, tmp_path: Path) -> None:
    tokenizer = speaker()
    with pytest.raises(ConfigError, match=f"'{tokenizer}': its tokenizer has no chat template.*Set chat_template to"):
        prepare_tokens(tokenizer, str(CHATS))
    with pytest.raises(
        ConfigError, match=r"chat_template = 'none.jinja': must be a .jinja file, or .*FileNotFoundError"
    ):
        prepare_tokens(tokenizer, str(CHATS), chat_template="none.jinja")
    for broken, message in (
        ("{% for %}", "the tokenizer's chat template can't be used"),
        ("{{ no.such.name }}", f"line 1 of {CHATS}: .*is undefined"),
    ):
        (tmp_path / "own.jinja").write_text(broken)
        with pytest.raises(ConfigError, match=message):
            prepare_tokens(tokenizer, str(CHATS), chat_template=str(tmp_path / "own.jinja"))


def test_other_columns(cache: Path, tokenizer: str, tmp_path: Path) -> None:
    shutil.copy(CHATS, tmp_path / "a.jsonl")
    lines(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(
        ConfigError, match=r"b.jsonl lacks the columns of chats that files before it have \(messages\); it has"
    ):
        prepare_tokens(tokenizer, str(tmp_path))


@pytest.mark.parametrize("template", ["chatml", "chatml_marked", "llama3", "gemma"])
def test_the_token_that_ends_a_turn(speaker: Callable[..., str], template: str) -> None:
    """The template's own; none without a template."""
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
    tokenizer = load_tokenizer(speaker(template))
    assert tokenizer.convert_ids_to_tokens(stop_token(tokenizer)) == ends[template.partition("_")[0]]
    assert stop_token(load_tokenizer(speaker())) is None
