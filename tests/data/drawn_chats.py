"""Conversations as hypothesis draws them, in which each word stands once, so that its loss can be told by itself."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from tp2d_helpers.data.chats import THOUGHTS

LETTERS = "bdfghklmnprstvxy"  # no word is part of another one, or of what templates write
BORDERS = ["", "", "", " ", "\n", "\n\n", "  ", "\t", "😀", "é", "日本", "…", " \n"]
BETWEEN = [" ", "\n", "\n\n", " — ", " 😀", ", ", "\t", " <b> ", "\\", '"', "{x}"]


@dataclass
class Drawn:
    """A row, and what became known of it as it was drawn.

    Attributes:
        words: (word, number of its message, what it is: content, thought, call, name or argument of a tool).
        learnt: the numbers of the messages that are to be learnt.
        tool: the name of the tool that is called.
    """

    row: dict[str, Any]
    words: list[tuple[str, int, str]] = field(default_factory=list)
    learnt: set[int] = field(default_factory=set)
    tool: str = ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [*self.row.get("prompt", []), *self.row.get("completion", []), *self.row.get("messages", [])]

    @property
    def calls(self) -> int:
        return sum("tool_calls" in message for message in self.messages)

    @property
    def begins_with_assistant(self) -> bool:
        return next(m["role"] for m in self.messages if m["role"] != "system") == "assistant"


class _Writer:
    """Draws parts of a conversation, and writes down whose each word is."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.numbers, self.found = draw, itertools.count(draw(st.integers(0, 3000))), Drawn({})

    def word(self, message: int, kind: str) -> str:
        number, letters = next(self.numbers), ""
        for _ in range(4):
            number, rest = divmod(number, len(LETTERS))
            letters += LETTERS[rest]
        self.found.words.append((f"zq{letters}", message, kind))
        return f"zq{letters}"

    def text(self, message: int, kind: str = "content") -> str:
        words = [self.word(message, kind) for _ in range(self.draw(st.integers(1, 3)))]
        between = [self.draw(st.sampled_from(BETWEEN)) for _ in words[1:]]
        first, last = self.draw(st.sampled_from(BORDERS)), self.draw(st.sampled_from(BORDERS))
        return first + words[0] + "".join(map("".join, zip(between, words[1:], strict=True))) + last

    def arguments(self, message: int) -> dict[str, Any]:
        values = [
            lambda: self.word(message, "call"), lambda: [self.word(message, "call"), self.word(message, "call")],
            lambda: {self.word(message, "call"): self.word(message, "call")}, lambda: 7_123_457, lambda: 2.5,
            lambda: True, lambda: "", lambda: self.text(message, "call").replace("\\", "").replace('"', ""),
        ]  # fmt: skip
        return {
            self.word(message, "call"): self.draw(st.sampled_from(values))()
            for _ in range(self.draw(st.integers(0, 3)))
        }

    def thought(self, message: dict[str, Any], number: int, name: str) -> None:
        if name == "inline":
            message["content"] = f"<think>\n{self.text(number, 'thought')}\n</think>\n\n{message['content'] or ''}"
        elif name:
            message[name] = self.text(number, "thought")


@st.composite
def chats(draw: st.DrawFn) -> Drawn:
    """A chat of two to six turns."""
    writer = _Writer(draw)
    found, messages = writer.found, []
    thinks = draw(st.sampled_from(["", "", "inline", *THOUGHTS]))
    as_text, tool = draw(st.booleans()), ""

    def add(role: str, **fields: Any) -> None:
        messages.append({"role": role, **fields})

    if draw(st.sampled_from([True, False, False])):
        add("system", content=writer.text(0))
    if draw(st.sampled_from([True] + [False] * 5)):
        add("assistant", content=writer.text(len(messages)))
    for _ in range(draw(st.integers(1, 3))):
        add("user", content=writer.text(len(messages)))
        if draw(st.sampled_from([True, False, False])):
            tool = tool or writer.word(-1, "tool")
            number, arguments = len(messages), writer.arguments(len(messages))
            call = {"name": tool, "arguments": json.dumps(arguments, ensure_ascii=False) if as_text else arguments}
            content = draw(st.sampled_from([None, "", writer.text]))
            content = content(number) if callable(content) else content
            add("assistant", content=content, tool_calls=[{"type": "function", "id": "call00001", "function": call}])
            writer.thought(messages[-1], number, thinks if thinks != "inline" and draw(st.booleans()) else "")
            add("tool", content=writer.text(len(messages)), tool_call_id="call00001", name=tool)
        add("assistant", content=writer.text(len(messages)))
        writer.thought(messages[-1], len(messages) - 1, thinks)
    found.learnt = {number for number, message in enumerate(messages) if message["role"] == "assistant"}
    if draw(st.sampled_from([True, False, False])):
        if last := max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0):
            found.row = {"prompt": messages[: last + 1], "completion": messages[last + 1 :]}
            found.learnt = {number for number in found.learnt if number > last}
    elif len(found.learnt) > 1 and draw(st.booleans()):
        out = draw(st.sampled_from(sorted(found.learnt)))
        messages[out]["weight"] = 0
        found.learnt.discard(out)
    found.row = found.row or {"messages": messages}
    if tool:
        found.tool = tool
        parameters = {"type": "object", "properties": {writer.word(-1, "tool"): {"type": "string", "description": "x"}}}
        function = {"name": tool, "description": writer.word(-1, "tool"), "parameters": parameters}
        found.row["tools"] = [{"type": "function", "function": function}]
    return found
