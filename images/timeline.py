"""Draw `timeline.png`: where the time of one optimizer step goes, from a profile of it.

The profile is `ci/benchmark/results/h100x2_timeline.json`, which `ci/benchmark/timeline.py` made of a trace.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from images.drawing import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    NORMAL,
    ORANGE,
    PALE,
    SKY,
    VERMILION,
    arrow,
    box,
    canvas,
    conditions,
    heading,
    results,
    text,
)

HEIGHT, PROFILE = 820, "h100x2_timeline.json"
LEFT, RIGHT, LANE = 222, 1576, 46
KINDS = {  # name in the profile → (words, colour)
    "matmul": ("matmuls", BLUE),
    "attention": ("attention", GREEN),
    "other": ("other compute", ORANGE),
    "hidden": ("communication, hidden", SKY),
    "exposed": ("communication, exposed", VERMILION),
}
COMPUTE = ("matmul", "attention", "other")


def shares(profile: dict[str, Any]) -> dict[str, float]:
    """Milliseconds that add up to the step: of what runs beside something else, the first named counts."""
    totals = profile["totals_ms"]
    return {name: totals[name] for name in (*COMPUTE, "exposed")} | {"idle": profile["idle_ms"]}


def all_reduces(layer: dict[str, Any]) -> list[tuple[float, float]]:
    """(begin, end) in ms of each all-reduce; its parts are less than a millisecond apart."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(layer["hidden"] + layer["exposed"]):
        if end - begin < 0.01:  # the loss's and the norm's, of a few numbers
            continue
        if found and begin - found[-1][1] < 1:
            found[-1] = found[-1][0], end
        else:
            found.append((begin, end))
    return found


def draw_layer(ax: Axes, top: float, name: str, layer: dict[str, Any], scale: float, notes: tuple[str, str]) -> None:
    """Draw two lanes of one decoder layer, `scale` pixels per ms, and what its two all-reduces are of."""
    heading(ax, 24, top, f"One decoder layer, {name}: {layer['ms']:.1f} ms")
    for lane, (words, kinds) in enumerate((("compute", COMPUTE), ("communication", ("hidden", "exposed")))):
        bottom = top - 84 - lane * (LANE + 8)
        text(ax, LEFT - 16, bottom + LANE / 2, words, NORMAL, ha="right")
        box(ax, LEFT, bottom, layer["ms"] * scale, LANE, PALE, lw=0, zorder=1)
        for kind in kinds:
            for begin, end in layer[kind]:
                style = {"edgecolor": "white", "lw": 0.4 if lane == 0 else 0}
                box(ax, LEFT + begin * scale, bottom, (end - begin) * scale, LANE, KINDS[kind][1], **style)
    base = top - 84 - LANE - 8
    (_, first), (second, _) = all_reduces(layer)
    text(ax, LEFT + first * scale + 10, base + LANE / 2, notes[0], 15, ha="left")
    text(ax, LEFT + second * scale - 10, base + LANE / 2, notes[1], 15, ha="right")
    for ms in range(int(layer["ms"]) + 1):
        x = LEFT + ms * scale
        ax.plot([x, x], [base - 8, base], color=MUTED, lw=1.4)
        if ms % 2 == 0:
            text(ax, x, base - 24, f"{ms}" if ms else "0 ms", 15, MUTED)


def draw_legend(ax: Axes, left: float, top: float) -> None:
    """Name the colours."""
    for line, (words, colour) in enumerate(KINDS.values()):
        box(ax, left, top - 13 - 38 * line, 26, 26, colour, lw=0)
        text(ax, left + 40, top - 38 * line, words, NORMAL, ha="left")


def draw_step(ax: Axes, bottom: float, profile: dict[str, Any]) -> None:
    """Draw the whole step as one bar, each part with its milliseconds."""
    left, window = 24, profile["window_ms"]
    scale = (RIGHT - left) / window
    heading(ax, 24, bottom + 112, f"The whole step: {window:,.0f} ms")
    for name, ms in shares(profile).items():
        words, colour = KINDS.get(name, ("idle", PALE))
        box(ax, left, bottom, ms * scale, 64, colour, lw=1)
        middle = left + ms * scale / 2
        if name in COMPUTE:
            ink = INK if name == "other" else "white"
            text(ax, middle, bottom + 33, f"{words}\n{ms:,.0f} ms", NORMAL, ink, weight="bold", linespacing=1.15)
        elif name == "exposed":
            arrow(ax, (middle, bottom - 24), (middle, bottom - 3))
            hidden = profile["totals_ms"]["hidden"]
            note = f"exposed communication {ms:.0f} ms ({hidden:.0f} ms more are hidden)"
            text(ax, RIGHT, bottom - 46, note, NORMAL, ha="right")
        else:
            text(ax, RIGHT, bottom + 88, f"idle {ms:.0f} ms", NORMAL, ha="right")
        left += ms * scale


def draw() -> Figure:
    """Return the whole figure."""
    profile = results(PROFILE)
    figure, ax = canvas(HEIGHT)
    scale = (RIGHT - LEFT) / max(profile[name]["ms"] for name in ("forward", "backward"))
    draw_legend(ax, 1180, HEIGHT - 40)
    draw_layer(ax, HEIGHT - 36, "forward", profile["forward"], scale, ("after attention", "after the MLP"))
    notes = "gradient of attention's input", "gradient of the MLP's input"
    draw_layer(ax, HEIGHT - 282, "backward", profile["backward"], scale, notes)
    draw_step(ax, 138, profile)
    text(ax, 24, 32, conditions(profile, profile["settings"]), 15, MUTED, ha="left")
    return figure
