"""The table of tests/README.md that says what each of trl's templates takes. Run as a script, this writes it anew."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from templates_of import TEMPLATES, encoder_of, learn

from tp2d_helpers.data.bad_rows import BadRow

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- chat templates: made by tests/data/table_of_templates.py -->\n", "<!-- end of chat templates -->\n"


def turn(role: str, content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "lookup", "arguments": {"word": "Kassel", "n": 7123457}},
}
TOOL = {"type": "function", "function": {"name": "lookup", "description": "Looks up.", "parameters": {
    "type": "object", "properties": {"word": {"type": "string", "description": "which"},
    "n": {"type": "integer"}}}}}  # fmt: skip
RESULT = turn("tool", "A city.", name="lookup", tool_call_id="call00001")
ASKED = [turn("user", "Who?"), turn("assistant", "Nobody.")]
THOUGHT = [turn("user", "Who?"), turn("assistant", "Nobody.", reasoning_content="Hm.")]
TRIED: dict[str, dict[str, Any]] = {
    "two answers": {"messages": ASKED * 2},
    "system turn": {"messages": [turn("system", "Be brief."), *ASKED]},
    "assistant first": {"messages": [turn("assistant", "Hello."), *ASKED]},
    "call and result": {"messages": [ASKED[0], turn("assistant", None, tool_calls=[CALL]), RESULT, ASKED[1]],
                        "tools": [TOOL]},
    "thoughts": {"messages": THOUGHT * 2},
    "`<think>` in contents": {"messages": [ASKED[0], turn("assistant", "<think>\nHm.\n</think>\n\nNobody.")] * 2},
}  # fmt: skip


def outcome(name: str, row: dict[str, Any]) -> str:
    """What became of a row, in a few words."""
    try:
        found = learn(encoder_of(name), row)
    except BadRow as error:
        if error.kind == "not_written":
            return "left out: " + re.sub(r"^(message \d+ \(\w+\), )?([^:]+?)(, name)?:.*", r"\2", error.reason)
        reason = error.reason.removeprefix("the chat template refuses it: ")
        return f"refused: {' '.join(reason.split()[:5])}"
    return "last thought" if any("earlier" in note for note in found.notes) else "whole"


def outcomes(name: str) -> list[str]:
    """What became of all that is tried."""
    return [outcome(name, row) for row in TRIED.values()]


def table() -> str:
    """Markdown; templates with the same outcomes share a line."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in TEMPLATES:
        rows.setdefault(tuple(outcomes(name)), []).append(name)
    lines = [("templates", *TRIED), ("---",) * (1 + len(TRIED))]
    lines += [(", ".join(names), *found) for found, names in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def kept() -> str:
    """The table that the README has."""
    return README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def kept_of(name: str) -> list[str]:
    """What the README says of a template."""
    lines = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in kept().splitlines()]
    return next((cells for names, *cells in lines if name in names.split(", ")), [])


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(BEGIN + kept() + END, BEGIN + table() + END), encoding="utf-8")
