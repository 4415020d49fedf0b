"""The figures: each is what its module draws today, fits a screen, and says what the package and the results say."""

from __future__ import annotations

import copy
import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from images import all_reduce, drawing, optimizations, timeline, zero
from images.__main__ import FIGURES, FOLDER
from tp2d_helpers.demo import SHAPES
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.planning import state_bytes

MARGIN = 8  # pixels between a text and the edge
SMALLEST = 15  # points: 21 pixels
SCREENSHOTS = {"notebook"}  # taken, not drawn


def pixels(image: Image.Image) -> np.ndarray:
    """[height, width, 3]."""
    return np.asarray(image.convert("RGB"), dtype=int)


def test_every_picture_has_its_module() -> None:
    pictures = {path.stem for path in FOLDER.glob("*.png")}
    assert pictures - SCREENSHOTS == set(FIGURES)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.png")), ids=lambda path: path.stem)
def test_a_picture_fits_a_screen(path: Path) -> None:
    with Image.open(path) as image:
        assert image.width <= drawing.WIDTH and image.height <= drawing.HIGHEST


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_is_what_its_module_draws(name: str) -> None:
    drawn = drawing.picture(importlib.import_module(f"images.{name}").draw)
    with Image.open(FOLDER / f"{name}.png") as image:
        assert image.size == drawn.size
        different = np.abs(pixels(image) - pixels(drawn)).max(axis=2) > 64
    assert different.sum() <= 20, f"images/{name}.png is stale: draw it anew by `python -m images {name}`"


@pytest.mark.parametrize("name", FIGURES)
def test_texts_are_legible_and_apart(name: str) -> None:
    with drawing.settings():
        figure = importlib.import_module(f"images.{name}").draw()
        figure.draw_without_rendering()
        (ax,) = figure.axes
        boxes = [(text.get_text(), text.get_window_extent()) for text in ax.texts if text.get_text()]
    assert min(text.get_fontsize() for text in ax.texts if text.get_text()) >= SMALLEST
    for words, box in boxes:
        inside = box.x0 >= MARGIN and box.y0 >= MARGIN
        inside &= box.x1 <= figure.bbox.width - MARGIN and box.y1 <= figure.bbox.height - MARGIN
        assert inside, f"{words!r} is at the edge: {box}"
    overlapping = [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]
    assert not overlapping


def test_a_ring_adds_everything_up() -> None:
    steps = all_reduce.ring()
    assert len(steps) == 2 * (all_reduce.RANKS - 1)
    everyone = set(range(all_reduce.RANKS))
    before = all_reduce.start()
    for state, received in steps:
        changed = [(r, c) for r in everyone for c in everyone if state[r][c] != before[r][c]]
        assert changed == [(rank, received[rank]) for rank in sorted(everyone)], "one chunk for each rank in each step"
        before = state
    scattered, _ = steps[all_reduce.RANKS - 2]
    assert [sum(chunk == everyone for chunk in tensor) for tensor in scattered] == [1] * all_reduce.RANKS
    assert all(chunk == everyone for tensor in steps[-1][0] for chunk in tensor)


def test_zero_bars_are_state_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = ModelFacts.of_shape(SHAPES["qwen2-7b"]).shard(2).parameters
    for stage in range(4):
        bars = zero.bars(stage)
        expected = {name: size / 2**30 for name, size in state_bytes(parameters, 2, stage, gradient_width=2).items()}
        assert {bar.name: bar.held for bar in bars} == expected
        assert [bar.whole for bar in bars] == [bar.held for bar in zero.bars(0)]
    monkeypatch.setattr(zero, "state_bytes", lambda *_, **__: dict.fromkeys(zero.COLOURS, 5 * 2**30))
    (ax,) = zero.draw().axes
    words = [text.get_text() for text in ax.texts]
    assert words.count("15.0 GiB per GPU") == 4 and words.count("5.0") == 24


def test_timeline_adds_up() -> None:
    profile = drawing.results(timeline.PROFILE)
    assert sum(timeline.shares(profile).values()) == pytest.approx(profile["window_ms"])
    for name in ("forward", "backward"):
        layer = profile[name]
        assert len(timeline.all_reduces(layer)) == 2
        assert all(0 <= begin < end <= layer["ms"] + 1e-3 for kind in timeline.KINDS for begin, end in layer[kind])


def test_ladder_adds_one_optimization_each() -> None:
    report = drawing.results(optimizations.LADDER)
    rungs = optimizations.ladder(report)
    assert rungs[0].added == "" and len({rung.added for rung in rungs}) == len(rungs) >= 5
    assert rungs[-1].ms < rungs[0].ms
    broken = copy.deepcopy(report)
    del broken["candidates"][1]
    with pytest.raises(ValueError, match="one optimization more"):
        optimizations.ladder(broken)
