"""The lesson keeps its promises: minutes, lengths, contents, recaps, links, pictures, wording.

Each check returns what is wrong, so that it can be seen to find it in a small notebook that is right but for one thing.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import Tag
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ci.notebook import NOTEBOOK, ROOT
from ci.notebook.__main__ import main
from ci.notebook.lesson import MINUTES, OPTIONAL, Section, counts, minutes, rendered, run_seconds, sections
from ci.notebook.refresh import TEXTS

MOST_MINUTES = 20
MOST_LINES = 40
MOST_MEDIAN_LINES = 12
# Words that the field has better ones for, and turns that a reader stumbled over.
BANNED = [
    r"\b(we|our|ours|let.s)\b",
    r"\b(matrix )?products?\b",
    r"\bmultiprocessors?\b",
    r"\bthe sums\b",
    r"\bholds? [^.]{1,60} against\b",
    r"\bserves? to continue\b",
    r"\bsettles? what\b",
    r"\bmistakes? ends? here\b",
    r"\bahead of its use\b",
    r"\btakes every rank for\b",
    r"\bhide nothing\b",
    r"\basks the GPU for\b",
    r"\bprints much\b",
    r"\bstops with the step\b",
    r"\bwhich of them pays\b",
    r"\bwhat DP ranks divide\b",
]
Check = Callable[[NotebookNode, Path], Iterator[str]]


def core(notebook: NotebookNode) -> list[Section]:
    return [part for part in sections(notebook) if not part.optional]


def time_of_the_core(notebook: NotebookNode, folder: Path) -> Iterator[str]:
    seconds = run_seconds(notebook).get("core")
    if not seconds:
        yield "no run time of the core is kept; ci/refresh_notebook.sh stores it"
    elif (needed := minutes(core(notebook), seconds)) > MOST_MINUTES:
        yield f"the core takes {needed:.1f} minutes"


def time_of_the_optional_parts(notebook: NotebookNode, folder: Path) -> Iterator[str]:
    times = run_seconds(notebook)
    for part in sections(notebook):
        if part.optional and part.level == 3:
            needed = minutes([part], times.get(part.title, 0))
            if part.minutes is None or part.minutes < needed:
                yield f"{part.title} takes {needed:.1f} minutes, its heading says {part.minutes}"


def lengths_of_code(notebook: NotebookNode, folder: Path) -> Iterator[str]:
    parts = sections(notebook)
    # The parameters are a list to look things up in, and papermill needs them in one cell.
    shown = [cell for part in parts for cell in part.code if "parameters" not in cell.metadata.get("tags", [])]
    cells = [cell.source.strip() for cell in shown]
    for kind, texts in (("cell", cells), ("listing", [text for part in parts for text in part.listings()])):
        for text in texts:
            if (lines := len(text.splitlines())) > MOST_LINES:
                yield f"a {kind} of {lines} lines: {text.splitlines()[0]}"
    if (median := statistics.median(len(text.splitlines()) for text in cells)) > MOST_MEDIAN_LINES:
        yield f"a median of {median:g} lines per cell"


def contents(notebook: NotebookNode, folder: Path) -> Iterator[str]:
    first, *rest = [part for part in sections(notebook) if part.level]
    found = first.select('li a[href^="#"], td a[href^="#"]')
    listed = [(MINUTES.sub("", link.get_text()), unquote(str(link["href"]))) for link in found]
    expected = [(part.title, f"#{unquote(part.anchor)}") for part in rest]
    yield from (f"not in the contents: {title}" for title in expected if title not in listed)
    yield from (f"in the contents without a section: {title}" for title in listed if title not in expected)
    if sorted(listed) == sorted(expected) and listed != expected:
        yield "the contents are in another order than the sections"


def recaps(notebook: NotebookNode, folder: Path) -> Iterator[str]:
    for part in core(notebook):
        last = part.elements[-1].find("strong") if part.level == 2 else None
        if part.level == 2 and not (last and last.get_text() == "Recap:"):
            yield f"{part.title} ends without a recap"


def boxes(notebook: NotebookNode, folder: Path) -> Iterator[str]:
    quotes = [quote.find("strong") for part in sections(notebook) for quote in part.select("blockquote")]
    if (found := sum(bool(first) and first.get_text().startswith("Try it") for first in quotes)) < 3:
        yield f"{found} boxes to try something"


def pictures(notebook: NotebookNode, folder: Path) -> Iterator[str]:
    for picture in (picture for part in sections(notebook) for picture in part.select("img")):
        if len(picture.get("alt", "").split()) < 3:
            yield f"{picture['src']} has no alt text"
        if not (folder / picture["src"]).is_file():
            yield f"{picture['src']} is no file"


def links(notebook: NotebookNode, folder: Path) -> Iterator[str]:
    anchors = {unquote(str(tag["id"])) for part in sections(notebook) for tag in part.select("[id]")}
    for link in (link for part in sections(notebook) for link in part.select("a")):
        yield from broken_link(link, folder, anchors)


def wording(notebook: NotebookNode, folder: Path) -> Iterator[str]:
    for part in sections(notebook):
        text = part.prose(without=["pre", "code"])
        for found in (found for pattern in BANNED for found in re.finditer(pattern, text, re.IGNORECASE)):
            yield f"{part.title}: {text[max(0, found.start() - 20) : found.end() + 20]!r}"


CHECKS: list[Check] = [
    time_of_the_core, time_of_the_optional_parts, lengths_of_code, contents, recaps, boxes, pictures, links, wording
]  # fmt: skip


def broken_link(link: Tag, folder: Path, anchors: set[str]) -> Iterator[str]:
    """What is wrong with a link's form: of a web address, a path in the tree or a heading on the page."""
    address = urlsplit(str(link["href"]))
    path, heading = unquote(address.path), unquote(address.fragment)
    if address.scheme or address.netloc:
        if address.scheme not in ("http", "https") or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc):
            yield f"not a web address: {link['href']}"
    elif path and not (folder / path).exists():
        yield f"no such file: {link['href']}"
    elif heading and heading not in (headings_on_github(folder / path) if path.endswith(".md") else anchors):
        yield f"no such heading: {link['href']}"


