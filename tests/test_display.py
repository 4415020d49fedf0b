"""What the reader sees."""

from __future__ import annotations

import inspect
import re
import time
from pathlib import Path

import pytest
from ray.train import WorkerGroupError

from tp2d_helpers import display, launch
from tp2d_helpers.checkpoint import files
from tp2d_helpers.checkpoint.files import claim_run, write_json
from tp2d_helpers.config import make_config


def test_listings_bring_their_own_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """JupyterLab's themes give `pre` a background, in the dark one nearly black: dark text needs a light one there."""
    shown = []
    monkeypatch.setattr(display, "display", lambda data, raw: shown.append(data))
    display.show_source(launch.progress_line)
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
    with pytest.raises(launch.TrainingFailed) as caught, launch.follow(config, 9):
        write_json(config.run_dir / "stalled.json", STALL | {"time": time.time()})
        if survived:
            claim_run(config.run_dir, 0)  # as a new attempt begins
            files._HELD.close()
        raise error
    message = str(caught.value)
    assert all(part in message for part in said) and not any(part in message for part in unsaid)
    assert len(list(config.run_dir.glob("stalled*.json"))) == 1, "what was found of the hang stays"


def test_listings_leave_out_the_sections_of_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: a comment after the docstring, a docstring without sections and the code stay as they are."""
    shown = []
    monkeypatch.setattr(display, "display", lambda data, raw: shown.append(data["text/plain"]))
    display.show_source(launch.launch)
    source = shown[0].splitlines()
    assert source[1:3] == [
        '    """Train as planned, from the run\'s newest checkpoint if it has one."""',
        "    config = plan.config",
    ]
    assert "Args:" not in shown[0] and source[-1] == "        return trainer.fit()"
    display.show_source(launch.progress_line)
    assert shown[1] == inspect.getsource(launch.progress_line).rstrip()


def test_plots_show_guessing_and_both_runs() -> None:
    records = [
        dict(step=step, loss=7.0 - step, grad_norm=None, eval_loss=6.5 if step == 2 else None) for step in (1, 2)
    ]
    figure = display.plot_metrics({"2 × 2": records, "1 × 1": records}, [1], vocabulary=2048)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["2 × 2", "2 × 2, held out", "1 × 1", "1 × 1, held out", "guessing: ln 2,048"]
    (guess,) = [line for line in figure.axes[0].lines if line.get_label().startswith("guessing")]
    assert guess.get_ydata()[0] == pytest.approx(7.6246, abs=1e-4)
    assert {line.get_linestyle() for line in figure.axes[1].lines} == {"-", ":"}


def test_a_tree_has_one_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "step").mkdir(parents=True)
    (tmp_path / "run" / "a.json").write_bytes(b"0" * 1500)
    (tmp_path / "run" / "step" / "b.pt").write_bytes(b"0" * 2_000_000)
    display.show_tree(tmp_path / "run")
    assert capsys.readouterr().out == "run/\n├── a.json  1.5 kB\n└── step/\n    └── b.pt  2,000.0 kB\n"
