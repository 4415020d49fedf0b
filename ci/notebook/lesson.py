"""What a notebook asks of its reader: words, code, figures and minutes, those of the core apart from the optional.

The markdown is read as nbconvert renders it, so that headings have the anchors, and pictures the tags, of the page.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup, Tag
from nbconvert.filters import markdown2html
from nbformat import NotebookNode

OPTIONAL = "Going further"  # the heading of level 2 that begins the optional part
WORDS_PER_MINUTE = 200
MINUTES = re.compile(r"\s*\((\d+) minutes?\)$")
ROUNDING = 5  # seconds: stored times are rounded up to it, so that they seldom change


def rendered(markdown: str) -> BeautifulSoup:
    """Markdown as HTML, without the signs that link to headings."""
    soup = BeautifulSoup(markdown2html(markdown), "html.parser")
    for sign in soup.select("a.anchor-link"):
        sign.decompose()
    return soup


def words(text: str) -> int:
    """Words of a text; a sign by itself, as `=` or `|`, is none."""
    return len(re.findall(r"\S*\w\S*", text))


@dataclass
class Section:
    """What stands under one heading: of level 1 or 2, in the optional part of level 3 too.

    Attributes:
        title: the heading without its minutes; empty for what stands before the first one.
        minutes: those that the heading promises, as in "Speed (5 minutes)"; None without.
        elements: the rendered markdown, heading included.
    """

    title: str = ""
    level: int = 0
    anchor: str = ""
    minutes: int | None = None
    optional: bool = False
    elements: list[Tag] = field(default_factory=list)
    code: list[NotebookNode] = field(default_factory=list)

    @classmethod
    def of(cls, heading: Tag, optional: bool) -> Section:
        """A section that has its heading only."""
        text = heading.get_text()
        promised = MINUTES.search(text)
        return cls(
            MINUTES.sub("", text), int(heading.name[1]), str(heading.get("id", "")),
            int(promised.group(1)) if promised else None, optional,
        )  # fmt: skip

    def select(self, selector: str) -> list[Tag]:
        """The elements that a CSS selector finds."""
        return BeautifulSoup("\n".join(map(str, self.elements)), "html.parser").select(selector)

    def prose(self, without: Sequence[str] = ("pre",)) -> str:
        """The text, except in tags of these names (pre: blocks of code)."""
        soup = BeautifulSoup("\n".join(map(str, self.elements)), "html.parser")
        for name in without:
            for tag in soup.find_all(name):
                tag.decompose()
        return soup.get_text()

    def listings(self) -> list[str]:
        """The sources that `show_source` displays."""
        cells = [cell for cell in self.code if "show_source(" in cell.source]
        texts = [output.get("data", {}).get("text/plain") for cell in cells for output in cell.outputs]
        return [text for text in texts if text]

    def seconds(self) -> float:
        """Time that the code cells took, where papermill or JupyterLab noted it."""
        return sum(map(cell_seconds, self.code))


def cell_seconds(cell: NotebookNode) -> float:
    """Time that a code cell took, as papermill or JupyterLab noted it; 0 without a note."""
    times = cell.metadata.get("execution", {})
    begin, end = times.get("iopub.execute_input"), times.get("shell.execute_reply")
    if begin and end:
        return (datetime.fromisoformat(end[:23]) - datetime.fromisoformat(begin[:23])).total_seconds()
    return cell.metadata.get("papermill", {}).get("duration") or 0.0


def sections(notebook: NotebookNode) -> list[Section]:
    """The notebook cut at its headings."""
    found = [Section()]
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.strip():
            found[-1].code.append(cell)
        for element in rendered(cell.source).find_all(recursive=False) if cell.cell_type == "markdown" else ():
            optional = found[-1].optional
            if element.name in ("h1", "h2") or (optional and element.name == "h3"):
                begins = element.name == "h2" and element.get_text() == OPTIONAL
                found.append(Section.of(element, optional or begins))
            found[-1].elements.append(element)
    return [section for section in found if section.elements or section.code]


def run_seconds(notebook: NotebookNode) -> dict[str, int]:
    """Time that the core and each optional section took, rounded up; as stored where the cells have no times."""
    parts = sections(notebook)
    times = {"core": sum(part.seconds() for part in parts if not part.optional)}
    times |= {part.title: part.seconds() for part in parts if part.optional}
    rounded = {title: math.ceil(seconds / ROUNDING) * ROUNDING for title, seconds in times.items() if seconds}
    return rounded or dict(notebook.metadata.get("tp2d", {}).get("seconds", {}))


def minutes(parts: Sequence[Section], seconds: float, code_too: bool = False) -> float:
    """Time to read the sections at 200 words per minute and to run them; with `code_too`, to read all code as well."""
    read = sum(words(part.prose(without=[] if code_too else ["pre"])) for part in parts)
    if code_too:
        read += sum(words(text) for part in parts for text in [*(cell.source for cell in part.code), *part.listings()])
    return read / WORDS_PER_MINUTE + seconds / 60


def counts(parts: Sequence[Section], seconds: float) -> dict[str, str]:
    """What the sections amount to, by the name of the count."""
    cells = [cell for part in parts for cell in part.code]
    lines = [len(cell.source.strip().splitlines()) for cell in cells]
    listings = [len(text.splitlines()) for part in parts for text in part.listings()]
    plots = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    return {
        "words of prose": f"{sum(words(part.prose()) for part in parts):,}",
        "code cells": f"{len(cells)}",
        "lines of a cell, median / most": f"{statistics.median(lines):g} / {max(lines)}" if lines else "–",
        "listings": f"{len(listings)}",
        "lines of a listing, all / most": f"{sum(listings)} / {max(listings)}" if listings else "–",
        "figures": f"{sum(len(part.select('img:not(a > img)')) for part in parts)}",  # in a link: a badge
        "plots": f"{plots}",
        "links": f"{sum(len(part.select('a[href^=http]')) for part in parts)}",
        "seconds to run": f"{seconds:.0f}" if seconds else "not known",
        "minutes, prose and run": f"{minutes(parts, seconds):.0f}",
        "minutes, code and listings read too": f"{minutes(parts, seconds, code_too=True):.0f}",
    }


def compare(notebooks: Sequence[Path], seconds: float = 0.0) -> str:
    """A Markdown table of the counts, a column per notebook and part.

    Args:
        seconds: of the core's run, for notebooks that keep no times.
    """
    columns: dict[str, dict[str, str]] = {}
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        parts, times = sections(notebook), run_seconds(notebook)
        core = [part for part in parts if not part.optional]
        columns[path.stem] = counts(core, times.pop("core", seconds))
        if len(core) < len(parts):
            columns[f"{path.stem}, optional"] = counts([part for part in parts if part.optional], sum(times.values()))
    lines = [["", *columns], [":--", *["--:"] * len(columns)]]
    lines += [[name, *(column[name] for column in columns.values())] for name in next(iter(columns.values()))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
