"""Draw `all_reduce.png`: what an all-reduce does on 4 ranks, and how a ring of them does it in 2·(n−1) steps.

A chunk of a rank's tensor is a cell with one stripe per rank, coloured where that rank's values are in it, so that a
full cell is a finished one.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from images.drawing import INK, LARGE, MUTED, NORMAL, RANK_COLOURS, SMALL, WIDTH, arrow, box, canvas, heading
from images.drawing import text as write

HEIGHT, RANKS = 900, 4
NAMES = "abcd"
LEFTS = [130 + 238 * step + 44 * (step >= RANKS - 1) for step in range(2 * (RANKS - 1))]  # of the ring's steps
State = list[list[set[int]]]  # state[rank][chunk]: the ranks whose values are in it


def start() -> State:
    """Before: each rank has its own tensor."""
    return [[{rank} for _ in range(RANKS)] for rank in range(RANKS)]


def ring() -> list[tuple[State, list[int]]]:
    """After each step: (state, the chunk that each rank has just received from the rank before it)."""
    state, found = start(), []
    for step in range(2 * (RANKS - 1)):
        gather = step >= RANKS - 1
        shift = step - RANKS if gather else step
        sent = [(rank - shift) % RANKS for rank in range(RANKS)]
        new = [[set(chunk) for chunk in tensor] for tensor in state]
        for rank, chunk in enumerate(sent):
            new[(rank + 1) % RANKS][chunk] |= state[rank][chunk]
        state = new
        found.append((state, [sent[rank - 1] for rank in range(RANKS)]))
    return found


def cell(ax: Axes, left: float, bottom: float, size: tuple[float, float], ranks: set[int], received: bool) -> None:
    """Draw a chunk as stripes, with a heavy outline if it has just been received."""
    width, height = size[0] / RANKS, size[1]
    for rank in range(RANKS):
        fill = RANK_COLOURS[rank] if rank in ranks else "white"
        box(ax, left + rank * width, bottom, width, height, fill, lw=0)
    box(ax, left, bottom, *size, "none", lw=4 if received else 1.3, zorder=5 if received else 4)


def draw_what(ax: Axes) -> None:
    """Draw the tensors before and after, with their names."""
    width, height, stripes, pitch, top = 92, 46, 16, 54, 792
    heading(ax, 24, 864, "What an all-reduce does")
    for left, words, state in ((130, "before", start()), (640, "after", ring()[-1][0])):
        write(ax, left + 2 * width, top + 20, words, NORMAL, MUTED)
        for rank, tensor in enumerate(state):
            bottom = top - height - rank * pitch
            for chunk, ranks in enumerate(tensor):
                x = left + chunk * width
                name = f"${NAMES[chunk]}$" if len(ranks) == RANKS else f"${NAMES[chunk]}_{rank}$"
                box(ax, x, bottom, width, height, "white", lw=1.3)
                cell(ax, x, bottom, (width, stripes), ranks, False)
                write(ax, x + width / 2, bottom + stripes + 15, name, NORMAL)
    middle = top - 2 * pitch + 4
    arrow(ax, (518, middle), (620, middle), lw=3)
    draw_ranks(ax, top - height / 2, pitch)
    lines = "Each rank has a tensor of its own,\ndrawn here as 4 chunks. Afterwards\nall ranks have the same tensor:"
    write(ax, 1056, top - 10, lines, NORMAL, ha="left", va="top", linespacing=1.5)
    write(ax, 1056, top - 150, "$a = a_0 + a_1 + a_2 + a_3$", LARGE, ha="left")
    write(ax, 1056, top - 194, "and so for $b$, $c$ and $d$.", NORMAL, ha="left")


def draw_ranks(ax: Axes, first: float, pitch: float) -> None:
    """Name the rows at the left."""
    for rank, colour in enumerate(RANK_COLOURS):
        box(ax, 24, first - 9 - rank * pitch, 12, 18, colour, lw=0)
        write(ax, 44, first - rank * pitch, f"rank {rank}", SMALL, ha="left")


def draw_ring(ax: Axes) -> None:
    """Draw the six steps, each with the chunks that travel down the ring."""
    size, pitch, top = (47, 38), 60, 428
    heading(ax, 24, 540, "How a ring does it")
    words = "in each step, each rank sends one chunk to the rank below it (rank 3 to rank 0)"
    write(ax, 388, 539, words, NORMAL, ha="left")
    draw_ranks(ax, top - size[1] / 2, pitch)
    for step, (state, received) in enumerate(ring()):
        left = LEFTS[step]
        write(ax, left + 2 * size[0], top + 46, f"step {step + 1}", NORMAL, MUTED)
        for rank, tensor in enumerate(state):
            bottom = top - size[1] - rank * pitch
            for chunk, ranks in enumerate(tensor):
                cell(ax, left + chunk * size[0], bottom, size, ranks, chunk == received[rank])
            x = left + (received[rank] + 0.5) * size[0]
            arrow(ax, (x, bottom + pitch - 1), (x, bottom + size[1] + 2), lw=2.6)
            if rank == 0:  # what it receives leaves rank 3 at the bottom
                end = top - size[1] - (RANKS - 1) * pitch
                arrow(ax, (x, end), (x, end - 22), lw=2.6)
        write(ax, left + 2 * size[0], 152, "sends ¼", NORMAL)


def draw_count(ax: Axes) -> None:
    """Draw the two phases under the steps, and how much each rank has sent."""
    phases = ("reduce-scatter", "each rank finishes one chunk"), ("all-gather", "finished chunks travel on")
    for first, (name, words) in zip((0, RANKS - 1), phases, strict=True):
        left, right = LEFTS[first], LEFTS[first + RANKS - 2] + 188
        ax.plot([left, left, right, right], [130, 120, 120, 130], color=INK, lw=2)
        write(ax, (left + right) / 2, 98, f"{name}: {words}", NORMAL, weight="bold")
        write(ax, (left + right) / 2, 68, "n − 1 = 3 steps of ¼ of the tensor", NORMAL)
    write(ax, 24, 26, "Sent by each rank: 2 (n − 1) / n of the tensor, here 6 × ¼", LARGE, ha="left", weight="bold")
    values = ", ".join(f"{2 * (n - 1) / n:g} for {n}" for n in (4, 8))
    write(ax, WIDTH - 24, 26, f"(1 for n = 2, {values}; never 2)", NORMAL, ha="right")


def draw() -> Figure:
    """Return the whole figure."""
    figure, ax = canvas(HEIGHT)
    draw_what(ax)
    draw_ring(ax)
    draw_count(ax)
    return figure
