"""What the READMEs say of each model type. Run as a script, it runs the tests that tell, and writes it anew."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from families import ABOUT, TYPES  # noqa: E402

READMES = TESTS.parent / "README.md", TESTS / "README.md"
BEGIN, END = "<!-- {}: made by tests/model/table_of_types.py -->\n", "<!-- end of {} -->"
LIBRARIES = ("torch", "transformers", "deepspeed", "peft")
COLUMNS = ("loss", "norm", "weight", "tokens", "in: 4.57", "out: 4.57", "out: pinned", "out: newest", "out: peft")


def kept(what: str) -> str:
    """What stands in one of the READMEs between the marks of `what`."""
    for path in READMES:
        _, mark, after = path.read_text(encoding="utf-8").partition(BEGIN.format(what))
        if mark:
            return after.partition(END.format(what))[0]
    raise ValueError(f"no README has the marks of {what!r}")


def replace(what: str, new: str) -> None:
    """Put something else there."""
    for path in READMES:
        text, mark = path.read_text(encoding="utf-8"), BEGIN.format(what)
        if mark in text:
            path.write_text(text.replace(mark + kept(what) + END.format(what), mark + new + END.format(what)))


def names() -> str:
    """All types by the names that people know, as an item of a list."""
    mixtures = [kind for kind in TYPES if "experts" in ABOUT[kind][1]]
    dense, mixed = (", ".join(ABOUT[kind][0] for kind in kinds)
                    for kinds in ([kind for kind in TYPES if kind not in mixtures], mixtures))  # fmt: skip
    said = (
        f"- {len(TYPES)} types of decoders, each equal to one process in tests, in every weight on every rank "
        f"([table](tests/README.md#model-types)). Dense: {dense}. Mixtures of experts by tensor parallelism: {mixed}."
    )
    return textwrap.fill(said, 120, subsequent_indent="  ", break_on_hyphens=False) + "\n"


def printed(title: str, output: str) -> list[list[str]]:
    """The rows of a table that pytest printed at its end."""
    found = re.search(rf"=+ {title} =+\n((?:\|.*\n)+)", output)
    if not found:
        raise ValueError(f"pytest printed no table of {title}:\n{output[-2000:]}")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]


def largest(cells: list[str]) -> str:
    """Of several differences; words go before numbers, and nothing is left out."""
    words = sorted({cell for cell in cells if not re.fullmatch(r"[\d.e+-]+", cell)})
    return ", ".join(words) or max(cells, key=float, default="")


def table(matrix: list[list[str]], exports: list[list[str]]) -> str:
    """Markdown, a row for each type: the largest differences of its grids, and of its exports."""
    lines = [("type", "what sets it apart", *COLUMNS), ("---",) * (2 + len(COLUMNS))]
    for kind in TYPES:
        grids = [row[2:] for row in matrix if row[0] == kind]
        found = [largest(list(column)) for column in zip(*grids, strict=True)] or [""] * 3
        readers = [row[2:] for row in exports if row[0] == kind]
        found += [largest([cell for cell in column if cell]) for column in zip(*readers, strict=True)] or [""] * 6
        lines.append((kind, ABOUT[kind][1], *found))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def versions() -> str:
    """With what, and when, as a sentence."""
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in LIBRARIES}
    newest = re.search(r"\((.*?)\)", output_of("pip", "index", "versions", "transformers"))[1]
    said = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"\n{datetime.date.today()}, {os.cpu_count()} CPU cores: {said}; 4.57 is 4.57.6, the newest is {newest}.\n"


def output_of(module: str, *arguments: str) -> str:
    """What a module run as a script prints, failures and all."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=TESTS.parent, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    replace("names of types", names())
    matrix = output_of("pytest", "-q", "tests/model/test_matrix.py", "--all-types")
    exports = output_of("pytest", "-q", "tests/checkpoint/test_generations.py", "-k", "every")
    replace("types", table(printed("model types", matrix), printed("exports", exports)) + versions())
    print(matrix[-300:], exports[-300:])
