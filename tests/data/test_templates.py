"""Chats by the chat templates that trl ships: the text of transformers alone, loss on the answers and nothing else.

Each word of a drawn chat stands in it once, so that its loss can be told. What is refused is left out or refused by the
template, in each form in which transformers can be given it.
"""

from __future__ import annotations

import itertools
import re

import pytest
from drawn_chats import Drawn, chats
from hypothesis import HealthCheck, Phase, given, settings
from table_of_templates import kept_of, outcomes
from templates_of import TEMPLATES, Learnt, encoder_of, learn, plain, stops_of, tokenizer_of

from tp2d_helpers.data.bad_rows import BadRow

EARLIER = "thoughts of earlier answers, which the template leaves out"
DRAWN = dict(deadline=None, derandomize=True, database=None, phases=[Phase.generate],
             suppress_health_check=list(HealthCheck))  # fmt: skip
TAKES_FOR_USER = ("llama3_1", "llama3_2")  # the first message is the user's there if there are tools, whoever wrote it
MAY_GO_ON = ("gemma4", "diffusion_gemma")  # after a call, the assistant's turn goes on
MARKED = [name for name in TEMPLATES if "{% generation" in TEMPLATES[name] or "{%- generation" in TEMPLATES[name]]


@pytest.fixture(scope="module", params=TEMPLATES)
def name(request: pytest.FixtureRequest) -> str:
    """Of a template. All tests of one run one after the other, as it takes a second to compile."""
    return request.param


def tried(name: str, chat: Drawn) -> Learnt | None:
    """What became of a chat; None if it was refused, and had to be."""
    renderings = [found["input_ids"] for found in plain(tokenizer_of(name), chat.row)]
    try:
        found = learn(encoder_of(name), chat.row)
    except BadRow as error:
        assert error.kind in ("refused", "not_written") and "can't be told" not in error.reason, error
        assert re.search(r"message \d+ \(\w+\), [\w' ]+:|tools, .*:|refuses it:", error.reason), error
        if name.startswith(TAKES_FOR_USER) and chat.begins_with_assistant and chat.row.get("tools"):
            return None
        texts = [tokenizer_of(name).decode(ids) for ids in renderings]
        whole = [text for text in texts if all(is_written(chat, text, *word) for word in chat.words)]
        assert not whole, f"refused ({error}), and yet all of it is in {whole[0]!r}"
        return None
    ends = {stop for stop in stops_of(name)} | {tokenizer_of(name).eos_token}
    added = found.ids[:-1] in renderings and found.pieces[-1].decode() in ends
    assert found.ids in renderings or added, f"transformers renders none of this: {found}"
    return found


def is_written(chat: Drawn, text: str, word: str, message: int, kind: str) -> bool:
    """Whether a word is in a text, or may be missing: an earlier thought."""
    last = max(number for number, found in enumerate(chat.messages) if found["role"] == "assistant")
    times = 1 + chat.calls if word == chat.tool else 1
    return text.count(word) >= times or (kind == "thought" and message < last)


def check_loss(name: str, chat: Drawn, found: Learnt) -> None:
    """Loss on all words of the answers, what ends them, and on no other word."""
    for word, message, kind in chat.words:
        has_loss = found.loss_on(word)
        if word == chat.tool:  # stands in calls, too
            called = [number for number in chat.learnt if chat.messages[number].get("tool_calls")]
            assert sum(has_loss) in (len(called), 2 * len(called)), f"{len(called)} calls of {word}: {found}"
            continue
        assert has_loss or (kind == "thought" and found.notes[EARLIER]), f"{word} ({kind}) is missing: {found}"
        assert set(has_loss) <= {message in chat.learnt}, f"{word} ({kind} of message {message}): {found}"
    check_stops(name, chat, found)


def check_stops(name: str, chat: Drawn, found: Learnt) -> None:
    """The token that ends an answer has loss if the answer is learnt, and no other stop token has."""
    text, stops = found.text, [stop.encode() for stop in stops_of(name)]
    words = [(word.encode(), number) for word, number, _ in chat.words if number >= 0]
    places = sorted((m.start(), number) for word, number in words for m in re.finditer(word, text))
    tokens = list(zip(found.begins(), found.pieces, found.mask, strict=True))
    for (place, number), (after, following) in itertools.pairwise([*places, (len(text), -1)]):
        message = chat.messages[number]
        if number == following or message["role"] != "assistant" or place != last_of(places, number):
            continue
        ends = [has for begin, piece, has in tokens if place < begin < after and piece in stops]
        if number in chat.learnt:
            assert ends or (name.startswith(MAY_GO_ON) and "tool_calls" in message), f"what ends {number}: {found}"
        assert ends[:1] in ([], [number in chat.learnt]), f"what ends message {number}: {found}"
        assert not any(ends[1:]), f"more than what ends message {number} has loss: {found}"


