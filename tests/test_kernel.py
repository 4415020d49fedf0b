"""What a notebook's kernel inherits from the place where it starts: variables of images, modules and shells."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from grid import IMPORT_PATH, NOTEBOOK
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from ci.notebook.run import own_kernel

FIGURES = [
    "from tp2d_helpers.display import plot_metrics\n"
    "plot_metrics({'1 × 1': [dict(step=1, loss=1.0, grad_norm=1.0, eval_loss=None)]})",
    "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
    "import importlib\nfrom tp2d_helpers import display\nplt.switch_backend('svg')\nimportlib.reload(display)\n"
    "plt.get_backend()",
]
# None of these has a say in a notebook; the pager and the colours neither.
OTHERS = {"PAGER": "less", "NO_COLOR": "1", "FORCE_COLOR": "1", "COLUMNS": "20", "TERM": "dumb", "PYTHONSAFEPATH": "1",
          "PYTHONIOENCODING": "ascii", "PYTHONPATH": IMPORT_PATH}  # fmt: skip


@pytest.mark.parametrize("backend", ["Agg", "one that is not there"])
def test_figures_are_shown_whatever_backend_is_inherited(backend: str) -> None:
    """By a function of the helpers, by pyplot; and a backend that the reader has taken in the notebook stays."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in FIGURES])
    environment = os.environ | OTHERS | {"MPLBACKEND": backend}
    with own_kernel():
        NotebookClient(notebook, kernel_name="python3", timeout=60).execute(env=environment, cwd=str(NOTEBOOK.parent))
    ours, pyplots, taken = ([output for output in cell.outputs] for cell in notebook.cells)
    assert [list(output.data) for output in (*ours, *pyplots)] == [["text/plain", "image/png"]] * 2
    assert "1 × 1" not in str(ours) and taken[0].data["text/plain"] == "'svg'"


@pytest.mark.parametrize("level", ["1", "2"])
def test_assertions_that_are_left_out(level: str) -> None:
    """They are how DeepSpeed finds ranks that disagree. Transformers isn't even imported without docstrings."""
    command = [sys.executable, "-c", "import tp2d_helpers.preflight.plan"]
    environment = os.environ | {"PYTHONPATH": IMPORT_PATH, "PYTHONOPTIMIZE": level}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1] == (
        f"tp2d_helpers.config.ConfigError: PYTHONOPTIMIZE = {level}, or python -O: leaves out the assertions by which "
        "DeepSpeed and the notebook check what they compute; unset it, and start Python again"
    )