def headings_on_github(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown file."""
    titles = [heading.get_text() for heading in rendered(page.read_text()).find_all(re.compile("^h[1-6]$"))]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_lesson(check):
    assert list(check(nbformat.read(NOTEBOOK, as_version=4), ROOT)) == []


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_of_the_texts(page):
    notebook = new_notebook(cells=[new_markdown_cell(page.read_text())])
    anchors = headings_on_github(page)
    found = [
        each
        for part in sections(notebook)
        for link in part.select("a")
        for each in broken_link(link, page.parent, anchors)
    ]
    assert found + list(pictures(notebook, page.parent)) == []


@pytest.fixture
def lesson() -> NotebookNode:
    """A notebook that is as it should be."""
    top = "# Title\n\n- [1. The grid](#1.-The-grid)\n- [Going further](#Going-further)\n"
    top += "- [Speed (2 minutes)](#Speed-(2-minutes))"
    shown = new_output("display_data", data={"text/plain": "def f():\n    pass", "text/html": "<pre>def f()</pre>"})
    box = "> **Try it.** Set `tp_size` to 1."
    cells = [
        new_markdown_cell(top),
        new_code_cell("a = 1\n\nb = 2", metadata={"papermill": {"duration": 61}}),
        new_markdown_cell("## 1. The grid\n\nFour GPUs, [a page](https://a.org/b#c).\n\n![A grid of GPUs](grid.png)"),
        new_code_cell("show_source(f)", outputs=[shown]),
        new_markdown_cell(f"{box}\n\n{box}\n\n### Detail\n\n```bash\nls -l\n```\n\n**Recap:** a row shares\nsamples."),
        new_markdown_cell("## Going further\n\nMore [above](#Detail)."),
        new_markdown_cell(f"### Speed (2 minutes)\n\nFast. See [the file](other.md#speed-on-2-h100).\n\n{box}"),
        new_code_cell("c = 1", metadata={"papermill": {"duration": 3}}),
    ]  # fmt: skip
    return new_notebook(cells=cells)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "grid.png").write_bytes(b"")
    (tmp_path / "other.md").write_text("## Speed on 2 H100\n")
    return tmp_path


def test_counts(lesson, tmp_path, capsys):
    parts = sections(lesson)
    assert [(part.title, part.level, part.minutes, part.optional) for part in parts] == [
        ("Title", 1, None, False), ("1. The grid", 2, None, False),
        ("Going further", 2, None, True), ("Speed", 3, 2, True),
    ]  # fmt: skip
    assert run_seconds(lesson) == {"core": 65, "Speed": 5}
    assert counts(parts[:2], 65) == {
        "words of prose": "34", "code cells": "2", "lines of a cell, median / most": "2 / 3", "listings": "1",
        "lines of a listing, all / most": "2 / 2", "figures": "1", "plots": "0", "links": "1", "seconds to run": "65",
        "minutes, prose and run": "1", "minutes, code and listings read too": "1",
    }  # fmt: skip
    assert minutes(parts[:2], 0) == 34 / 200
    assert minutes(parts[:2], 0, code_too=True) == (34 + 2 + 4 + 1 + 3) / 200
    assert parts[3].seconds() == 3
    noted = {"iopub.execute_input": "2026-11-25T08:00:00.900000Z", "shell.execute_reply": "2026-11-25T08:00:04.100000Z"}
    lesson.cells[7].metadata = {"execution": noted}  # as JupyterLab writes it
    assert parts[3].seconds() == pytest.approx(3.2)
    nbformat.write(lesson, tmp_path / "n.ipynb")
    assert main(["count", str(tmp_path / "n.ipynb")]) == 0
    assert "| seconds to run | 65 | 5 |" in capsys.readouterr().out


def test_a_good_lesson_passes_all_checks(lesson, folder):
    assert {check.__name__: list(check(lesson, folder)) for check in CHECKS} == {c.__name__: [] for c in CHECKS}


@pytest.mark.parametrize(
    ("check", "cell", "before", "after", "problem"),
    [
        (time_of_the_core, 2, "Four", "word " * 3794, "the core takes 20.2 minutes"),
        (time_of_the_optional_parts, 6, "Fast", "fast " * 400, "Speed takes 2.1 minutes, its heading says 2"),
        (time_of_the_optional_parts, 6, " (2 minutes)", "", "Speed takes 0.1 minutes, its heading says None"),
        (lengths_of_code, 1, "b = 2", "b = 2\n" * 39, "a cell of 41 lines: a = 1"),
        (contents, 2, "The grid", "Grids", "not in the contents"),
        (contents, 0, "#Speed-(2-minutes)", "#Speed", "not in the contents"),
        (contents, 0, "- [Going", "- [Start](#Title)\n- [Going", "in the contents without a section"),
        (
            contents,
            0,
            "[1. The grid](#1.-The-grid)\n- [Going further](#Going-further)",
            "[Going further](#Going-further)\n- [1. The grid](#1.-The-grid)",
            "another order",
        ),
        (recaps, 4, "**Recap:** a", "A", "1. The grid ends without a recap"),
        (recaps, 4, "samples.", "samples.\n\nAnd more.", "1. The grid ends without a recap"),
        (boxes, 4, "> **Try", "**Try", "2 boxes"),
        (pictures, 2, "A grid of GPUs", "", "grid.png has no alt text"),
        (pictures, 2, "grid.png", "none.png", "none.png is no file"),
        (links, 2, "https://a.org/b#c", "https://example", "not a web address: https://example"),
        (links, 2, "https://a.org/b#c", "htp://example.org", "not a web address: htp://example.org"),
        (links, 5, "#Detail", "#Details", "no such heading: #Details"),
        (links, 6, "other.md", "others.md", "no such file: others.md"),
        (links, 6, "#speed-on-2-h100", "#speed", "no such heading: other.md#speed"),
        (wording, 2, "Four GPUs", "Now we take four GPUs", "1. The grid: "),
        (wording, 2, "Four GPUs", "A pair of matrix products", "1. The grid: "),
    ],
)
def test_each_check_finds_what_it_is_for(lesson, folder, check, cell, before, after, problem):
    assert before in lesson.cells[cell].source
    lesson.cells[cell].source = lesson.cells[cell].source.replace(before, after, 1)
    (found, *_) = check(lesson, folder)
    assert problem in found


def test_lengths_of_listings_and_of_most_cells(lesson, folder):
    lesson.cells[3].outputs[0].data["text/plain"] = "def f():\n" + "    pass\n" * 40
    lesson.cells[1].source = lesson.cells[7].source = "a = 1\n" * 13
    assert list(lengths_of_code(lesson, folder)) == ["a listing of 41 lines: def f():", "a median of 13 lines per cell"]


def test_the_cores_time_must_be_known_and_survives_in_the_metadata(lesson, folder):
    for cell in lesson.cells:
        cell.metadata = {}
    assert list(time_of_the_core(lesson, folder)) == [
        "no run time of the core is kept; ci/refresh_notebook.sh stores it"
    ]
    lesson.metadata.tp2d = {"seconds": {"core": 1300}}
    assert list(time_of_the_core(lesson, folder)) == ["the core takes 21.8 minutes"]


def test_words_in_code_may_be_any(lesson, folder):
    lesson.cells[2].source += "\n\nA `sum of products`.\n\n```python\nwe = 1\n```"
    assert list(wording(lesson, folder)) == []
    assert OPTIONAL in {part.title for part in sections(lesson)}
