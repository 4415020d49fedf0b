"""Draw `zero.png`: what ZeRO's stages leave on each GPU of a DP group, for Qwen2-7B at tp 2 × dp 2."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from images.drawing import (
    BLUE,
    GREEN,
    INK,
    LARGE,
    MUTED,
    NORMAL,
    ORANGE,
    box,
    canvas,
    heading,
    text,
)
from tp2d_helpers.demo import SHAPES
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.planning import state_bytes

HEIGHT = 890
TP, DP = 2, 2
COLOURS = {"weights": BLUE, "gradients": ORANGE, "masters and moments": GREEN}
BASE, PER_GIB = 146, 8.4  # pixels: the bars' lower end, and their height per GiB
LEFTS, BAR, GAP = (224, 574, 924, 1274), 132, 20


class Part(NamedTuple):
    """A segment of a GPU's bar, in GiB: how tall it is without ZeRO, and how much of that the GPU holds."""

    name: str
    whole: float
    held: float


def bars(stage: int) -> list[Part]:
    """What one GPU of the grid holds at a ZeRO stage, from bottom to top."""
    parameters = ModelFacts.of_shape(SHAPES["qwen2-7b"]).shard(TP).parameters
    whole, held = (state_bytes(parameters, DP, some, gradient_width=2) for some in (0, stage))
    return [Part(name, whole[name] / 2**30, held[name] / 2**30) for name in COLOURS]


def draw_bar(ax: Axes, left: float, dp_rank: int, parts: list[Part]) -> None:
    """Draw a GPU's bar: full colour for what it holds, hatched for the share that its DP peer holds."""
    bottom = BASE
    for part in parts:
        height, held = part.whole * PER_GIB, part.held * PER_GIB
        style = {"hatch": "///", "edgecolor": COLOURS[part.name], "lw": 0, "zorder": 2}
        box(ax, left, bottom, BAR, height, "white", **style)
        own = bottom + dp_rank * (height - held)  # the first DP rank holds the lower share, the second the upper one
        box(ax, left, own, BAR, held, COLOURS[part.name], lw=0)
        box(ax, left, bottom, BAR, height, "none", zorder=4)
        ink = INK if part.name == "gradients" else "white"
        text(ax, left + BAR / 2, own + held / 2 - 1, f"{part.held:.1f}", NORMAL, ink, weight="bold")
        bottom += height
    text(ax, left + BAR / 2, BASE - 24, f"rank {TP * dp_rank}", NORMAL, MUTED)


def draw_stage(ax: Axes, stage: int) -> None:
    """Draw both GPUs of a DP group at a stage."""
    left, parts = LEFTS[stage], bars(stage)
    centre = left + BAR + GAP / 2
    for dp_rank in range(DP):
        draw_bar(ax, left + dp_rank * (BAR + GAP), dp_rank, parts)
    top = BASE + sum(part.whole for part in parts) * PER_GIB
    text(ax, centre, top + 78, f"ZeRO stage {stage}", LARGE, weight="bold")
    held = sum(part.held for part in parts)
    text(ax, centre, top + 32, f"{held:.1f} GiB per GPU", LARGE)
    sharded = ("nothing sharded", "masters and moments\nsharded", "gradients too", "weights too")[stage]
    text(ax, centre, BASE - 58, sharded, NORMAL, va="top", linespacing=1.25)


def draw() -> Figure:
    """Return the whole figure."""
    figure, ax = canvas(HEIGHT)
    heading(ax, 28, HEIGHT - 38, "What a GPU holds before any activation")
    words = (
        f"Qwen2-7B at tp {TP} × dp {DP}: bf16 weights and gradients, fp32 masters and two fp32 moments. Numbers in GiB."
    )
    text(ax, 28, HEIGHT - 84, words, NORMAL, MUTED, ha="left")
    for stage in range(4):
        draw_stage(ax, stage)
    box(ax, 1038, HEIGHT - 52, 34, 34, "white", hatch="///", edgecolor=MUTED)
    text(ax, 1086, HEIGHT - 36, "held by the DP group's other GPU", NORMAL, ha="left")
    bottom = BASE
    for part in bars(0):
        middle, name = bottom + part.whole * PER_GIB / 2, part.name.replace(" and ", "\nand ")
        text(ax, LEFTS[0] - 16, middle, name, NORMAL, ha="right", weight="bold")
        bottom += part.whole * PER_GIB
    return figure
