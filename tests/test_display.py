"""What the reader sees."""

from __future__ import annotations

import re

import pytest

from tp2d_helpers import display


def test_listings_bring_their_own_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """JupyterLab's themes give `pre` a background, in the dark one nearly black: dark text needs a light one there."""
    shown = []
    monkeypatch.setattr(display, "display", lambda data, raw: shown.append(data))
    display.show_source(display.progress_line)
    style = re.search(r'<pre style="([^"]*)"', shown[0]["text/html"])[1]
    assert "background: #f5f5f5" in style and "color: #212121" in style
