"""Draw `tp_partition.png`: tensor parallelism of a two-layer MLP on two ranks, one row of the figure per rank.

From left to right: the replicated input X meets the columns of A that the rank holds and gives the rank's part of Y,
activation included, with no communication. That part meets the rows of B that the rank holds and gives a partial sum of
Z. One all-reduce adds the partial sums (forward pass), and one more adds the gradients of X (backward pass). Blocks are
drawn to scale: a side of 4h is four times as long as a side of h.

Run it from the root of the repository; it writes the picture next to this file, the same bytes every time under the
same versions of matplotlib and Pillow:

    python images/tp_partition.py
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

# All lengths are pixels of the picture; y grows upwards.
WIDTH, HEIGHT, DPI = 1600, 1010, 100
H, S = 84, 130  # drawn lengths of the hidden size h and of the sequence length s
BAR = 56  # width of an all-reduce bar
ROW_HEIGHT = 4 * H + 28
ROW_BOTTOM = (556, 180)  # rank 0 above, rank 1 below
ROW_MIDDLE = tuple(bottom + ROW_HEIGHT / 2 for bottom in ROW_BOTTOM)
FORWARD_Y, BACKWARD_Y, LEGEND_Y = 126, 72, 24

# Left edges, in the order of the flow.
X_LEFT = 86
F_LEFT = X_LEFT + H + 30
A_LEFT = F_LEFT + BAR + 52
Y_LEFT = A_LEFT + 4 * H + 84
B_LEFT = Y_LEFT + 4 * H + 50
PARTIAL_LEFT = B_LEFT + H + 54
G_LEFT = PARTIAL_LEFT + H + 40
Z_LEFT = G_LEFT + BAR + 34

# Okabe and Ito's palette, safe for colour-blind readers; blue and vermilion also differ in lightness.
RANK_COLOUR = ("#0072B2", "#D55E00")
RANK_BAND = ("#EDF5FA", "#FDF2EA")
PARTIAL_FILL = ("#C4DFEF", "#F8D5BC")
SHARED, INK, MUTED = "#D9D9D9", "#222222", "#555555"
NAME_SIZE, SHAPE_SIZE, TEXT_SIZE, SIGN_SIZE = 24, 15, 16, 26


def text(ax: Axes, x: float, y: float, words: str, size: float = TEXT_SIZE, colour: str = INK, **style: Any) -> None:
    """Write `words` centred on (x, y) unless `style` says otherwise."""
    ax.text(x, y, words, **{"fontsize": size, "color": colour, "ha": "center", "va": "center", "zorder": 4, **style})


def block(
    ax: Axes, left: float, middle: float, size: tuple[float, float], label: tuple[str, str], fill: str, ink: str = INK
) -> None:
    """Draw one matrix this rank holds, `size` as (width, height), with its name and shape inside."""
    width, height = size
    ax.add_patch(Rectangle((left, middle - height / 2), width, height, facecolor=fill, edgecolor=INK, lw=1.6, zorder=3))
    text(ax, left + width / 2, middle + 15, label[0], NAME_SIZE, ink)
    text(ax, left + width / 2, middle - 19, label[1], SHAPE_SIZE, ink)


def ghost(ax: Axes, left: float, middle: float, size: tuple[float, float], name: str = "") -> None:
    """Outline the half of a matrix that the other rank holds."""
    width, height = size
    style = {"facecolor": "white", "edgecolor": MUTED, "lw": 1.4, "linestyle": (0, (4, 3)), "zorder": 2}
    ax.add_patch(Rectangle((left, middle - height / 2), width, height, **style))
    text(ax, left + width / 2, middle, name, 20, MUTED)


def arrow(ax: Axes, start: float, end: float, y: float, width: float = 2.2) -> None:
    """Draw a horizontal arrow from `start` to `end`."""
    style = {"arrowstyle": "-|>,head_width=0.35,head_length=0.7", "color": INK, "lw": width, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=(end, y), xytext=(start, y), arrowprops=style, zorder=3)


def draw_band(ax: Axes, rank: int) -> None:
    """Draw the background of a rank's row and its name at the left."""
    bottom = ROW_BOTTOM[rank]
    ax.add_patch(Rectangle((16, bottom), WIDTH - 32, ROW_HEIGHT, facecolor=RANK_BAND[rank], lw=0, zorder=0))
    ax.add_patch(Rectangle((16, bottom), 46, ROW_HEIGHT, facecolor=RANK_COLOUR[rank], lw=0, zorder=1))
    text(ax, 39, ROW_MIDDLE[rank], f"rank {rank}", 22, "white", rotation=90, weight="bold")


def draw_row(ax: Axes, rank: int) -> None:
    """Draw what one rank computes: X, its half of A, of Y and of B, its partial sum, and Z."""
    y, n, colour, half = ROW_MIDDLE[rank], rank + 1, RANK_COLOUR[rank], 2 * H
    own, other = rank * half, (1 - rank) * half
    shift = (H, -H)[rank]
    block(ax, X_LEFT, y, (H, S), ("$X$", "[s, h]"), SHARED)
    block(ax, A_LEFT + own, y, (half, H), (f"$A_{n}$", "[h, 2h]"), colour, "white")
    ghost(ax, A_LEFT + other, y, (half, H), f"$A_{3 - n}$")
    block(ax, Y_LEFT + own, y, (half, S), (f"$Y_{n}$", "[s, 2h]"), colour, "white")
    ghost(ax, Y_LEFT + other, y, (half, S), f"$Y_{3 - n}$")
    block(ax, B_LEFT, y + shift, (H, half), (f"$B_{n}$", "[2h, h]"), colour, "white")
    ghost(ax, B_LEFT, y - shift, (H, half), f"$B_{3 - n}$")
    block(ax, PARTIAL_LEFT, y, (H, S), (f"$Z_{n}$", "[s, h]"), PARTIAL_FILL[rank])
    block(ax, Z_LEFT, y, (H, S), ("$Z$", "[s, h]"), SHARED)
    text(ax, Y_LEFT + half, y - S / 2 - 30, rf"$Y_{n}$ = act($X\,A_{n}$), local", 18)
    text(ax, PARTIAL_LEFT + H / 2, y - S / 2 - 42, f"partial\n$Z_{n} = Y_{n}\\,B_{n}$")
    draw_signs(ax, y)


