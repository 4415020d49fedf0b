"""What the reader sees."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from ray.train import WorkerGroupError

from tp2d_helpers import display
from tp2d_helpers.checkpoint import files
from tp2d_helpers.checkpoint.files import claim_run, write_json
from tp2d_helpers.config import make_config


def test_listings_bring_their_own_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """JupyterLab's themes give `pre` a background, in the dark one nearly black: dark text needs a light one there."""
    shown = []
    monkeypatch.setattr(display, "display", lambda data, raw: shown.append(data))
    display.show_source(display.progress_line)
    style = re.search(r'<pre style="([^"]*)"', shown[0]["text/html"])[1]
    assert "background: #f5f5f5" in style and "color: #212121" in style


STALL = dict(message="no progress for 60 s: rank 3 does not answer", ranks=[3])
FAILED = WorkerGroupError("failed", {0: RuntimeError("FloatingPointError: the loss of step 900 is not finite")})


@pytest.mark.parametrize("survived, error, said, unsaid", [
    (False, FAILED, ["rank 3 does not answer"], ["step 900"]),
    (True, FAILED, ["rank 0: FloatingPointError: the loss of step 900"], ["rank 3"]),
    (False, RuntimeError("no place for 4 workers"), ["rank 3 does not answer", "Then: no place for 4 workers"], []),
    (True, RuntimeError("no place for 4 workers"), ["no place for 4 workers"], ["rank 3"]),
])  # fmt: skip
def test_the_reason_of_a_failed_run(
    tmp_path: Path, survived: bool, error: Exception, said: list[str], unsaid: list[str]
) -> None:
    """A hang is the reason if it ended the last attempt. If another attempt began after it, what ended that one is."""
    config = make_config(storage_path=str(tmp_path), experiment_name="x")
    with pytest.raises(display.TrainingFailed) as caught, display.follow(config, 9):
        write_json(config.run_dir / "stalled.json", STALL | {"time": time.time()})
        if survived:
            claim_run(config.run_dir, 0)  # as a new attempt begins
            files._HELD.close()
        raise error
    message = str(caught.value)
    assert all(part in message for part in said) and not any(part in message for part in unsaid)
    assert len(list(config.run_dir.glob("stalled*.json"))) == 1, "what was found of the hang stays"
