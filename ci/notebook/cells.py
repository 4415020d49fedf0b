"""The cells of a notebook, executed or not."""

from __future__ import annotations

from nbformat import NotebookNode


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    """The cells that have the tag."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that aren't empty."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def failed_cells(notebook: NotebookNode) -> list[str]:
    """One line per code cell that wasn't executed or has an error among its outputs.

    A cell that calls `sys.exit(0)` makes papermill skip the rest and succeed; here the rest counts as not executed.
    """
    lines = []
    for cell in code_cells(notebook):
        first = cell.source.strip().splitlines()[0]
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors:
            lines.append(f"In [{cell.execution_count}] {first!r}: {errors[0].ename}: {errors[0].evalue}")
        elif cell.execution_count is None:
            lines.append(f"not executed: {first!r}")
    return lines
