"""What the figures share: a canvas that is measured in pixels, the colours, the shapes, and how a picture is saved.

A figure is a module of this folder with a function `draw()`, and a PNG of the same name. A picture is the same, byte
for byte, under the same versions of matplotlib and Pillow.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

WIDTH, HIGHEST, DPI = 1600, 900, 100  # pixels: all figures are as wide, and none is taller than a screen

# Okabe and Ito's palette, safe for colour-blind readers; blue and vermilion also differ in lightness.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW = "#E69F00", "#56B4E9", "#F0E442"
RANK_COLOURS = (BLUE, VERMILION, GREEN, PURPLE)
RANK_BANDS = ("#EDF5FA", "#FDF2EA", "#E9F6F2", "#FAF1F6")  # the same, pale, behind what a rank has
RANK_PARTS = ("#C4DFEF", "#F8D5BC")  # the same, for partial results
SHARED, PALE, INK, MUTED = "#D9D9D9", "#F2F2F2", "#222222", "#555555"

# Points; at 100 dpi 15 of them are 21 pixels, and no text is smaller.
SMALL, NORMAL, LARGE, HEADING = 15, 17, 20, 23


RESULTS = Path(__file__).resolve().parents[1] / "ci/benchmark/results"


def results(name: str) -> dict[str, Any]:
    """What the benchmark has measured, from a file in `RESULTS`."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def conditions(report: dict[str, Any], settings: dict[str, Any]) -> str:
    """A line that says of what a result is: the model, the grid, the GPUs, the batch and the day."""
    gpu = report["gpu"].removeprefix("NVIDIA ").split()[0]
    batch = f"{settings['accumulation']} micro-batches of {settings['micro_batch']} × {settings['seq']:,} tokens"
    grid = f"tp {settings['tp']} × dp {settings['dp']} on {report['gpus']} {gpu}"
    return f"{report['shape'].title()}'s shape, {report['layers']} layers, {grid}, {batch}, {report['date'][:10]}"


def canvas(height: int) -> tuple[Figure, Axes]:
    """A white figure of `WIDTH` × `height` pixels, and axes whose units are pixels with y upwards."""
    inches = (WIDTH / DPI, height / DPI + 1e-6)  # rounded down to pixels
    figure = Figure(figsize=inches, dpi=DPI, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def text(ax: Axes, x: float, y: float, words: str, size: float = NORMAL, colour: str = INK, **style: Any) -> None:
    """Write `words` centred on (x, y) unless `style` says otherwise."""
    ax.text(x, y, words, **{"fontsize": size, "color": colour, "ha": "center", "va": "center", "zorder": 6, **style})


def heading(ax: Axes, x: float, y: float, words: str, **style: Any) -> None:
    """Write a bold heading that begins at x."""
    text(ax, x, y, words, HEADING, **{"ha": "left", "weight": "bold", **style})


def box(ax: Axes, left: float, bottom: float, width: float, height: float, fill: str, **style: Any) -> None:
    """Draw a rectangle with a thin outline unless `style` says otherwise."""
    style = {"facecolor": fill, "edgecolor": INK, "lw": 1.6, "zorder": 3, **style}
    ax.add_patch(Rectangle((left, bottom), width, height, **style))


def rounded(ax: Axes, left: float, bottom: float, width: float, height: float, fill: str, **style: Any) -> None:
    """Draw a rectangle with round corners."""
    style = {"facecolor": fill, "edgecolor": INK, "lw": 2, "zorder": 1, **style}
    ax.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=10", **style))


def ghost(ax: Axes, left: float, bottom: float, width: float, height: float, name: str = "") -> None:
    """Outline what a different rank holds."""
    box(ax, left, bottom, width, height, "white", edgecolor=MUTED, lw=1.4, linestyle=(0, (4, 3)), zorder=2)
    text(ax, left + width / 2, bottom + height / 2, name, NORMAL, MUTED)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    """Draw a straight arrow; `style` is matplotlib's `arrowprops`."""
    head = "head_width=0.35,head_length=0.7"
    props = {"arrowstyle": f"-|>,{head}", "color": INK, "lw": 2.2, "shrinkA": 0, "shrinkB": 0, **style}
    if props["arrowstyle"] == "<|-|>":
        props["arrowstyle"] += f",{head}"
    ax.annotate("", xy=end, xytext=start, arrowprops=props, zorder=5)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Draw with matplotlib's own settings, whatever the reader's are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["mathtext.fontset"] = "dejavusans"
        yield


def picture(draw: Callable[[], Figure]) -> Image.Image:
    """The drawn figure. A palette of 256 colours makes the file a third of the size, with no difference to the eye."""
    drawn = BytesIO()
    with settings():
        draw().savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    with Image.open(drawn) as image:
        return image.convert("RGB").quantize(256)
