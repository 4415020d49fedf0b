"""Draw `attention_heads.png`: grouped-query attention on two TP ranks, cut between heads.

From top to bottom what a rank computes: query heads and the key-value head that each pair of them shares, attention
within each head, the row-wise output matrix, one all-reduce. At the right: a tp_size larger than the number of
key-value heads, whose ranks share them.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from images.drawing import (
    INK,
    LARGE,
    MUTED,
    NORMAL,
    PALE,
    RANK_BANDS,
    RANK_COLOURS,
    RANK_PARTS,
    SHARED,
    VERMILION,
    arrow,
    box,
    canvas,
    rounded,
    text,
)

HEIGHT = 890
QUERY_HEADS, KEY_VALUE_HEADS, TP = 8, 4, 2
SHARING = QUERY_HEADS // KEY_VALUE_HEADS  # query heads per key-value head
PER_RANK = QUERY_HEADS // TP
BAND, LEFTS = 428, (246, 690)  # width of a rank's band, and where each begins
HEAD, PITCH, TALL = 78, 104, 48  # a query head's width, from one to the next, and a head's height
INPUT, QUERY, KEY_VALUE, ATTENTION, OUTPUT, PARTIAL, REDUCE, RESULT = 770, 672, 594, 478, 374, 278, 178, 66
INSET = 1146  # left edge


def centre(head: int) -> float:
    """Where a query head is drawn."""
    rank, place = divmod(head, PER_RANK)
    return LEFTS[rank] + BAND / 2 + (place - (PER_RANK - 1) / 2) * PITCH


def labelled(ax: Axes, x: float, y: float, size: tuple[float, float], words: str, fill: str, ink: str = INK) -> None:
    """Draw a box centred on (x, y) with words in it."""
    box(ax, x - size[0] / 2, y - size[1] / 2, *size, fill)
    text(ax, x, y, words, NORMAL, ink)


def draw_group(ax: Axes, kv: int) -> None:
    """Draw a key-value head, the query heads that share it, and the attention of each."""
    colour = RANK_COLOURS[kv * TP // KEY_VALUE_HEADS]
    heads = range(kv * SHARING, (kv + 1) * SHARING)
    middle = sum(map(centre, heads)) / SHARING
    labelled(ax, middle, KEY_VALUE, (88, TALL), f"$K_{kv}\\,V_{kv}$", "white")
    for head in heads:
        x, above, top = centre(head), KEY_VALUE - TALL / 2, ATTENTION + TALL / 2 + 3
        labelled(ax, x, QUERY, (HEAD, TALL), f"$Q_{head}$", colour, "white")
        arrow(ax, (x, QUERY - TALL / 2), (x, top))
        arrow(ax, (middle + (x - middle) * 0.4, above), (x + (middle - x) * 0.36, top))
        labelled(ax, x, ATTENTION, (HEAD, TALL), f"$O_{head}$", colour, "white")
        arrow(ax, (x, ATTENTION - TALL / 2), (x, OUTPUT + TALL / 2 + 3))


def draw_rank(ax: Axes, rank: int) -> None:
    """Draw a rank's band and what is not a head: the input, its rows of the output matrix, its partial result."""
    left, middle, colour = LEFTS[rank], LEFTS[rank] + BAND / 2, RANK_COLOURS[rank]
    box(ax, left, PARTIAL - 42, BAND, INPUT + 96 - PARTIAL, RANK_BANDS[rank], lw=0, zorder=0)
    box(ax, left, INPUT + 54, BAND, 44, colour, lw=0, zorder=1)
    text(ax, middle, INPUT + 75, f"rank {rank}", LARGE, "white", weight="bold")
    labelled(ax, middle, INPUT, (BAND - 50, TALL), "$X$", SHARED)
    arrow(ax, (middle, INPUT - TALL / 2), (middle, QUERY + TALL / 2 + 10))
    rows = f"$W_o$, rows of heads {rank * PER_RANK}–{(rank + 1) * PER_RANK - 1}"
    labelled(ax, middle, OUTPUT, (BAND - 50, TALL), rows, colour, "white")
    arrow(ax, (middle, OUTPUT - TALL / 2), (middle, PARTIAL + TALL / 2 + 3))
    labelled(ax, middle, PARTIAL, (BAND - 50, TALL), f"$Z_{rank + 1}$", RANK_PARTS[rank])
    arrow(ax, (middle, PARTIAL - TALL / 2), (middle, REDUCE + 30))
    arrow(ax, (middle, REDUCE - 26), (middle, RESULT + TALL / 2 + 3))
    labelled(ax, middle, RESULT, (BAND - 50, TALL), "$Z$", SHARED)


def draw_labels(ax: Axes) -> None:
    """Say at the left what each row is, and draw what lies across the ranks."""
    for y, words in (
        (INPUT, "on both ranks"),
        (QUERY, "8 query heads\n($W_q$ by columns)"),
        (KEY_VALUE, "4 key-value heads,\n2 query heads each"),
        (ATTENTION, "attention: softmax\nstays within a head"),
        (OUTPUT, "$W_o$ by rows"),
        (PARTIAL, "partial results"),
        (RESULT, "on both ranks"),
    ):
        text(ax, 24, y, words, 15, ha="left", linespacing=1.25)
    left, right = LEFTS[0], LEFTS[1] + BAND
    rounded(ax, left, REDUCE - 26, right - left, 52, INK, zorder=3)
    text(ax, (left + right) / 2, REDUCE, "all-reduce: $Z = Z_1 + Z_2$", LARGE, "white", weight="bold")


def draw_inset(ax: Axes) -> None:
    """Draw what two ranks share at tp_size 8."""
    rounded(ax, INSET, 236, 430, 632, PALE, edgecolor=MUTED, lw=1.4)
    middle = INSET + 215
    text(ax, middle, 832, "And tp_size 8?", LARGE, weight="bold")
    for kv in range(KEY_VALUE_HEADS):
        x = INSET + 62 + kv * 102
        for side in (-1, 1):
            box(ax, x + side * 23 - 20, 700, 40, TALL, "white")
            text(ax, x + side * 23, 724, f"$Q_{SHARING * kv + (side > 0)}$", 15)
            arrow(ax, (x + side * 23, 700), (x + side * 23, 662))
            box(ax, x + side * 23 - 20, 617, 40, 42, "white")
        text(ax, x, 588, f"$K_{kv}\\,V_{kv}$", 15)
        ax.plot([x, x], [610, 764], color=VERMILION, lw=3, ls=(0, (3, 2)), zorder=7)
    words = "Each rank has one query head.\nTwo ranks hold a copy of each\n"
    words += "key-value head, and sum its\ngradient between them."
    text(ax, INSET + 28, 548, words, NORMAL, ha="left", va="top", linespacing=1.4)
    rule = "So tp_size must divide\nthe 8 query heads, and the\n4 key-value heads or be"
    rule += " a\nmultiple of them."
    text(ax, INSET + 28, 376, rule, NORMAL, ha="left", va="top", linespacing=1.4, weight="bold")
    note = "Heads are independent, so the\ncut falls between heads, and no\nrank waits before the all-reduce."
    text(ax, INSET + 28, 196, note, NORMAL, ha="left", va="top", linespacing=1.4)


def draw() -> Figure:
    """Return the whole figure."""
    figure, ax = canvas(HEIGHT)
    for rank in range(TP):
        draw_rank(ax, rank)
    for kv in range(KEY_VALUE_HEADS):
        draw_group(ax, kv)
    draw_labels(ax)
    draw_inset(ax)
    return figure
