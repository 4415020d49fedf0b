"""Run the notebook and store its outputs in it, without what changes between runs or names the machine.

The measured numbers in its text, and in that of the READMEs, are rewritten from the results files.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from ci.notebook import EXECUTED, NOTEBOOK, ROOT
from ci.notebook.cells import code_cells
from ci.notebook.lesson import run_seconds
from ci.notebook.measured import refresh_numbers
from ci.notebook.placeholders import Placeholders
from ci.notebook.run import execute, parse

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
TEXTS = [ROOT / "README.md", ROOT / "tests/README.md", ROOT / "ci/benchmark/README.md"]


def replace_texts(value: Any, replace: Callable[[str], str]) -> Any:
    """`value` with `replace` applied to every text in it."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, list):
        return [replace_texts(item, replace) for item in value]
    if isinstance(value, dict):
        return NotebookNode({key: replace_texts(item, replace) for key, item in value.items()})
    return value


def joined_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Copies of the outputs, without stderr, neighbouring pieces of stdout joined: where one ends depends on timing."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if output.output_type == "stream" and joined and joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(NotebookNode(output))
    return joined


def clean_data(data: dict[str, Any], replace: Callable[[str], str]) -> NotebookNode:
    """The forms of one output, by MIME type, without widgets; pictures as they are, `replace` applied to the others."""
    kept = {kind: form for kind, form in data.items() if not kind.startswith("application/vnd.jupyter.widget")}
    pictures = ("image/png", "image/jpeg")
    return NotebookNode({k: form if k in pictures else replace_texts(form, replace) for k, form in kept.items()})


def clean_outputs(outputs: list[NotebookNode], count: int, replace: Callable[[str], str]) -> list[NotebookNode]:
    """A cell's outputs as they are stored: no stderr, no widgets, `replace` applied."""
    cleaned: list[NotebookNode] = []
    for output in joined_streams(outputs):
        if output.output_type == "stream":
            output.text = replace(output.text)
        if "data" in output:
            output.data = clean_data(output.data, replace)
            if not output.data:
                continue
        if "execution_count" in output:
            output.execution_count = count
        cleaned.append(output)
    return cleaned


def clean(notebook: NotebookNode, replace: Callable[[str], str]) -> NotebookNode:
    """A copy of an executed notebook as it is stored: nothing that changes between runs or names the machine.

    Raises:
        ValueError: if a text was replaced in a cell whose output nbval compares: it would differ everywhere else.
    """
    notebook, seconds = copy.deepcopy(notebook), run_seconds(notebook)
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    count = 0
    for cell in notebook.cells:
        dropped = ("papermill", "execution", "ExecuteTime")
        cell.metadata = NotebookNode(
            {k: v for k, v in cell.metadata.items() if k not in dropped and (k, v) != ("tags", [])}
        )
        if cell.cell_type != "code":
            continue
        count += 1
        untouched = clean_outputs(cell.outputs, count, str)
        cell.execution_count, cell.outputs = count, clean_outputs(cell.outputs, count, replace)
        if "nbval-check-output" in cell.metadata.get("tags", []) and cell.outputs != untouched:
            first = cell.source.strip().splitlines()[0]
            raise ValueError(f"the cell {first!r} is tagged nbval-check-output, but its output names this machine")
    kept = {k: v for k, v in notebook.metadata.items() if k not in ("papermill", "widgets")}
    notebook.metadata = NotebookNode({**kept, **METADATA, **({"tp2d": {"seconds": seconds}} if seconds else {})})
    return notebook


def store(notebook: NotebookNode) -> None:
    """Put a notebook in the place of the project's, whole or not at all."""
    scratch = NOTEBOOK.with_name(f".{NOTEBOOK.name}.{os.getpid()}")
    nbformat.write(notebook, scratch)
    scratch.replace(NOTEBOOK)


def refresh_texts() -> int:
    """Rewrite the measured numbers in the notebook's and the READMEs' text from the results files."""
    for file in TEXTS:
        before = file.read_text()
        if (now := refresh_numbers(before, file.parent)) != before:
            file.write_text(now)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = refresh_numbers(cell.source, ROOT)
    if notebook != before:
        store(notebook)
    return 0


def refresh() -> int:
    """Run the notebook on its own parameters and store its outputs in it, unless a cell fails."""
    before = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder).resolve()
        context, run_dir = parse([], {"storage_path": str(storage), "experiment_name": "tp_autotp"})
        if status := execute(context, run_dir):
            print(f"the outputs in {NOTEBOOK.name} are as they were", file=sys.stderr)
            return status
        executed = nbformat.read(run_dir / EXECUTED, as_version=4)
        cleaned = clean(executed, Placeholders.of_this_machine(storage, executed))
    now = nbformat.read(NOTEBOOK, as_version=4)
    sources = [[(cell.cell_type, cell.source) for cell in version.cells] for version in (before, cleaned, now)]
    if not sources[0] == sources[1] == sources[2]:
        raise ValueError(f"{NOTEBOOK.name} was edited during the run and is left as it is; run again")
    store(cleaned)
    print(f"stored the outputs of {len(code_cells(cleaned))} cells in {NOTEBOOK}")
    return refresh_texts()
