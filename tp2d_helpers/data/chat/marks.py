"""Marks that a chat template writes about where it is: at which message, and inside `{% generation %}` or not.

The template's source stays as it is. Calls are added to its tree, before it is compiled: to each loop, and where that
isn't enough, to each assignment in a loop, since some templates write what a tool answered while they are at the call.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

OPEN, CLOSE = "\U0010f8f0", "\U0010f8f1"  # private characters, which no text has
MARK = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}")
NOWHERE = -1  # the number of no message


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


def mark(what: int | str) -> str:
    """A mark: the number of the message that begins, or "begin" or "end" of `{% generation %}`."""
    return f"{OPEN}{what}{CLOSE}"


def without_marks(text: str) -> Rendered:
    """What a text with marks is, and what they say of it."""
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


class Hooks:
    """What the calls do that are added to a template: they write a mark where the message changes."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        numbers, now, before = {id(message): i for i, message in enumerate(messages)}, NOWHERE, {}

        def move(to: int) -> str:
            nonlocal now
            changed, now = to != now, to
            return mark(to) if changed else ""

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
            jinja2.nodes.Output([jinja2.nodes.TemplateData(mark(side))]).set_lineno(line) for side in ("begin", "end")
        )
        return [begin, jinja2.nodes.Scope(body).set_lineno(line), end]


def environment() -> jinja2.Environment:
    """As transformers renders chat templates."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    return made


@functools.lru_cache(maxsize=8)
def compiled(source: str, assigned: bool) -> jinja2.Template:
    """A template that writes marks, also by assignments if these are to count."""
    made = environment()
    tree = _AddHooks(assigned).visit(made.parse(source))
    return made.from_string(tree.set_environment(made))


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
