"""What the reader sees: sources, tables, curves. Nothing here decides anything."""

from __future__ import annotations

import ast
import html
import inspect
import math
import os
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from IPython import get_ipython
from IPython.display import Markdown, display

if hasattr(get_ipython(), "kernel") and "matplotlib" not in sys.modules:  # where the reader hasn't chosen one
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # an image's "Agg" would show no figure

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

# With a background of its own: that of a dark theme covers the one which the formatter gives to the element around it.
SOURCE_STYLE = (
    "color: #212121; background: #f5f5f5; border: 1px solid #d0d0d0; padding: 8px; font-family: monospace; "
    "font-size: 13px; line-height: 1.3; margin: 0"
)
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's, safe for colour-blind readers


def show_source(*objects: Any) -> None:
    """Display the source of functions or classes, as it is imported: what is read is what runs.

    Left out are the sections "Args", "Returns" and "Raises" of docstrings, which the module has.
    """
    source = "\n\n\n".join(_without_sections(textwrap.dedent(inspect.getsource(thing)).rstrip()) for thing in objects)
    # Styles stand in the tags, so that the code looks the same in every viewer and theme.
    formatter = HtmlFormatter(style="friendly", noclasses=True, prestyles=SOURCE_STYLE, wrapcode=False)
    coloured = highlight(source, PythonLexer(), formatter)
    display({"text/html": coloured, "text/plain": source}, raw=True)


def _without_sections(source: str) -> str:
    """A source whose docstrings end before their first section."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not ast.get_docstring(node):
            continue
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno - 1
        inner = range(first + 1, last)
        sections = [i for i in inner if lines[i] and lines[i].strip() in ("Args:", "Yields:", "Returns:", "Raises:")]
        if sections:
            kept = "\n".join(lines[first : sections[0]]).rstrip()
            end = [kept + '"""'] if "\n" not in kept else [kept, lines[last]]
            lines[first : last + 1] = end + [None] * (last + 1 - first - len(end))  # line numbers stay
    return "\n".join(line for line in lines if line is not None)


def show_table(header: Sequence[str], rows: Iterable[Sequence[Any]], digits: int = 2) -> None:
    """Display rows as a table; numbers are aligned right, floats have `digits` after the point."""
    rows = [list(row) for row in rows]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    lines = [header, ["--:" if right else ":--" for right in numeric], *rows]
    cells = [[_cell(value, digits) for value in line] for line in lines]
    display(Markdown("\n".join("| " + " | ".join(line) + " |" for line in cells)))


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"
    return "" if value is None else str(value).replace("|", "\\|")


def show_example(segments: Iterable[tuple[str, bool]]) -> None:
    """Display a text of which some has loss, as `data.example_segments` gives it: that stands on green."""
    parts, plain = [], []
    for text, has_loss in segments:
        style = ' style="color: #10451d; background: #b7e4c7"' if has_loss else ""
        parts.append(f"<span{style}>{html.escape(text)}</span>")
        plain.append(f"[{text}]" if has_loss else text)
    block = f'<pre style="{SOURCE_STYLE}; white-space: pre-wrap">{"".join(parts)}</pre>'
    display({"text/html": block, "text/plain": "".join(plain)}, raw=True)


def show_results(records: list[dict[str, Any]], first: int = 1) -> None:
    """Display what steps `first` and later amount to. Rates are medians, so that the warm-up doesn't count."""
    records = [record for record in records if record["step"] >= first]
    seconds = statistics.median(record["step_seconds"] for record in records)
    rate = statistics.median(record["tokens_per_second"] for record in records)
    mfus = [record["mfu"] for record in records if record["mfu"] is not None]
    held_out = [record["eval_loss"] for record in records if record["eval_loss"] is not None]
    rows = [
        ("steps", f"{records[0]['step']} to {records[-1]['step']}"),
        ("loss, first → last step", f"{records[0]['loss']:.4f} → {records[-1]['loss']:.4f}"),
        *[("held-out loss (perplexity)", f"{loss:.4f} ({math.exp(loss):,.1f})") for loss in held_out[-1:]],
        ("tokens per step", f"{records[-1]['tokens']:,}"),
        ("seconds per step (median)", f"{seconds:.3f}"),
        ("tokens/s (median)", f"{rate:,.0f}"),
        ("MFU (median)", f"{statistics.median(mfus):.1%}" if mfus else "unknown peak (CPU)"),
        ("peak memory per worker", f"{records[-1]['peak_memory_gib']:.2f} GiB"),
    ]
    show_table(["measured", "value"], rows)


def plot_metrics(
    runs: dict[str, list[dict[str, Any]]], epoch_ends: Iterable[int] = (), vocabulary: int | None = None
) -> Figure:
    """Loss, held-out loss and gradient norm over the steps of one or several runs, {label: records}.

    Args:
        epoch_ends: steps after which to draw a dotted line.
        vocabulary: its size V; a line at ln V shows the loss of guessing.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for number, (label, records) in enumerate(runs.items()):
        # Later runs lie over earlier ones, as a thin line over a wide one: both stay visible where they agree.
        wide = len(runs) > 1 and number == 0
        style = dict(color=COLOURS[number], alpha=0.5 if wide else 1, linewidth=6 if wide else 1.5, zorder=2 + number)
        steps, nan = [record["step"] for record in records], math.nan
        for axis, name in ((left, "loss"), (right, "grad_norm")):
            axis.plot(
                steps, [nan if record[name] is None else record[name] for record in records], label=label, **style
            )
        held_out = [(record["step"], record["eval_loss"]) for record in records if record["eval_loss"] is not None]
        if held_out:
            left.plot(*zip(*held_out, strict=True), "sD"[number % 2], color=COLOURS[number], markersize=8 - 3 * number,
                      markeredgecolor="black", label=f"{label}, held out", zorder=4 + number)  # fmt: skip
    if vocabulary:
        left.axhline(math.log(vocabulary), linestyle="--", color="#555555", label=f"guessing: ln {vocabulary:,}")
    for axis, title, unit in ((left, "Loss", "nats per token"), (right, "Gradient norm before clipping", "2-norm")):
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        for end in epoch_ends:
            axis.axvline(end + 0.5, linestyle=":", color="black")
    right.set_ylim(bottom=0)
    left.legend(fontsize="small")
    plt.close(figure)  # the returned figure is displayed once, by the cell
    return figure


def show_tree(folder: Path) -> None:
    """Print a folder as a tree with the sizes of its files, all in MB, or in kB if each is smaller than 100 MB."""
    largest = max((path.stat().st_size for path in folder.rglob("*")), default=0)
    unit, name = (1e6, "MB") if largest >= 1e8 else (1e3, "kB")
    print(f"{folder.name}/")
    _print_entries(folder, "", unit, name)


def _print_entries(folder: Path, indent: str, unit: float, name: str) -> None:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for number, path in enumerate(entries, start=1):
        branch, below = ("└── ", "    ") if number == len(entries) else ("├── ", "│   ")
        size = "/" if path.is_dir() else f"  {path.stat().st_size / unit:,.1f} {name}"
        print(f"{indent}{branch}{path.name}{size}")
        if path.is_dir():
            _print_entries(path, indent + below, unit, name)
