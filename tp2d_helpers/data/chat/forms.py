"""How a template wants to be told things that data writes in several ways: found by trying, once for each template.

- A message that only calls: its content is null for some templates, and empty for others.
- A call's arguments: an object for most templates, JSON text for some.
- A content: text, or a list of parts for those that also take pictures.
- Thoughts: a field beside the content, under one of three names.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chat.template import ChatTemplate
from tp2d_helpers.data.chats import THOUGHTS, Conversation

NAME, KEY, VALUE = "lookup", "place", "Kassel"  # of the call that is tried


class Forms:
    """The forms that a template takes."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        names = [name for name in THOUGHTS if name in template.names]
        self.thoughts = names[0] if names else ""  # the field for thoughts; "" if there is none

    @functools.cached_property
    def parts(self) -> bool:
        """Whether contents must be lists of parts."""
        for parts in (False, True):
            try:
                asked = [self._content({"role": "user", "content": VALUE}, parts)]
                if VALUE in self.template.text(asked):
                    return parts
            except BadRow:
                pass
        return False

    @functools.cached_property
    def calls(self) -> list[tuple[str | None, type]]:
        """(content, type of the arguments) with which a call is written as what it is."""
        found: dict[tuple[str | None, type], str] = {}
        for content, arguments in itertools.product((None, ""), ({KEY: VALUE}, json.dumps({KEY: VALUE}))):
            try:
                text = self.template.text(self.called(content, arguments)[:2])
            except BadRow:
                continue
            as_code = any(bad in text for bad in (f'\\"{KEY}', f"{{'{KEY}", "None"))
            # Gemma 4's takes text, too, and writes other braces round it than the model knows.
            as_object = found.get((content, dict), text)
            if NAME in text and VALUE in text and not as_code and text == as_object:
                found[content, type(arguments)] = text
        return list(found)

    def called(self, content: str | None, arguments: Any) -> list[dict[str, Any]]:
        """A conversation with a call and its result."""
        call = {"id": "call00001", "type": "function", "function": {"name": NAME, "arguments": arguments}}
        return [
            self._content({"role": "user", "content": "a"}, self.parts),
            {"role": "assistant", "content": content, "tool_calls": [call]},
            self._content({"role": "tool", "content": "b", "name": NAME, "tool_call_id": "call00001"}, self.parts),
        ]

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The messages of a conversation in the template's forms."""
        return [self._message(message) for message in conversation.messages]

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        thought = next((name for name in THOUGHTS if message.get(name)), None)
        if thought and self.thoughts and thought not in self.template.names:
            message = {**message, self.thoughts: message[thought]}
            del message[thought]
        if calls := message.get("tool_calls"):
            content, kind = self._called_as(message)
            calls = [{**call, "function": _arguments(call["function"], kind)} for call in calls]
            message = {**message, "content": message["content"] or content, "tool_calls": calls}
        elif message["content"] is None:
            message = {**message, "content": ""}
        return self._content(message, self.parts)

    def _called_as(self, message: dict[str, Any]) -> tuple[str | None, type]:
        """The best of `calls` for a message: as it is, or as near as can be."""
        given = message["content"], type(message["tool_calls"][0]["function"]["arguments"])
        near = sorted(self.calls, key=lambda form: (form[1] is not given[1], form[0] != given[0]))
        return near[0] if near else (given[0] or "", given[1])

    @staticmethod
    def _content(message: dict[str, Any], parts: bool) -> dict[str, Any]:
        if parts and isinstance(message["content"], str):
            return {**message, "content": [{"type": "text", "text": message["content"]}]}
        return message

    def plain(self) -> Iterator[list[dict[str, Any]]]:
        """Conversations to try a template with: with two answers, or with one, where it takes no more."""
        for contents in (("a", "b", "c", "d"), ("a", "b")):
            roles = itertools.cycle(("user", "assistant"))
            messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
            yield [self._content(message, self.parts) for message in messages]


def _arguments(function: dict[str, Any], kind: type) -> dict[str, Any]:
    """A function with its arguments as an object, or as JSON text, which `chats` has seen to be that of an object."""
    arguments = function["arguments"]
    if kind is str and isinstance(arguments, dict):
        return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if kind is dict and isinstance(arguments, str):
        return {**function, "arguments": json.loads(arguments)}
    return function
