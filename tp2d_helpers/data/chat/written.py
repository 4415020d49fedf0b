"""Is all that a row says in what the template wrote?

Each value is looked for in the part of the text that belongs to its message, and what is found is taken out of it, so
that one word doesn't stand for two. What may be missing by the template's own design is counted: thoughts of earlier
answers, and fields that only link a call with its result.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chat.marks import NOWHERE, Rendered
from tp2d_helpers.data.chat.template import ChatTemplate
from tp2d_helpers.data.chats import THOUGHTS, Conversation

CLOSED = re.compile(r"</think>|\[/THINK\]|</thought>|<\|END_THINKING\|>|</seed:think>|<channel\|>")
OPENED = re.compile(r"<think>|\[THINK\]|<thought>|<\|START_THINKING\|>|<seed:think>|<\|channel>thought")
SYSTEM = ("system", "developer")
TEXT_ARGUMENTS = "a call's arguments as JSON text"
EMPTY = "answers without a word, which are learnt as a stop token"
EARLIER = "thoughts of earlier answers, which the template leaves out"


def check_written(
    conversation: Conversation, messages: list[dict[str, Any]], found: Rendered, template: ChatTemplate
) -> Counter:
    """What isn't in the text although the row says it, as a count for each kind.

    Args:
        messages: the conversation's, as the template was given them.

    Raises:
        BadRow: if something is missing that is to be learnt, or that an answer is an answer to.
    """
    notes, last = Counter(), max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    texts = _texts(found)
    nowhere, owns = _Rest(texts[NOWHERE]), [_Rest(texts[number]) for number in range(len(messages))]
    # Before the messages, as a result's name, which many templates leave out, would be taken for that of its tool.
    others = _Rest("\0".join(text for n, text in texts.items() if n < 0 or messages[n]["role"] != "assistant"))
    for field, value in [*_tools(conversation.tools), *(("documents", v) for v in _leaves(conversation.documents))]:
        if not others.has(value):
            raise BadRow("not_written", f"{field}: the chat template leaves it out: {_short(value)}")
    # System prompts last: templates write them before all messages, or into a user's.
    order = sorted(range(len(messages)), key=lambda number: messages[number]["role"] in SYSTEM)
    users = [own for own, message in zip(owns, messages, strict=True) if message["role"] == "user"]
    for number in order:
        message, role = messages[number], messages[number]["role"]
        rests = [owns[number], *[nowhere] * (role not in ("assistant", "tool")), *(users if role in SYSTEM else ())]
        for field, value in _said(message):
            if any(rest.take(value) for rest in rests):
                continue
            if field == TEXT_ARGUMENTS and all(owns[number].take(leaf) for leaf in _leaves(_object(value))):
                continue  # as other JSON
            name = f"message {number + 1} ({role}), {field}"
            if field == "thought" and number < last and _takes_thoughts(message, template):
                notes[EARLIER] += 1
            elif field.startswith("field "):
                notes[f"fields that the template doesn't write: {field[6:]}"] += 1
            else:
                raise BadRow("not_written", f"{name}: the chat template leaves it out: {_short(value)}")
        if role == "assistant" and not any(value for field, value in _said(message) if not field.startswith("field ")):
            notes[EMPTY] += 1
    return notes


def _texts(found: Rendered) -> dict[int, str]:
    """For each message, its pieces of the text, a NUL between them; under `NOWHERE` what is of none."""
    texts, covered = defaultdict(list), 0
    for begin, end, number in found.pieces:
        texts[NOWHERE].append(found.text[covered:begin])
        texts[number].append(found.text[begin:end])
        covered = end
    return defaultdict(str, {number: "\0".join(pieces) for number, pieces in texts.items()})


class _Rest:
    """A text, of which what was found is taken out."""

    def __init__(self, text: str) -> None:
        self.text = text

    def has(self, value: Any) -> bool:
        """Whether a value is in it, in one of the forms that templates write."""
        return any(form in self.text for form in _forms(value))

    def take(self, value: Any) -> bool:
        """The same; once."""
        for form in _forms(value):
            if (place := self.text.find(form)) >= 0:
                self.text = f"{self.text[:place]}\0{self.text[place + len(form) :]}"
                return True
        return False


def _forms(value: Any) -> Iterator[str]:
    """How a template may have written a value: as it is, trimmed, as JSON, as Python."""
    if not isinstance(value, str):
        yield from (json.dumps(value), str(value))
        return
    for text in (value, value.strip()):
        yield text
        yield json.dumps(text, ensure_ascii=False)[1:-1]
        yield json.dumps(text)[1:-1]
        yield repr(text)[1:-1]


def _said(message: dict[str, Any]) -> list[tuple[str, Any]]:
    """(field, value) of all that a message says, the longest first."""
    found: list[tuple[str, Any]] = []
    for field, value in message.items():
        if field == "content":
            text = "".join(part["text"] for part in value) if isinstance(value, list) else value or ""
            closed = list(CLOSED.finditer(text)) if message["role"] == "assistant" else []
            if closed:  # templates write a thought and an answer apart, whatever is between them
                thought = OPENED.split(text[: closed[-1].start()])
                found += [("thought", part) for part in thought if part.strip()]
            found.append(("content", text[closed[-1].end() :] if closed else text))
        elif field in THOUGHTS and isinstance(value, str) and message["role"] == "assistant":
            found.append(("thought", value))
        elif field == "tool_calls":
            for call in value:
                arguments = call["function"]["arguments"]
                found.append(("a call's name", call["function"]["name"]))
                if isinstance(arguments, str):
                    found.append((TEXT_ARGUMENTS, arguments))
                else:
                    found += [("a call's arguments", leaf) for leaf in _leaves(arguments)]
                found += [(f"field {name}", call[name]) for name in call if name not in ("type", "function")]
        elif field != "role":
            found += [(f"field {field}", leaf) for leaf in _leaves(value)]
    return sorted(found, key=lambda pair: -len(str(pair[1])))


def _object(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except ValueError:
            return arguments
    return arguments


def _leaves(value: Any) -> Iterator[Any]:
    """The names and values in a structure."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _tools(tools: list[Any]) -> Iterator[tuple[str, Any]]:
    """(field, value) of what tools' descriptions must have: what they are called, what they do, and what they take."""
    for tool in tools:
        yield from ((f"tools, {field}", value) for field, value in _described(tool))


def _described(tool: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(tool, dict):
        raise BadRow("not_a_chat", f"tools: a tool must be an object with a name, and is {_short(tool)}")
    function = tool["function"] if isinstance(tool.get("function"), dict) else tool
    if not function.get("name"):
        raise BadRow("not_a_chat", f"tools: a tool must have a name, and is {_short(tool)}")
    yield from ((name, function[name]) for name in ("name", "description") if function.get(name))
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    for name, schema in (properties or {}).items() if isinstance(properties, dict) else ():
        yield f"a parameter of {function['name']}", name
        if isinstance(schema, dict) and schema.get("description"):
            yield f"parameter {name} of {function['name']}", schema["description"]


def _takes_thoughts(message: dict[str, Any], template: ChatTemplate) -> bool:
    """Whether the template has a place for thoughts as this message has them."""
    fields = [name for name in THOUGHTS if message.get(name)]
    return any(name in template.names for name in fields) if fields else bool(CLOSED.search(template.everything))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
