"""A row of chat data, in any of the formats in use → one form: messages of a role and a content.

| format | columns |
|---|---|
| messages | `messages`: a list of {role, content} |
| conversations | `conversations`: a list of {from, value}; "human" is the user, "gpt" the assistant |
| prompt + completion | `prompt`, `completion`: both text (a user's and an assistant's turn), or both lists as above |
"""

from __future__ import annotations

import json
from typing import Any

from tp2d_helpers.data.bad_rows import BadRow

PAIRS = "prompt + completion"
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    PAIRS: ("prompt", "completion"),
}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; any other is a role's own


def to_json(row: dict[str, Any], form: str, where: str) -> dict[str, str | None]:
    """A row of one of `FORMATS` as {form: JSON of {"messages": […], "prompt": n}, "where": where, "bad": None}.

    "prompt" is the number of messages that the answers to be learnt come after; 0 if every answer is one of them.

    Raises:
        BadRow: for a row that is no such chat, with what is wrong.
    """
    try:
        if form == PAIRS:
            prompt = _messages(_as_list(row.get("prompt"), "user"), "prompt")
            chat = {"messages": prompt + _messages(_as_list(row.get("completion"), "assistant"), "completion"),
                    "prompt": len(prompt)}  # fmt: skip
        else:
            chat = {"messages": _messages(row.get(form), form), "prompt": 0}
    except ValueError as error:
        raise BadRow("not_a_chat", str(error)) from None
    return {form: json.dumps(chat), "where": where, "bad": None}


def from_json(text: str) -> tuple[list[dict[str, Any]], int]:
    """(messages, prompt) of what `to_json` wrote."""
    chat = json.loads(text)
    return chat["messages"], chat["prompt"]


def _as_list(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    """Messages as templates take them. What else a message has (`tool_calls`, for one) stays."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} must be a list of messages, and is {_kind(value)}")
    messages = []
    for number, message in enumerate(value, 1):
        name = f"message {number} of {column}"
        if not isinstance(message, dict):
            raise ValueError(f"{name} must have a role and a content, and is {_kind(message)}")
        message = {field: content for field, content in message.items() if content is not None}
        by = ("from", "value") if "from" in message else ("role", "content")
        role, content = message.pop(by[0], None), message.pop(by[1], None)
        if not isinstance(role, str) or not role:
            raise ValueError(f"{name}: {by[0]!r} must be text, and is {_kind(role)}")
        if content is None and message.get("tool_calls"):
            content = ""
        messages.append({"role": ROLES.get(role, role), "content": _text(content, f"{name}: {by[1]!r}"), **message})
    return messages


def _text(content: Any, name: str) -> str:
    """A content's text. Some write it as parts, each {"type": "text", "text": …}."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{name} must be text, and is {_kind(content)}")
    return content


def _kind(value: Any) -> str:
    return "missing" if value is None else "empty" if value == [] else f"{type(value).__name__} ({str(value)[:60]!r})"
