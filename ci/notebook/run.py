"""Run the notebook by papermill, in a kernel of this interpreter and a folder of its own."""

from __future__ import annotations

import base64
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import nbformat
import yaml
from ipykernel.kernelspec import write_kernel_spec
from papermill.cli import papermill
from papermill.exceptions import PapermillExecutionError

from ci.notebook import EXECUTED, NOTEBOOK, ROOT
from ci.notebook.cells import failed_cells
from ci.notebook.check import check


@contextlib.contextmanager
def own_kernel() -> Iterator[None]:
    """Make "python3" name a kernel of this interpreter, whatever kernels the machine or the user has installed."""
    before, options = os.environ.get("JUPYTER_PATH"), ["--IPKernelApp.log_level=ERROR"]
    finds_helpers = {"env": {"PYTHONSAFEPATH": ""}}  # with it, ipykernel takes the notebook's folder off the path
    with tempfile.TemporaryDirectory() as folder:
        write_kernel_spec(Path(folder, "kernels", "python3"), finds_helpers, options)
        os.environ["JUPYTER_PATH"] = folder + (os.pathsep + before if before else "")
        try:
            yield
        finally:
            del os.environ["JUPYTER_PATH"]
            if before:
                os.environ["JUPYTER_PATH"] = before


def given_parameters(options: dict[str, Any]) -> dict[str, Any]:
    """What the caller's -b, -f, -y, -p and -r options set, in the order in which papermill applies them."""
    texts = [base64.b64decode(text) for text in options["parameters_base64"]]
    texts += [Path(file).read_text() for file in options["parameters_file"]]
    texts += options["parameters_yaml"]
    given: dict[str, Any] = {}
    for text in texts:
        given.update(yaml.safe_load(text) or {})
    given.update([*options["parameters"], *options["parameters_raw"]])
    return given


def find_file(name: str) -> str:
    """A -f file as seen from the caller's folder, or else from the repository."""
    folders = dict.fromkeys([Path.cwd(), ROOT])
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f"-f {name}: no such file in {' or '.join(map(str, folders))}")


def parse(papermill_options: Sequence[str], defaults: dict[str, str]) -> tuple[click.Context, Path]:
    """Read the options by papermill's own parser, and settle where the run goes.

    Args:
        papermill_options: the caller's, anything that papermill's command line takes.
        defaults: `storage_path` and `experiment_name`, for what the options don't set or set to "auto".

    Returns:
        The context to invoke papermill with, and the run's folder, which now exists.
    """
    arguments = ["-k", "python3", "-l", "python", "--no-progress-bar", *papermill_options]
    context = papermill.make_context("papermill", [str(NOTEBOOK), EXECUTED, *arguments])
    options = context.params
    options["parameters_file"] = tuple(map(find_file, options["parameters_file"]))
    options["cwd"] = options["cwd"] or str(ROOT)
    given = given_parameters(options)
    chosen = {name: str(given.get(name, "auto")) for name in defaults}
    chosen = {name: defaults[name] if value == "auto" else value for name, value in chosen.items()}
    if "://" in chosen["storage_path"] or Path(chosen["experiment_name"]).name != chosen["experiment_name"]:
        raise ValueError(f"storage_path must be a folder and experiment_name the name of one, found {chosen}")
    run_dir = Path(options["cwd"], Path(chosen["storage_path"]).expanduser(), chosen["experiment_name"]).absolute()
    chosen["storage_path"] = str(run_dir.parent)
    options["parameters_raw"] += tuple(chosen.items())  # papermill reads them last, as text
    run_dir.mkdir(parents=True, exist_ok=True)
    options["output_path"] = str(run_dir / EXECUTED)
    return context, run_dir


def execute(context: click.Context, run_dir: Path) -> int:
    """Run the notebook as parsed; the exit status. Errors are printed, without the frames."""
    try:
        with own_kernel():
            papermill.invoke(context)
    except PapermillExecutionError as error:
        message = "\n".join(f"{error.ename}: {error.evalue}".splitlines()[-30:])
        print(f"\nerror in In [{error.exec_count}] of the notebook:\n{message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:  # papermill's, after the kernel died
        return int(error.code or 1)
    except Exception as error:
        print(f"\nerror: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    problems = failed_cells(nbformat.read(run_dir / EXECUTED, as_version=4))
    if problems and not context.params["prepare_only"]:
        print("error: the notebook stopped early", *problems, sep="\n", file=sys.stderr)
        return 1
    return 0


def report_files(run_dir: Path) -> bool:
    """Print where the run's files are; True if those are there that every run leaves."""
    complete = True
    for label, name, needed in [
        ("executed notebook", EXECUTED, True),
        ("metrics", "metrics.jsonl", True),
        ("worker logs", "logs", False),
        ("exported model", "export", False),
    ]:
        found = (run_dir / name).exists()
        complete &= found or not needed
        print(f"{label:<18} {run_dir / name}{'' if found else '  (missing)'}")
    return complete


def run(papermill_options: Sequence[str], check_too: bool, max_memory_gib: float | None) -> int:
    """Run the notebook into a new folder under outputs/ unless the options say where; report; check on demand."""
    defaults = {
        "storage_path": str(ROOT / "outputs"),
        "experiment_name": f"run_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}",
    }
    context, run_dir = parse(papermill_options, defaults)
    status = execute(context, run_dir)
    complete = report_files(run_dir)
    if status or not complete:
        return status or 1
    return check(run_dir / EXECUTED, run_dir / "metrics.jsonl", max_memory_gib) if check_too else 0
