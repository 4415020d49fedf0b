"""Rendering a conversation by a chat template that says, as it writes, of which message each part of its text is.

transformers renders: its text is what counts. The same template is compiled a second time with calls added to its
loops, which write marks where a message's part begins and ends. If the text without the marks is that of transformers,
they are right. Nothing is concluded from the rendering of a beginning: many templates render one differently.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor
import transformers

from tp2d_helpers.data.bad_rows import BadRow

OPEN, CLOSE = "\U0010f8f0", "\U0010f8f1"  # private characters, which no text has
MARK = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NOWHERE = -1  # the number of no message
PASSED = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"}


@dataclass
class Rendered:
    """The text of a conversation, and what of it belongs to what, by characters."""

    text: str
    pieces: list[tuple[int, int, int]] = field(default_factory=list)  # (begin, end, number of the message)
    marked: list[tuple[int, int, int]] = field(default_factory=list)  # the same of what `{% generation %}` encloses
    by_content: bool = False  # pieces are contents alone, without headers and stop tokens

    @staticmethod
    def by_message(pieces: list[tuple[int, int, int]]) -> dict[int, list[tuple[int, int]]]:
        """(begin, end) of the pieces of each message."""
        found = defaultdict(list)
        for begin, end, number in pieces:
            found[number].append((begin, end))
        return found


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        date: YYYY-MM-DD, what templates that write the date take for today.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, date: str) -> None:
        self.tokenizer, self.day = tokenizer, datetime.fromisoformat(date)

    def source(self, tools: Any = None) -> str:
        """The template's text: of a tokenizer with several by name, `tool_use` where there are tools."""
        return self.tokenizer.get_chat_template(tools=tools)

    @functools.cached_property
    def everything(self) -> str:
        """The text of all templates that the tokenizer has."""
        templates = self.tokenizer.chat_template
        return "\n".join(templates.values()) if isinstance(templates, dict) else templates

    @functools.cached_property
    def variables(self) -> set[str]:
        """The names that the template takes, besides those that every conversation has."""
        return jinja2.meta.find_undeclared_variables(_environment().parse(self.everything)) - PASSED

    @property
    def has_marks(self) -> bool:
        """Whether it marks by `{% generation %}` what has loss."""
        return bool(GENERATION.search(self.everything))

    @functools.cached_property
    def names(self) -> set[str]:
        """The fields of messages, tools and other things that it may look at, and all other texts in its code."""
        tree = _environment().parse(self.everything)
        fields = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
        return fields | {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}

    def text(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """What transformers renders. Raises `BadRow` if the template refuses the conversation."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, **{"strftime_now": self.day.strftime, **options}
            )
        except Exception as error:  # of jinja, or of the template's own making
            raise BadRow("refused", f"the chat template refuses it: {error}") from error

    def rendered(self, messages: list[dict[str, Any]], **options: Any) -> Iterator[Rendered]:
        """The text with the pieces of each message, found in one way after the other; some of them may find none."""
        text, source = self.text(messages, **options), self.source(options.get("tools"))
        for assigned in (False, True):
            found = self._marked(_compile(source, assigned), messages, options)
            if found and found.text == text:
                yield found
        if not self.has_marks and (found := self._by_content(messages, text, options)):
            yield found

    def _marked(
        self, compiled: jinja2.Template, messages: list[dict[str, Any]], options: dict[str, Any]
    ) -> Rendered | None:
        """What the template with marks renders; None if it can't."""
        arguments = {"tools": None, "documents": None, "add_generation_prompt": False,
                     "strftime_now": self.day.strftime, **self.tokenizer.special_tokens_map, **options}  # fmt: skip
        try:
            text = compiled.render(messages=messages, **arguments, **vars(_Hooks(messages)))
        except Exception:  # transformers rendered it, and so this is no fault of the conversation
            return None
        return _without_marks(text)

    def _by_content(self, messages: list[dict[str, Any]], text: str, options: dict[str, Any]) -> Rendered | None:
        """The text with the pieces that are contents, for templates that don't loop over messages."""
        marked = []
        for number, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, str):
                message = {**message, "content": f"{_mark(number)}{content}{_mark(NOWHERE)}"}
            marked.append(message)
        try:
            found = _without_marks(self.text(marked, **options))
        except BadRow:
            return None
        found.by_content = True
        return found if found.text == text else None


