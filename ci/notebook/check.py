"""Check what a run left behind: the executed notebook and its `metrics.jsonl`."""

from __future__ import annotations

import ast
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from nbformat import NotebookNode

from ci.notebook.cells import code_cells, failed_cells, tagged

RESUMED_EPOCHS = 1  # the notebook continues its run for one epoch more
MOST_LAUNCH_LINES = 40
PLANNED_STEPS = re.compile(r"^\| data \|.*\| (\d+) steps? per epoch\b(?:[^|\\]|\\.)*\|$", re.MULTILINE)


class Check(NamedTuple):
    """One requirement on a run."""

    name: str
    passed: bool
    found: str
    expected: str


def parameters_of(notebook: NotebookNode) -> dict[str, Any]:
    """The parameters of an executed notebook: the literals of the `parameters` cell, then papermill's."""
    values: dict[str, Any] = {}
    for cell in tagged(notebook, "parameters"):
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.Assign):
                value = ast.literal_eval(node.value)
                values.update({target.id: value for target in node.targets if isinstance(target, ast.Name)})
    values.update(notebook.metadata.get("papermill", {}).get("parameters", {}))
    return values


def printed_lines(cell: NotebookNode) -> int:
    """Lines of text among a cell's outputs; of a table or a figure, its text form."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return sum(len(text.splitlines()) for text in texts)


def is_number(value: Any) -> bool:
    """Whether a value of `metrics.jsonl` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def planned_steps(notebook: NotebookNode) -> int | None:
    """Optimizer steps per epoch, as an executed notebook's preflight table has them; None without such a table.

    Nothing else that a run leaves says how many steps the data is good for.
    """
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if found := PLANNED_STEPS.search(output.get("data", {}).get("text/markdown", "")):
                return int(found.group(1))
    return None


def check_steps(records: list[dict[str, Any]], parameters: dict[str, Any], planned: int | None) -> Iterator[Check]:
    """As many optimizer steps in every epoch as planned, each once and in order.

    Args:
        records: the lines of `metrics.jsonl`.
        parameters: `num_epochs` and `debug_steps` count.
        planned: steps per epoch. `debug_steps` is the most that it may be, and stands in for None.
    """
    epochs = parameters["num_epochs"] + RESUMED_EPOCHS
    known = min(filter(None, (planned, parameters["debug_steps"])), default=None)
    by_epoch = Counter(record["epoch"] for record in records)
    passed = bool(records) and by_epoch == dict.fromkeys(range(epochs), known or by_epoch[0])
    found = str(len(records))
    if len(set(by_epoch.values())) > 1:
        found += f" = {' + '.join(map(str, by_epoch.values()))}"
    yield Check("number of steps", passed, found, str(epochs * known) if known else f"{epochs} epochs of equal length")
    steps = [record["step"] for record in records]
    wrong = [step for step, place in zip(steps, range(1, len(steps) + 1), strict=True) if step != place]
    yield Check("steps 1 to n, each once", not wrong, f"{wrong[0]} out of place" if wrong else "all", "all")


def check_numbers(records: list[dict[str, Any]], max_memory_gib: float | None) -> Iterator[Check]:
    """Finite losses and norms, a loss that falls, memory within the limit."""
    for name in ("loss", "grad_norm"):
        bad = [f"{record.get(name)} at step {record['step']}" for record in records if not is_number(record.get(name))]
        yield Check(f"every {name} finite", not bad, bad[0] if bad else "all", "all")
    losses = [record["loss"] for record in records if is_number(record.get("loss"))]
    if len(losses) >= 10:
        first, last = statistics.mean(losses[:5]), statistics.mean(losses[-5:])
        yield Check("loss of the last 5 steps", last < first, f"{last:.4f}", f"< {first:.4f}, that of the first 5")
    else:
        yield Check("loss of the last 5 steps", False, f"{len(losses)} steps with a loss", "10 or more")
    if max_memory_gib is not None:
        peak = max((record["peak_memory_gib"] for record in records), default=math.nan)
        yield Check("peak memory, GiB", peak <= max_memory_gib, f"{peak:.2f}", f"<= {max_memory_gib:g}")


def checks_of(notebook: NotebookNode, records: list[dict[str, Any]], max_memory_gib: float | None) -> list[Check]:
    """Everything that is required of an executed notebook and its metrics."""
    problems = failed_cells(notebook)
    number = len(code_cells(notebook))
    launches = tagged(notebook, "launch")
    lines = max((printed_lines(cell) for cell in launches), default=-1)
    return [
        Check("cells executed", not problems, "; ".join(problems) or str(number), f"{number} without error"),
        *check_steps(records, parameters_of(notebook), planned_steps(notebook)),
        *check_numbers(records, max_memory_gib),
        Check(
            "lines printed by launch",
            0 <= lines <= MOST_LAUNCH_LINES,
            str(lines) if launches else "no cell tagged launch",
            f"<= {MOST_LAUNCH_LINES}",
        ),
    ]


def summary(notebook: NotebookNode, records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the run measured, as rows of (name, value). Rates are medians over all steps."""

    def median(name: str, form: str) -> str:
        values = [record[name] for record in records if is_number(record.get(name))]
        return form.format(statistics.median(values)) if values else "unknown"

    rows = [("steps", str(len(records)))]
    if records:
        first, last = records[0]["loss"], records[-1]["loss"]
        rows.append(
            ("loss, first and last step", " ".join(f"{x:.4f}" if is_number(x) else str(x) for x in (first, last)))
        )
        rows.append(("peak memory, GiB", f"{max(record['peak_memory_gib'] for record in records):.2f}"))
    rows += [("tokens/s, median", median("tokens_per_second", "{:,.0f}")), ("MFU, median", median("mfu", "{:.2%}"))]
    for cell in code_cells(notebook):
        seconds = cell.metadata.get("papermill", {}).get("duration") or 0
        if seconds > 2:
            rows.append((f"In [{cell.execution_count}], seconds", f"{seconds:.1f}  {cell.source.splitlines()[0][:60]}"))
    return rows


def check(executed: Path, metrics: Path, max_memory_gib: float | None) -> int:
    """Print what a run measured and whether it is as required; 1 if it isn't."""
    notebook = nbformat.read(executed, as_version=4)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for name, value in summary(notebook, records):
        print(f"{name:<26} {value}")
    checks = checks_of(notebook, records, max_memory_gib)
    for item in checks:
        print(f"{'ok  ' if item.passed else 'FAIL'} {item.name}: {item.found} (expected {item.expected})")
    return 0 if all(item.passed for item in checks) else 1
