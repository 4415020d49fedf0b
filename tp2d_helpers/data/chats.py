"""A row of chat data, in any of the formats in use → one form: a conversation, as chat templates take it.

| format | columns |
|---|---|
| messages | `messages`: a list of {role, content} |
| conversations | `conversations`: a list of {from, value}; "human" is the user, "gpt" the assistant |
| prompt + completion | `prompt`, `completion`: both text (a user's and an assistant's turn), or both lists as above |

Each of them can be JSON text. Beside them a row may have `tools` (or `functions`), `system`, `documents`, and what its
template takes: in `chat_template_kwargs`, or as columns of their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tp2d_helpers.data.bad_rows import BadRow

PAIRS = "prompt + completion"
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    PAIRS: ("prompt", "completion"),
}
ROLES = {
    "human": "user", "user": "user", "system": "system", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "function_call": "call",
    "tool_call": "call", "tool": "tool", "function": "tool",
}  # fmt: skip
SHAREGPT_TOOLS = {"observation": "tool", "tool_response": "tool", "function_response": "tool"}  # some templates' own
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what templates call an assistant's thoughts
OTHER_THOUGHTS = ("thought", "thoughts", "reasoning_details")  # and data, besides
PARTLY = ("train_detail", "train_on_turn", "mask", "learn")  # fields that say in another way what is to be learnt
NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio")  # columns of what no text model is given
LOSS = frozenset({"weight", "train", "training", "trainable", "loss"})  # fields that say whether a turn is to be learnt
PLAIN, AS_IT_IS = {"role", "content"}, ("system", "user", "assistant", "tool")
LONG = 1000  # characters of a value that no template is given


@dataclass
class Conversation:
    """What a row says.

    Attributes:
        prompt: the number of messages that the answers to be learnt come after; 0 if every answer is one of them.
        learnt: for each message, what the row says of its loss; None if it says nothing.
        more: what other columns have; a template is given those that it takes. None stands for what is too long.
    """

    messages: list[dict[str, Any]]
    prompt: int = 0
    learnt: list[bool | None] = field(default_factory=list)
    tools: list[Any] = field(default_factory=list)
    documents: list[Any] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


def to_json(row: dict[str, Any], form: str, where: str) -> dict[str, str | None]:
    """A row of one of `FORMATS` as {form: JSON of a `Conversation`, "where": where, "bad": None}.

    Raises:
        BadRow: for a row that is no such chat, with what is wrong.
    """
    text = json.dumps(vars(_conversation(row, form)), ensure_ascii=False)  # half a character is found as it is written
    return {form: text, "where": where, "bad": None}


def from_json(text: str) -> Conversation:
    """What `to_json` wrote."""
    return Conversation(**json.loads(text))


def _conversation(row: dict[str, Any], form: str) -> Conversation:
    row = dict(row)
    columns = [row.pop(column, None) for column in FORMATS[form]]
    if form == PAIRS:
        prompt = _messages(_as_list(columns[0], "user"), "prompt")
        found = Conversation(prompt + _messages(_as_list(columns[1], "assistant"), "completion"), len(prompt))
    else:
        found = Conversation(_messages(_decoded(columns[0]), form))
    found.learnt = [_is_learnt(message, i) for i, message in enumerate(found.messages, 1)]
    if other := next((name for name in NOT_TEXT if row.get(name)), None):
        raise BadRow("not_written", f"column {other}: only text is trained on")
    first = found.messages[0] if found.messages[0]["role"] == "system" else None
    if (system := row.pop("system", None)) and not (first and first["content"] == system):
        if not isinstance(system, str) or first:
            raise BadRow("not_a_chat", "a column system beside another system message; one of them must be enough")
        found.messages.insert(0, {"role": "system", "content": system})
        found.learnt.insert(0, None)
        found.prompt += form == PAIRS
    if not isinstance(arguments := _decoded(row.pop("chat_template_kwargs", None)) or {}, dict):
        raise BadRow("not_a_chat", f"chat_template_kwargs must be an object, and is {_kind(arguments)}")
    beside = {name: value for name, value in row.items() if value is not None} | arguments
    for name in ("tools", "functions"):
        if value := _decoded(beside.pop(name, None)):
            if not isinstance(value, list):
                raise BadRow("not_a_chat", f"{name} must be a list, and is {_kind(value)}")
            found.tools += map(_decoded, value)
    found.documents = _decoded(beside.pop("documents", None)) or []
    found.more = {name: value if len(str(value)) <= LONG else None for name, value in beside.items()}
    return found


def _decoded(value: Any) -> Any:
    """What a text says, if it is that of a JSON list or object."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _as_list(value: Any, role: str) -> Any:
    decoded = _decoded(value)
    if isinstance(decoded, list) and decoded and all(isinstance(part, dict) and _role(part) for part in decoded):
        return decoded
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _role(message: dict[str, Any]) -> Any:
    return message.get("role") or message.get("from")


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    """Messages as templates take them. What else a message has stays."""
    if not isinstance(value, list) or not value:
        raise BadRow("not_a_chat", f"{column} must be a list of messages, and is {_kind(value)}")
    return [_message(message, f"message {number} of {column}") for number, message in enumerate(value, 1)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow("not_a_chat", f"{name} must have a role and a content, and is {_kind(message)}")
    if message.keys() == PLAIN and message["role"] in AS_IT_IS and isinstance(message["content"], str):
        return dict(message)  # most are, and the rest takes three times as long
    by = ("from", "value") if "from" in message and message.get("role") is None else ("role", "content")
    role, content = message.get(by[0]), message.get(by[1])
    others = {field: value for field, value in message.items() if field not in by and value is not None}
    if by[0] == "from":
        others = {field: value for field, value in others.items() if field not in ("role", "content")}
    if other := next((field for field in PARTLY if field in others), None):
        raise BadRow("not_a_chat", f"{name}: {other!r} isn't understood; weight or train switch a whole turn on or off")
    if not isinstance(role, str) or not role:
        raise BadRow("not_a_chat", f"{name}: {by[0]!r} must be text, and is {_kind(role)}")
    names = ROLES | (SHAREGPT_TOOLS if by[0] == "from" else {})
    role = names.get(role.strip().lower(), role)
    calls = _decoded(others.pop("tool_calls", None)) or []
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise BadRow("not_a_chat", f"{name}: tool_calls must be a list, and is {_kind(calls)}")
    if call := _decoded(others.pop("function_call", None)):
        calls = [*calls, call]
    if role == "call":  # ShareGPT's, whose value is the call
        role, found = "assistant", _decoded(content)
        if found is content:
            raise BadRow("not_a_chat", f"{name}: a call must be JSON, and is {_kind(content)}")
        calls, content = [*calls, *(found if isinstance(found, list) else [found])], None
    others |= {"tool_calls": [_call(call, name) for call in calls]} if calls else {}
    if isinstance(content, list):
        content = _text_of_parts(content, others, f"{name}: {by[1]!r}")
    if role == "assistant":
        _one_thought(others, name)
    if content is None and role == "assistant" and (calls or any(others.get(thought) for thought in THOUGHTS)):
        return {"role": role, "content": None, **others}
    if not isinstance(content, str):
        raise BadRow("not_a_chat", f"{name}: {by[1]!r} must be text, and is {_kind(content)}")
    return {"role": role, "content": content, **others}


def _text_of_parts(parts: list[Any], others: dict[str, Any], name: str) -> Any:
    """The text of a content in parts; thoughts among them go to the message's other fields."""
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        kind = kind if isinstance(kind, str) else str(kind)
        text = part if isinstance(part, str) else part.get(kind, part.get("text")) if isinstance(part, dict) else None
        if not isinstance(text, str) or kind not in ("text", "thinking", "reasoning"):
            raise BadRow("not_a_chat", f"{name} must be text, and has a part of the type {_kind(kind)}: {_kind(part)}")
        (texts if kind == "text" else thoughts).append(text)
    if thoughts and any(others.get(name) for name in THOUGHTS):
        raise BadRow("not_a_chat", f"{name} has thoughts, and there are others in a field beside it")
    others |= {THOUGHTS[0]: "\n".join(thoughts)} if thoughts else {}
    return "".join(texts)


def _one_thought(others: dict[str, Any], name: str) -> None:
    """Bring the thoughts of a message into one field: some programs write the same ones under several names."""
    found = {key: others[key] for key in (*THOUGHTS, *OTHER_THOUGHTS) if others.get(key)}
    for key, value in found.items():
        parts = value if isinstance(value, list) else [value]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise BadRow("not_a_chat", f"{name}: {key!r} must be text, and is {_kind(value)}")
        found[key] = "".join(texts)
    if len(set(found.values())) > 1:
        raise BadRow("not_a_chat", f"{name}: {' and '.join(found)} are different thoughts")
    for key in found:
        del others[key]
    if found:
        key, text = next(iter(found.items()))
        others[key if key in THOUGHTS else THOUGHTS[0]] = text


def _call(call: Any, name: str) -> dict[str, Any]:
    """A call as {"type": "function", "function": {"name", "arguments"}, …}, whatever names it came under."""
    call = _decoded(call)
    inner = _decoded(call.get("function")) if isinstance(call, dict) else None
    outer = {field: value for field, value in call.items() if value is not None} if isinstance(call, dict) else {}
    if not isinstance(inner, dict):
        inner = {part: outer.pop(part) for part in ("name", "arguments", "parameters") if part in outer}
    inner = {part: value for part, value in inner.items() if value is not None}
    if not isinstance(inner.get("name"), str) or not inner["name"]:
        raise BadRow("not_a_chat", f"{name}: a call must have a name, and is {_kind(call)}")
    arguments = inner.pop("arguments", inner.pop("parameters", {}))
    if not isinstance(arguments, dict | str):
        raise BadRow("not_a_chat", f"{name}: a call's arguments must be an object, and are {_kind(arguments)}")
    if arguments and not isinstance(_decoded(arguments), dict):
        raise BadRow("not_a_chat", f"{name}: a call's arguments must be a JSON object, and are {_kind(arguments)}")
    function = {"name": inner.pop("name"), "arguments": arguments or {}, **inner}
    return {**outer, "type": outer.get("type", "function"), "function": function}


def _is_learnt(message: dict[str, Any], number: int) -> bool | None:
    """What the row says of a message's loss. The fields are taken out of it."""
    said = {name: message.pop(name) for name in sorted(LOSS.intersection(message))}
    for name, value in said.items():
        if isinstance(value, str):
            value = said[name] = {"0": 0, "1": 1, "true": True, "false": False}.get(value.lower(), value)
        if value not in (0, 1):
            raise BadRow("not_a_chat", f"message {number}: {name!r} must be 0, 1, true or false, and is {_kind(value)}")
    if len(set(map(bool, said.values()))) > 1:
        raise BadRow("not_a_chat", f"message {number}: {' and '.join(said)} contradict each other")
    if any(said.values()) and message["role"] != "assistant":
        raise BadRow("not_a_chat", f"message {number} ({message['role']}): only an assistant's turn can be learnt")
    return bool(next(iter(said.values()))) if said else None


def _kind(value: Any) -> str:
    return "missing" if value is None else "empty" if value == [] else f"{type(value).__name__} ({str(value)[:60]!r})"
