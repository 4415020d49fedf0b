"""Measured numbers in the text come from the results files: how they are found, written and compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from ci.notebook import NOTEBOOK, ROOT, refresh
from ci.notebook.measured import LINK, outdated, refresh_numbers, value_of

RESULTS = {
    "date": "2026-11-25",
    "totals": {"matmul_ms": 1969.4},
    "candidates": [
        dict(name="ours", label="a", ours=True, status="ok", settings={"micro_batch": 4, "async_tp": False},
             step_ms=1618.6, mfu=0.5538, tokens_per_second_per_gpu=20244.0),
        dict(name="ours", label="b", ours=True, status="ok", settings={"micro_batch": 2, "async_tp": False},
             step_ms=1687.0, mfu=0.531, tokens_per_second_per_gpu=19424.0),
        dict(name="fsdp2", label="c", ours=False, status="ok", settings={"micro_batch": 2, "async_tp": True},
             step_ms=1928.0, mfu=0.465, tokens_per_second_per_gpu=16996.0),
        dict(name="fsdp2", label="d", ours=False, status="failed", settings={"micro_batch": 4, "async_tp": True},
             error="out of memory"),
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "title", "expected"),
    [
        ("9 ms", "ours micro_batch=4: step_ms", "1,619 ms"),
        ("**9.0** ms", "ours micro_batch=4: step_ms", "**1,618.6** ms"),
        ("9.9 %", "fastest ours: mfu", "55.4 %"),
        ("9%", "fastest ours=true: mfu", "55%"),
        ("1.00 times", "fastest ours=false: step_ms / fastest ours=true: step_ms", "1.19 times"),
        ("1.00", "fsdp2 micro_batch=2 async_tp=true: step_ms / ours micro_batch=2: step_ms", "1.14"),
        ("0", "totals.matmul_ms", "1,969"),
    ],
)
def test_a_number_is_written_as_the_text_has_it(folder, text, title, expected):
    markdown = f'Before [{text}](r.json "{title}") and [a page](r.json).'
    now = f'Before [{expected}](r.json "{title}") and [a page](r.json).'
    assert refresh_numbers(markdown, folder) == now
    assert list(outdated(markdown, folder)) == [f"{text!r} is {expected!r} in r.json ({title})"]
    assert list(outdated(now, folder)) == []


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ('[1](r.json "ours: step_ms")', 'fits 2 entries, needs 1; there are: ours (a), ours (b)'),
        ('[1](r.json "theirs: step_ms")', 'fits 0 entries, needs 1; there are: ours (a), ours (b), fsdp2 (c)'),
        ('[1](r.json "ours micro_batch=2: seconds")', "no seconds; there are: name, label,"),
        ('[1](r.json "totals.attention_ms")', "no totals.attention_ms; there are: date, totals"),
        ('[1](r.json "date")', "is '2026-11-25', needs a number"),
        ('[1](r.json "ours micro_batch=2: ours")', "is True, needs a number"),
        ('[one](r.json "totals.matmul_ms")', "has no number in its text"),
        ('[1](s.json "totals.matmul_ms")', "no such file in"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_link_is_said(folder, link, reason):
    (problem,) = outdated(link, folder)
    assert reason in problem
    with pytest.raises(ValueError, match=re.escape(reason)):
        refresh_numbers(link, folder)


def test_a_time_that_the_notebook_keeps(folder):
    notebook = new_notebook(metadata={"tp2d": {"seconds": {"core": 85}}})
    nbformat.write(notebook, folder / "n.ipynb")
    link = '[{}](n.ipynb "metadata.tp2d.seconds.core")'
    assert refresh_numbers(link.format("1 s"), folder) == link.format("85 s")


def test_the_fastest_is_among_those_that_ran():
    assert value_of(RESULTS, "fastest fsdp2: step_ms") == 1928.0
    with pytest.raises(ValueError, match="fits 0 entries"):
        value_of(RESULTS, "fastest fsdp2 micro_batch=4: step_ms")


def test_the_command_rewrites_the_notebook_and_the_texts(folder, monkeypatch):
    link = '[{}](r.json "totals.matmul_ms")'
    text, notebook = folder / "README.md", folder / "n.ipynb"
    text.write_text(link.format(1))
    nbformat.write(new_notebook(cells=[new_markdown_cell(link.format(1))]), notebook)
    for name, value in (("TEXTS", [text]), ("NOTEBOOK", notebook), ("ROOT", folder)):
        monkeypatch.setattr(refresh, name, value)
    refresh.refresh_texts()
    assert text.read_text() == link.format("1,969")
    assert nbformat.read(notebook, as_version=4).cells[0].source == link.format("1,969")


@pytest.mark.parametrize("file", [NOTEBOOK, *refresh.TEXTS], ids=lambda file: str(file.relative_to(ROOT)))
def test_the_texts_have_the_numbers_of_the_results(file):
    texts = [file.read_text()]
    if file == NOTEBOOK:
        texts = [cell.source for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "markdown"]
    assert [problem for text in texts for problem in outdated(text, file.parent)] == []
    # A title whose link is written in another way would never be compared.
    titled = [len(re.findall(r'\.(?:json|ipynb) "', text)) - len(LINK.findall(text)) for text in texts]
    assert not any(titled), "a link to a results file with a title that isn't read as a measured number"
