"""Draw `optimizations.png`: what each optimization takes off a step, one added to the ones before.

The measurements are in `ci/benchmark/results/h100x2_ladder.json`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from matplotlib.figure import Figure

from images.drawing import (
    BLUE,
    GREEN,
    INK,
    LARGE,
    MUTED,
    SHARED,
    VERMILION,
    box,
    canvas,
    conditions,
    heading,
    results,
    text,
)
from tp2d_helpers.config import OPTIMIZATIONS

HEIGHT, LADDER = 690, "h100x2_ladder.json"
LEFT, FULL, ROW, BAR = (
    300,
    1040,
    84,
    50,
)  # pixels: where bars begin, the longest, from one to the next, and their height


class Rung(NamedTuple):
    """A set of optimizations: what it adds to the one before, and the step's time."""

    added: str
    ms: float
    settings: dict[str, Any]


def ladder(report: dict[str, Any]) -> list[Rung]:
    """The rungs in the order of the report.

    Raises:
        ValueError: if a rung is not the one before it with one optimization more.
    """
    found, before = [], None
    for entry in report["candidates"]:
        if entry["name"] != "ours":
            continue
        names = entry["settings"]["optimizations"]
        known = {"none": set(), "auto": set(OPTIMIZATIONS) - {"cuda_graph"}}  # graphs: at tp_size 1 alone
        now = known.get(names, set(names.split(",")))
        added = now - before if before is not None else now
        if len(added) != (before is not None) or not now >= (before or set()):
            raise ValueError(f"{names!r} is not {sorted(before or [])} and one optimization more")
        found.append(Rung("".join(added), entry["step_ms"], entry["settings"]))
        before = now
    return found


def draw() -> Figure:
    """Return the whole figure."""
    report = results(LADDER)
    rungs = ladder(report)
    figure, ax = canvas(HEIGHT)
    heading(ax, 24, HEIGHT - 40, "Milliseconds per step, one optimization added after the other")
    scale, top = FULL / max(rung.ms for rung in rungs), HEIGHT - 90
    for row, rung in enumerate(rungs):
        bottom, width = top - row * ROW - BAR, rung.ms * scale
        first, last = row == 0, row == len(rungs) - 1
        box(ax, LEFT, bottom, width, BAR, SHARED if first else BLUE, lw=0)
        name = f"+ {rung.added}" if rung.added else "none"
        text(ax, LEFT - 16, bottom + BAR / 2, name, LARGE, ha="right", weight="bold" if first or last else "normal")
        text(ax, LEFT + 16, bottom + BAR / 2, f"{rung.ms:,.0f} ms", LARGE, INK if first else "white", ha="left")
        if not first:
            change = rung.ms - rungs[row - 1].ms
            colour = GREEN if change < 0 else VERMILION
            start = LEFT + min(rung.ms, rungs[row - 1].ms) * scale
            box(ax, start, bottom, abs(change) * scale, BAR, "none" if change < 0 else colour, edgecolor=colour, lw=2)
            text(
                ax, LEFT + FULL + 24, bottom + BAR / 2, f"{change:+,.0f} ms".replace("-", "−"), LARGE, colour, ha="left"
            )
    whole, rest = rungs[0].ms, rungs[-1].ms
    words = f"all together: −{whole - rest:,.0f} ms, {whole / rest:.2f} times as fast"
    text(ax, LEFT, 78, words, LARGE, ha="left", weight="bold")
    text(ax, 24, 30, conditions(report, rungs[0].settings), 15, MUTED, ha="left")
    return figure