def draw_signs(ax: Axes, y: float) -> None:
    """Draw the operators and arrows between the matrices of a row."""
    arrow(ax, X_LEFT + H + 3, F_LEFT - 2, y)
    text(ax, A_LEFT - 26, y, "×", SIGN_SIZE)
    arrow(ax, A_LEFT + 4 * H + 10, Y_LEFT - 10, y)
    text(ax, Y_LEFT - 42, y + 22, "act", 18)
    text(ax, B_LEFT - 25, y, "×", SIGN_SIZE)
    text(ax, PARTIAL_LEFT - 27, y, "=", SIGN_SIZE)
    arrow(ax, PARTIAL_LEFT + H + 3, G_LEFT - 2, y)
    arrow(ax, G_LEFT + BAR + 2, Z_LEFT - 3, y)


def draw_headings(ax: Axes) -> None:
    """Name the whole matrices above the columns, with how each is laid over the ranks."""
    for centre, name, layout in (
        (X_LEFT + H / 2, "$X$  [s, h]", "replicated"),
        (A_LEFT + 2 * H, "$A$ = [$A_1$ | $A_2$]  [h, 4h]", "split by columns"),
        (Y_LEFT + 2 * H, "$Y$  [s, 4h]", "stays split, never gathered"),
        (B_LEFT + H / 2, "$B$ = [$B_1$; $B_2$]  [4h, h]", "split by rows"),
        (Z_LEFT + H / 2, "$Z$  [s, h]", "replicated"),
    ):
        text(ax, centre, 972, name, 18, va="baseline")
        text(ax, centre, 938, layout, TEXT_SIZE, MUTED, va="baseline")


def draw_bar(ax: Axes, left: float, words: str, solid: bool) -> None:
    """Draw an all-reduce as a bar across both ranks: solid in the forward pass, dashed in the backward pass."""
    bottom, top = ROW_BOTTOM[1] + 10, ROW_BOTTOM[0] + ROW_HEIGHT - 10
    fill, ink, line = (INK, "white", "-") if solid else ("white", INK, (0, (5, 3)))
    style = {"boxstyle": "round,pad=0,rounding_size=10", "facecolor": fill, "edgecolor": INK, "lw": 2.2}
    ax.add_patch(FancyBboxPatch((left, bottom), BAR, top - bottom, linestyle=line, zorder=3, **style))
    text(ax, left + BAR / 2, (bottom + top) / 2, words, 21, ink, rotation=90, weight="bold")


def draw_lanes(ax: Axes) -> None:
    """Draw the two passes below the rows; a full dot is an all-reduce, an empty one no communication."""
    f, g = F_LEFT + BAR / 2, G_LEFT + BAR / 2
    sides = ({"x": f + 24, "ha": "left"}, {"x": g - 24, "ha": "right"})
    passes = (
        ("forward", FORWARD_Y, (194, WIDTH - 20), ("$X$ passes unchanged", "all-reduce: $Z = Z_1 + Z_2$"), g),
        ("backward", BACKWARD_Y, (WIDTH - 20, 194), ("all-reduce: $dX = dX_1 + dX_2$", "$dZ$ passes unchanged"), f),
    )
    for name, y, (start, end), notes, reduced in passes:
        text(ax, 16, y - 8, name, 19, weight="bold", ha="left", va="baseline")
        arrow(ax, start, end, y, 2.6)
        for x, note, side in zip((f, g), notes, sides, strict=True):
            ax.plot([x], [y], "o", ms=15, mec=INK, mew=2.2, mfc=INK if x == reduced else "white", zorder=5)
            text(ax, y=y + 14, words=note, size=17, va="baseline", **side)


def draw_legend(ax: Axes) -> None:
    """Explain the fills and the short names."""
    for left, fill, line, words in (
        (16, SHARED, "-", "same on both ranks"),
        (350, "white", (0, (4, 3)), "held by the other rank"),
    ):
        ax.add_patch(Rectangle((left, LEGEND_Y - 12), 36, 24, facecolor=fill, edgecolor=INK, lw=1.4, linestyle=line))
        text(ax, left + 48, LEGEND_Y - 8, words, ha="left", va="baseline")
    text(ax, 742, LEGEND_Y - 8, "act: elementwise activation", ha="left", va="baseline")
    text(ax, WIDTH - 20, LEGEND_Y - 8, "$dX$, $dZ$: gradients of the loss", ha="right", va="baseline")


def draw() -> Figure:
    """Return the whole figure."""
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    for rank in (0, 1):
        draw_band(ax, rank)
        draw_row(ax, rank)
    draw_bar(ax, F_LEFT, "all-reduce in the backward pass", solid=False)
    draw_bar(ax, G_LEFT, "all-reduce in the forward pass", solid=True)
    draw_headings(ax)
    draw_lanes(ax)
    draw_legend(ax)
    return figure


def main() -> None:
    """Write the picture next to this file, whatever the reader's own matplotlib settings are.

    A palette of 256 colours makes the file a third of the size, with no difference to the eye.
    """
    drawn = BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["mathtext.fontset"] = "dejavusans"
        draw().savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(256).save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