def last_of(places: list[tuple[int, int]], number: int) -> int:
    """Where the last word of a message is."""
    return max(place for place, of in places if of == number)


def check_against_marks(name: str, chat: Drawn, found: Learnt) -> None:
    """What transformers says has loss by {% generation %}, up to the stop token and spaces after it."""
    options = dict(return_assistant_tokens_mask=True)
    theirs = next(
        r["assistant_masks"] for r in plain(tokenizer_of(name), chat.row, **options)
        if r["input_ids"] in (found.ids, found.ids[:-1])
    )  # fmt: skip
    for i, (ours, has) in enumerate(zip(found.mask, theirs, strict=False)):
        piece = found.pieces[i].decode(errors="replace")
        if ours and not has and "\ufffd" not in piece:  # of a character in several tokens, transformers marks one
            assert piece in stops_of(name) and theirs[i - 1], f"token {i} ({piece!r}) has no mark: {found}"
        elif has and not ours:
            assert piece.isspace(), f"token {i} ({piece!r}) is marked: {found}"


@settings(max_examples=5, **DRAWN)
@given(chat=chats())
def test_drawn_chats(name: str, chat: Drawn) -> None:
    found = tried(name, chat)
    if found:
        check_loss(name, chat, found)
        answers = {number for number, message in enumerate(chat.messages) if message["role"] == "assistant"}
        if name in MARKED and chat.learnt == answers:
            check_against_marks(name, chat, found)


@pytest.mark.slow
@settings(max_examples=20, **DRAWN)
@given(chat=chats())
def test_many_drawn_chats(name: str, chat: Drawn) -> None:
    found = tried(name, chat)
    if found:
        check_loss(name, chat, found)


@settings(max_examples=3, **DRAWN)
@given(chat=chats())
def test_a_template_and_the_same_with_marks(name: str, chat: Drawn) -> None:
    """Where trl's marked template renders the same, it has loss on the same but for what an answer begins with."""
    if f"{name}_training" not in TEMPLATES:
        return
    found, marked = tried(name, chat), tried(f"{name}_training", chat)
    if found and marked and found.text == marked.text:
        final = (
            len(found.text) if found.pieces[-1].decode() == tokenizer_of(name).eos_token else -1
        )  # Phi-3's is marked
        ends = [[end for _, end in spans(each) if end != final] for each in (found, marked)]
        assert ends[0] == ends[1], f"{found}\n{marked}"


def spans(found: Learnt) -> list[tuple[int, int]]:
    """(begin, end) in bytes of what has loss."""
    runs, place = [], 0
    for has, run in itertools.groupby(zip(found.pieces, found.mask, strict=True), key=lambda pair: pair[1]):
        size = sum(len(piece) for piece, _ in run)
        runs += [(place, place + size)] if has else []
        place += size
    return runs


def test_arguments_as_json_text(name: str) -> None:
    """They are the same call as objects are."""
    rows = []
    for arguments in ({"zqarg": "zqvalue", "n": 3}, '{"zqarg": "zqvalue", "n": 3}'):
        call = {"id": "call00001", "type": "function", "function": {"name": "zqtool", "arguments": arguments}}
        rows.append({"messages": [
            {"role": "user", "content": "zqask"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "zqresult", "name": "zqtool", "tool_call_id": "call00001"},
            {"role": "assistant", "content": "zqanswer"},
        ]})  # fmt: skip
    found = []
    for row in rows:
        try:
            found.append(learn(encoder_of(name), row).ids)
        except BadRow as error:
            found.append((error.kind, error.reason.partition(" call's arguments")[0]))
    assert found[0] == found[1]


def test_the_table_in_the_readme(name: str) -> None:
    assert kept_of(name) == outcomes(name), "python tests/data/table_of_templates.py writes it anew"
