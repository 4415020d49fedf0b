"""The part of `ci/` that isn't shell: it runs the notebook, checks what a run left behind, and stores a run's outputs.

- `cells`: the cells of a notebook, executed or not
- `check`: what is required of a run
- `run`: one run by papermill
- `placeholders`: what stands in stored outputs for the names of the machine
- `refresh`: the notebook with the outputs of a new run
- `lesson`: what a notebook asks of its reader, in words, code, figures and minutes
- `measured`: numbers in the text, taken from the results files
- `__main__`: the command line, `python ci/notebook`
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "tp_autotp.ipynb"
EXECUTED = "tp_autotp.executed.ipynb"
