"""Draw `grid.png`: four GPUs as a 2 × 2 grid; a row is a TP group, a column a DP group."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from images.drawing import (
    GREEN,
    HEADING,
    LARGE,
    MUTED,
    NORMAL,
    PURPLE,
    RANK_BANDS,
    RANK_COLOURS,
    SMALL,
    arrow,
    box,
    canvas,
    ghost,
    rounded,
    text,
)

HEIGHT = 880
GPU_WIDTH, GPU_HEIGHT = 420, 216
LEFTS, BOTTOMS = (440, 1130), (508, 130)  # of the GPUs' columns (TP ranks) and rows (DP ranks)
SAMPLES = (("samples 0, 1", GREEN), ("samples 2, 3", PURPLE))  # of each DP rank


def draw_gpu(ax: Axes, dp_rank: int, tp_rank: int) -> None:
    """Draw a GPU: its place in the grid and the half of each weight that it holds."""
    left, bottom, colour = LEFTS[tp_rank], BOTTOMS[dp_rank], RANK_COLOURS[tp_rank]
    rounded(ax, left, bottom, GPU_WIDTH, GPU_HEIGHT, RANK_BANDS[tp_rank], edgecolor=colour, lw=3)
    middle = left + GPU_WIDTH / 2
    text(ax, middle, bottom + GPU_HEIGHT - 32, f"world rank {2 * dp_rank + tp_rank}", LARGE, weight="bold")
    text(ax, middle, bottom + GPU_HEIGHT - 66, f"tp rank {tp_rank}, dp rank {dp_rank}", SMALL, MUTED)
    first, second, base = left + 62, left + 282, bottom + 22
    for half in (0, 1):
        shapes = (first + 70 * half, base + 15, 70, 70), (second, base + 50 * (1 - half), 76, 50)
        for name, shape in zip(("W_1", "W_2"), shapes, strict=True):
            if half == tp_rank:
                box(ax, *shape, colour)
                text(ax, shape[0] + shape[2] / 2, shape[1] + shape[3] / 2, f"${name}$", LARGE, "white")
            else:
                ghost(ax, *shape)


def draw_row(ax: Axes, dp_rank: int) -> None:
    """Draw a TP group: its samples, and what its ranks all-reduce."""
    middle, (name, colour) = BOTTOMS[dp_rank] + GPU_HEIGHT / 2, SAMPLES[dp_rank]
    ranks = f"{{{2 * dp_rank}, {2 * dp_rank + 1}}}"
    text(ax, 28, middle + 92, f"TP group {ranks}", LARGE, ha="left", weight="bold")
    text(ax, 28, middle + 58, "same samples,\ndifferent shards", NORMAL, MUTED, ha="left", va="top", linespacing=1.35)
    for sheet in (2, 1, 0):
        box(ax, 40 + 9 * sheet, middle - 92 + 9 * sheet, 196, 54, colour if sheet == 0 else "white", edgecolor=colour)
    text(ax, 138, middle - 65, name, NORMAL, "white", weight="bold")
    arrow(ax, (266, middle - 65), (LEFTS[0] - 10, middle - 65), color=colour, lw=4)
    start, end = LEFTS[0] + GPU_WIDTH + 8, LEFTS[1] - 8
    arrow(ax, (start, middle), (end, middle), arrowstyle="<|-|>", lw=4)
    centre = (start + end) / 2
    text(ax, centre, middle + 14, "all-reduce of\nactivations", NORMAL, va="bottom", weight="bold", linespacing=1.3)
    text(ax, centre, middle - 14, "several times\nin every layer", NORMAL, va="top", linespacing=1.3)


def draw_column(ax: Axes, tp_rank: int) -> None:
    """Draw a DP group: its heading, and what its ranks all-reduce."""
    centre = LEFTS[tp_rank] + GPU_WIDTH / 2
    text(ax, centre, 832, f"DP group {{{tp_rank}, {tp_rank + 2}}}", LARGE, weight="bold")
    text(ax, centre, 796, "same shard, different samples", NORMAL, MUTED)
    bottom, top = BOTTOMS[1] + GPU_HEIGHT + 8, BOTTOMS[0] - 8
    arrow(ax, (centre, bottom), (centre, top), arrowstyle="<|-|>", lw=4)
    words = "all-reduce of\ngradients"
    text(ax, centre - 20, (bottom + top) / 2, words, NORMAL, ha="right", weight="bold", linespacing=1.3)
    text(ax, centre + 20, (bottom + top) / 2, "once per\noptimizer step", NORMAL, ha="left", linespacing=1.3)


def draw() -> Figure:
    """Return the whole figure."""
    figure, ax = canvas(HEIGHT)
    text(ax, 28, 832, "tp_size 2 × dp_size 2", HEADING, ha="left", weight="bold")
    for rank in (0, 1):
        draw_row(ax, rank)
        draw_column(ax, rank)
    for dp_rank in (0, 1):
        for tp_rank in (0, 1):
            draw_gpu(ax, dp_rank, tp_rank)
    box(ax, 440, 44, 34, 34, RANK_COLOURS[0])
    text(ax, 488, 61, "half of a weight that the GPU holds", NORMAL, ha="left")
    ghost(ax, 1000, 44, 34, 34)
    text(ax, 1048, 61, "half that its TP peer holds", NORMAL, ha="left")
    return figure
