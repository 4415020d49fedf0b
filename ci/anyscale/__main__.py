"""Make what Anyscale's template repository accepts, or compile the lock of its requirements.

python ci/anyscale make OUT [--repository URL]
python ci/anyscale lock

`make` writes a folder to be copied over a checkout of the template repository. Its rules, with the checks that it runs:
github.com/anyscale/templates, `.claude/skills/template/references/` and `scripts/hooks/` (read on 2026-11-28).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

if not __package__:  # `python ci/anyscale` puts the folder itself on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from ci.notebook import NOTEBOOK, ROOT

HERE = Path(__file__).resolve().parent
NAME = "tp_autotp"
REPOSITORY = "https://github.com/anyscale/templates"  # where the folder is published; links and pictures point there
LOCK = "python_depset.lock"
SECTIONS = ("Training", "Settings")  # of requirements.txt; the platform brings Jupyter, and the checks stay here
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")

SETUP = """\
## Set up the workspace

The GPUs are on other nodes than this notebook. The first cell installs the packages here. The second connects to Ray,
which brings the same packages and the helpers to every node that trains. That takes some minutes per node, once. It is
all of the installation that the next section names."""
INSTALL = f"""\
%%bash
uv pip install --system --no-deps -r {LOCK}"""
CONNECT = f"""\
import os

import ray

ray.init(
    ignore_reinit_error=True,  # so that the cell can run twice
    log_to_driver=False,  # every worker has a log file
    runtime_env={{"pip": os.path.abspath("{LOCK}"), "py_modules": [os.path.abspath("tp2d_helpers")]}},
)"""


def requirements(text: str) -> str:
    """Those sections of a requirements.txt that training needs, headings included.

    Raises:
        ValueError: if one of them isn't there.
    """
    parts = text.split("\n\n")
    kept = [part for part in parts if part.startswith(tuple(f"# {name}" for name in SECTIONS))]
    if len(kept) != len(SECTIONS):
        raise ValueError(f"requirements.txt: its sections must begin with {SECTIONS}, found {len(kept)} of them")
    return "\n\n".join(part.strip() for part in kept) + "\n"


class Links:
    """Makes relative links absolute, and remembers the files that they lead to."""

    def __init__(self, repository: str) -> None:
        owner = repository.removeprefix("https://github.com/")
        self.pages = f"{repository}/blob/main/templates/{NAME}"
        self.raw = f"https://raw.githubusercontent.com/{owner}/main/templates/{NAME}"
        self.files: set[Path] = set()

    def absolute(self, markdown: str, folder: Path) -> str:
        """The text of a file in `folder`, with URLs for its relative links. Raises `ValueError` for a dead one."""

        def url(match: re.Match[str]) -> str:
            file = (folder / match.group()).resolve()
            if not file.is_file():
                raise ValueError(f"a link in {folder} leads to {match.group()}, which is no file")
            if file == NOTEBOOK:
                return f"{self.pages}/README.ipynb"
            self.files.add(file)
            return f"{self.raw if file.suffix == '.png' else self.pages}/{file.relative_to(ROOT)}"

        return LINK.sub(url, markdown)


def published(notebook: NotebookNode, links: Links) -> NotebookNode:
    """A copy for the template: set-up cells before the first use, no outputs, absolute links; the tags stay."""
    made = nbformat.from_dict(notebook)
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            text = links.absolute(cell.source, ROOT)
            cell.source = text.replace(f"papermill {NOTEBOOK.name}", "papermill README.ipynb")
    first = next(number for number, cell in enumerate(made.cells) if cell.source.startswith("## "))
    setup = [new_markdown_cell(SETUP), new_code_cell(INSTALL), new_code_cell(CONNECT)]
    for number, cell in enumerate(setup):
        cell.id = f"anyscale-{number}"  # not a random one: the folder made twice is the same
    made.cells[first:first] = setup
    return made


def make(out: Path, repository: str) -> None:
    """Write the template's folder. Raises `FileExistsError` if there is something at `out` already."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: is not empty; name a new folder")
    template, links = out / "templates" / NAME, Links(repository)
    shutil.copytree(ROOT / "tp2d_helpers", template / "tp2d_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    notebook = published(nbformat.read(NOTEBOOK, as_version=4), links)
    nbformat.write(notebook, template / "README.ipynb")
    text, _ = MarkdownExporter().from_filename(str(template / "README.ipynb"))
    (template / "README.md").write_text(text)
    (template / "requirements.txt").write_text(requirements((ROOT / "requirements.txt").read_text()))
    while files := {file for file in links.files if not (template / file.relative_to(ROOT)).exists()}:
        for file in files:
            target = template / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".md":  # its links add to the files
                target.write_text(links.absolute(file.read_text(), file.parent))
            else:
                shutil.copyfile(file, target)
    for file, target in {
        LOCK: template,
        "aws.yaml": out / "configs" / NAME,
        "gce.yaml": out / "configs" / NAME,
        "tests.sh": out / "tests" / NAME,
        "BUILD.yaml": out,
    }.items():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / file, target / file)


def lock() -> int:
    """Compile the template's requirements into the stored lock, by uv and PyPI; the exit status."""
    text = requirements((ROOT / "requirements.txt").read_text())
    # The image's Python, and its Ray, which must stay. CUDA's packages are those that PyPI's torch needs.
    options = ["--python-version=3.12", "--python-platform=x86_64-manylinux_2_28", "--unsafe-package=ray"]
    options += ["--generate-hashes", "--no-emit-index-url", "--no-annotate", "--quiet", f"--output-file={HERE / LOCK}"]
    options += ["--custom-compile-command=python ci/anyscale lock"]
    return subprocess.run(["uv", "pip", "compile", *options, "-"], input=text, text=True).returncode


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("anyscale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the template's folder")
    making.add_argument("out", type=Path)
    making.add_argument("--repository", default=REPOSITORY, help=f"for links, on GitHub; default {REPOSITORY}")
    commands.add_parser("lock", help="compile requirements.txt into the stored lock; needs uv and the network")
    chosen = parser.parse_args(arguments)
    if chosen.command == "lock":
        return lock()
    try:
        make(chosen.out, chosen.repository.rstrip("/"))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{chosen.out}: copy it over a checkout of {chosen.repository}, and add BUILD.yaml's entry to the one there")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
