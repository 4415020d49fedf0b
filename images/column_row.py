"""Draw `column_row.png`: an MLP on two TP ranks, W₁ column-wise and W₂ row-wise, forward and backward.

One band per rank, from left to right what it computes in the forward pass, all matrices to scale: a side of 4h is four
times as long as a side of h. Below the bands, the equations of both passes stand under the matrices they belong to, and
at the bottom is how `nn.Linear` stores the two weights.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from images.drawing import (
    INK,
    LARGE,
    MUTED,
    NORMAL,
    RANK_BANDS,
    RANK_COLOURS,
    RANK_PARTS,
    SHARED,
    WIDTH,
    arrow,
    box,
    canvas,
    ghost,
    rounded,
    text,
)

HEIGHT = 900
H, S = 64, 100  # drawn lengths of the hidden size h and of the sequence length s
BAND, BOTTOMS = 4 * H + 12, (550, 274)  # height of a rank's band, and where rank 0's and rank 1's begin
MIDDLES = tuple(bottom + BAND / 2 for bottom in BOTTOMS)
FORWARD, BACKWARD = 222, 148  # heights of the two passes' equations

# Left edges, in the order of the flow.
X, ENTRY, W1, Y, W2, PART, EXIT, Z = 92, 190, 316, 676, 1002, 1160, 1292, 1416
BAR = 52  # width of an all-reduce


def matrix(ax: Axes, left: float, middle: float, size: tuple[float, float], name: str, fill: str, ink: str) -> None:
    """Draw a matrix whose middle is at the height `middle`, with its name."""
    box(ax, left, middle - size[1] / 2, *size, fill)
    text(ax, left + size[0] / 2, middle, f"${name}$", NORMAL, ink)


def draw_rank(ax: Axes, rank: int) -> None:
    """Draw what one rank computes in the forward pass."""
    y, n, colour, half = MIDDLES[rank], rank + 1, RANK_COLOURS[rank], 2 * H
    box(ax, 20, BOTTOMS[rank], WIDTH - 40, BAND, RANK_BANDS[rank], lw=0, zorder=0)
    box(ax, 20, BOTTOMS[rank], 44, BAND, colour, lw=0, zorder=1)
    text(ax, 42, y, f"rank {rank}", LARGE, "white", rotation=90, weight="bold")
    own, other = rank * half, (1 - rank) * half
    shift = (H, -H)[rank]
    matrix(ax, X, y, (H, S), "X", SHARED, INK)
    ghost(ax, W1 + other, y - H / 2, half, H)
    matrix(ax, W1 + own, y, (half, H), f"W_{{1,{n}}}", colour, "white")
    ghost(ax, Y + other, y - S / 2, half, S)
    matrix(ax, Y + own, y, (half, S), f"Y_{n}", colour, "white")
    ghost(ax, W2, y - shift - H, H, half)
    matrix(ax, W2, y + shift, (H, half), f"W_{{2,{n}}}", colour, "white")
    matrix(ax, PART, y, (H, S), f"Z_{n}", RANK_PARTS[rank], INK)
    matrix(ax, Z, y, (H, S), "Z", SHARED, INK)
    arrow(ax, (X + H + 2, y), (ENTRY - 2, y))
    text(ax, W1 - 34, y, "×", 26)
    arrow(ax, (W1 + 4 * H + 12, y), (Y - 12, y))
    text(ax, (W1 + 4 * H + Y) / 2, y + 20, "act", NORMAL)
    text(ax, W2 - 40, y, "×", 26)
    text(ax, (W2 + H + PART) / 2, y, "=", 26)
    arrow(ax, (PART + H + 4, y), (EXIT - 2, y))
    arrow(ax, (EXIT + BAR + 2, y), (Z - 4, y))


def draw_headings(ax: Axes) -> None:
    """Name the matrices above their columns, with how they lie on the ranks."""
    for centre, name, layout in (
        (X + H / 2, "$X$  [s, h]", "on both"),
        (W1 + 2 * H, "$W_1$  [h, 4h]", "column-wise"),
        (Y + 2 * H, "$Y$  [s, 4h]", "stays split"),
        (W2 + H / 2, "$W_2$  [4h, h]", "row-wise"),
        (PART + H / 2, "[s, h]", "partial"),
        (Z + H / 2, "$Z$  [s, h]", "on both"),
    ):
        text(ax, centre, 873, name, NORMAL)
        text(ax, centre, 842, layout, NORMAL, MUTED)


def draw_bar(ax: Axes, left: float, words: str, forward: bool) -> None:
    """Draw an all-reduce across both ranks: solid in the forward pass, dashed in the backward pass."""
    fill, ink, line = (INK, "white", "-") if forward else ("white", INK, (0, (5, 3)))
    bottom, top = BOTTOMS[1] + 6, BOTTOMS[0] + BAND - 6
    rounded(ax, left, bottom, BAR, top - bottom, fill, linestyle=line, lw=2.2, zorder=3)
    text(ax, left + BAR / 2, (bottom + top) / 2, words, LARGE, ink, rotation=90, weight="bold")


def draw_passes(ax: Axes) -> None:
    """Draw both passes as arrows with their equations; a full dot is an all-reduce."""
    forward = (
        (Y + 2 * H, r"$Y_i = \mathrm{act}(X\,W_{1,i})$"),
        (PART - 20, r"$Z_i = Y_i\,W_{2,i}$"),
        (Z + H / 2 - 6, "$Z = Z_1 + Z_2$"),
    )
    backward = (
        (ENTRY + 124, "$dX = dX_1 + dX_2$"),
        (W1 + 2 * H + 110, r"$dX_i = (dY_i \odot \mathrm{act}')\,W_{1,i}^T$"),
        (Y + 2 * H + 22, "$dW_1$, $dW_2$: local"),
        (PART - 62, r"$dY_i = dZ\,W_{2,i}^T$"),
        (Z + H / 2 - 6, "$dZ$ on both"),
    )
    for name, y, ends, equations, dot in (
        ("forward", FORWARD, (170, WIDTH - 24), forward, EXIT),
        ("backward", BACKWARD, (WIDTH - 24, 184), backward, ENTRY),
    ):
        text(ax, 24, y, name, LARGE, ha="left", weight="bold")
        arrow(ax, (ends[0], y), (ends[1], y), lw=2.6)
        ax.plot([dot + BAR / 2], [y], "o", ms=15, mec=INK, mew=2.2, mfc=INK, zorder=6)
        for x, words in equations:
            text(ax, x, y + 24, words, NORMAL)


def draw_storage(ax: Axes) -> None:
    """Say how `nn.Linear` stores a weight, with the two tensors as they lie in memory."""
    first = "nn.Linear keeps a weight as [out, in]: column-wise"
    words = f"{first}\nTP halves the rows of the stored tensor, and\nrow-wise TP its columns."
    text(ax, 24, 66, words, NORMAL, ha="left", linespacing=1.3)
    for left, name, shape, size, cut in (
        (720, "$W_1$", "[4h, h]", (30, 112), (0, 1)),
        (1140, "$W_2$", "[h, 4h]", (112, 30), (1, 0)),
    ):
        text(ax, left, 66, f"{name} stored: {shape}", NORMAL, ha="left")
        for rank, colour in enumerate(RANK_COLOURS[:2]):
            width, height = size[0] / (1 + cut[0]), size[1] / (1 + cut[1])
            x, y = left + 250 + rank * cut[0] * width, 66 - size[1] / 2 + (1 - rank) * cut[1] * height
            box(ax, x, y, width, height, colour)


def draw() -> Figure:
    """Return the whole figure."""
    figure, ax = canvas(HEIGHT)
    for rank in (0, 1):
        draw_rank(ax, rank)
    draw_headings(ax)
    draw_bar(ax, ENTRY, "all-reduce, backward pass", forward=False)
    draw_bar(ax, EXIT, "all-reduce, forward pass", forward=True)
    draw_passes(ax)
    draw_storage(ax)
    return figure