def today() -> str:
    """The date, as YYYY-MM-DD."""
    return datetime.now().date().isoformat()


def _mark(what: int | str) -> str:
    return f"{OPEN}{what}{CLOSE}"


def _without_marks(text: str) -> Rendered:
    found, length, now, inside = Rendered(""), 0, NOWHERE, False
    texts = []
    for number, part in enumerate(MARK.split(text)):
        if number % 2:
            if part in ("begin", "end"):
                inside = part == "begin"
            else:
                now = int(part)
        elif part:
            texts.append(part)
            piece = (length, length := length + len(part), now)
            for pieces in (found.pieces, found.marked)[: 1 + inside]:
                if pieces and pieces[-1][1:] == (piece[0], now):
                    pieces[-1] = (pieces[-1][0], *piece[1:])
                else:
                    pieces.append(piece)
    found.text = "".join(texts)
    return found


class _Hooks:
    """What the calls do that are added to a template: they write a mark where the message changes."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        numbers, now, before = {id(message): i for i, message in enumerate(messages)}, NOWHERE, {}

        def move(to: int) -> str:
            nonlocal now
            changed, now = to != now, to
            return _mark(to) if changed else ""

        def enter(loop: int) -> str:
            """A loop begins."""
            before[loop] = now
            return ""

        def at(loop: int, *values: Any) -> str:
            """A pass of it begins, with these values of its variables."""
            return move(next((numbers[id(value)] for value in values if id(value) in numbers), before[loop]))

        def leave(loop: int) -> str:
            """It is over."""
            return move(before[loop])

        def assigned(value: Any) -> str:
            """A variable got a value."""
            return move(numbers[id(value)]) if id(value) in numbers else ""

        self.tp2d_enter, self.tp2d_at, self.tp2d_leave, self.tp2d_assigned = enter, at, leave, assigned


class _AddHooks(jinja2.visitor.NodeTransformer):
    """Adds the calls to a template's loops, and to its assignments if these are to count."""

    def __init__(self, assigned: bool) -> None:
        self.loops, self.depth, self.assigned = itertools.count(), 0, assigned

    def visit_For(self, node: jinja2.nodes.For) -> list[jinja2.nodes.Node]:
        """A loop."""
        self.depth += 1
        node = self.generic_visit(node)
        self.depth -= 1
        loop = jinja2.nodes.Const(next(self.loops))
        names = [jinja2.nodes.Name(name.name, "load") for name in node.target.find_all(jinja2.nodes.Name)]
        names += [jinja2.nodes.Name(node.target.name, "load")] if isinstance(node.target, jinja2.nodes.Name) else []
        node.body.insert(0, _call("tp2d_at", node, loop, *names))
        return [_call("tp2d_enter", node, loop), node, _call("tp2d_leave", node, loop)]

    def visit_Assign(self, node: jinja2.nodes.Assign) -> list[jinja2.nodes.Node]:
        """`{% set name = … %}`."""
        if not (self.assigned and self.depth and isinstance(node.target, jinja2.nodes.Name)):
            return [node]
        return [node, _call("tp2d_assigned", node, jinja2.nodes.Name(node.target.name, "load"))]


def _call(name: str, at: jinja2.nodes.Node, *values: jinja2.nodes.Expr) -> jinja2.nodes.Output:
    called = jinja2.nodes.Call(jinja2.nodes.Name(name, "load"), list(values), [], None, None)
    return jinja2.nodes.Output([called]).set_lineno(at.lineno)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` as a mark before and after what it encloses."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The nodes of one."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            jinja2.nodes.Output([jinja2.nodes.TemplateData(_mark(side))]).set_lineno(line) for side in ("begin", "end")
        )
        return [begin, jinja2.nodes.Scope(body).set_lineno(line), end]


def _environment() -> jinja2.Environment:
    """As transformers renders chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


@functools.lru_cache(maxsize=8)
def _compile(source: str, assigned: bool) -> jinja2.Template:
    environment = _environment()
    tree = _AddHooks(assigned).visit(environment.parse(source))
    return environment.from_string(tree.set_environment(environment))


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
