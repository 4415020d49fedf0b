"""Run the notebook, check what a run left behind, store a run's outputs: the part of `ci/` that isn't shell.

notebook.py run [--check] [--max-memory-gib N] -- [papermill options]
notebook.py check EXECUTED.ipynb METRICS.jsonl [--max-memory-gib N]
notebook.py refresh
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import copy
import getpass
import json
import math
import os
import re
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import nbformat
import yaml
from ipykernel.kernelspec import write_kernel_spec
from nbformat import NotebookNode
from papermill.cli import papermill
from papermill.exceptions import PapermillExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "tp_autotp.ipynb"
EXECUTED = "tp_autotp.executed.ipynb"
RESUMED_EPOCHS = 1  # the notebook continues its run for one epoch more
MOST_LAUNCH_LINES = 40
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    """The cells that have the tag."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that aren't empty."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def failed_cells(notebook: NotebookNode) -> list[str]:
    """One line per code cell that wasn't executed or has an error among its outputs.

    A cell that calls `sys.exit(0)` makes papermill skip the rest and succeed; here the rest counts as not executed.
    """
    lines = []
    for cell in code_cells(notebook):
        first = cell.source.strip().splitlines()[0]
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors:
            lines.append(f"In [{cell.execution_count}] {first!r}: {errors[0].ename}: {errors[0].evalue}")
        elif cell.execution_count is None:
            lines.append(f"not executed: {first!r}")
    return lines


# ---------------------------------------------------------------------------------------------------------------- run


@contextlib.contextmanager
def own_kernel() -> Iterator[None]:
    """Make "python3" name a kernel of this interpreter, whatever kernels the machine or the user has installed."""
    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory() as folder:
        write_kernel_spec(Path(folder, "kernels", "python3"), extra_arguments=["--IPKernelApp.log_level=ERROR"])
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


# -------------------------------------------------------------------------------------------------------------- check


class Check(NamedTuple):
    """One requirement on a run."""

    name: str
    passed: bool
    found: str
    expected: str


def parameters_of(notebook: NotebookNode) -> dict[str, Any]:
    """The parameters of an executed notebook: the literals of the `parameters` cell, then papermill's."""
    values: dict[str, Any] = {}
    for cell in tagged(notebook, "parameters"):
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.Assign):
                value = ast.literal_eval(node.value)
                values.update({target.id: value for target in node.targets if isinstance(target, ast.Name)})
    values.update(notebook.metadata.get("papermill", {}).get("parameters", {}))
    return values


def printed_lines(cell: NotebookNode) -> int:
    """Lines of text among a cell's outputs; of a table or a figure, its text form."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return sum(len(text.splitlines()) for text in texts)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_steps(records: list[dict[str, Any]], parameters: dict[str, Any]) -> Iterator[Check]:
    """As many optimizer steps as the parameters say, each once and in order."""
    steps = [record["step"] for record in records]
    epochs = parameters["num_epochs"] + RESUMED_EPOCHS
    if parameters["debug_steps"]:
        wanted = epochs * parameters["debug_steps"]
        yield Check("number of steps", len(steps) == wanted, str(len(steps)), str(wanted))
    else:  # all of the data: the length of an epoch isn't known here
        passed = bool(steps) and len(steps) % epochs == 0
        yield Check("number of steps", passed, str(len(steps)), f"a multiple of {epochs} epochs")
    wrong = [step for step, place in zip(steps, range(1, len(steps) + 1), strict=True) if step != place]
    yield Check("steps 1 to n, each once", not wrong, f"{wrong[0]} out of place" if wrong else "all", "all")


def check_numbers(records: list[dict[str, Any]], max_memory_gib: float | None) -> Iterator[Check]:
    """Finite losses and norms, a loss that falls, memory within the limit."""
    for name in ("loss", "grad_norm"):
        bad = [f"{record.get(name)} at step {record['step']}" for record in records if not is_number(record.get(name))]
        yield Check(f"every {name} finite", not bad, bad[0] if bad else "all", "all")
    losses = [record["loss"] for record in records if is_number(record.get("loss"))]
    if len(losses) >= 10:
        first, last = statistics.mean(losses[:5]), statistics.mean(losses[-5:])
        yield Check("loss of the last 5 steps", last < first, f"{last:.4f}", f"< {first:.4f}, that of the first 5")
    else:
        yield Check("loss of the last 5 steps", False, f"{len(losses)} steps with a loss", "10 or more")
    if max_memory_gib is not None:
        peak = max((record["peak_memory_gib"] for record in records), default=math.nan)
        yield Check("peak memory, GiB", peak <= max_memory_gib, f"{peak:.2f}", f"<= {max_memory_gib:g}")


def checks_of(notebook: NotebookNode, records: list[dict[str, Any]], max_memory_gib: float | None) -> list[Check]:
    """Everything that is required of an executed notebook and its metrics."""
    problems = failed_cells(notebook)
    number = len(code_cells(notebook))
    launches = tagged(notebook, "launch")
    lines = max((printed_lines(cell) for cell in launches), default=-1)
    return [
        Check("cells executed", not problems, "; ".join(problems) or str(number), f"{number} without error"),
        *check_steps(records, parameters_of(notebook)),
        *check_numbers(records, max_memory_gib),
        Check(
            "lines printed by launch",
            0 <= lines <= MOST_LAUNCH_LINES,
            str(lines) if launches else "no cell tagged launch",
            f"<= {MOST_LAUNCH_LINES}",
        ),
    ]


def summary(notebook: NotebookNode, records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the run measured, as rows of (name, value). Rates are medians over all steps."""

    def median(name: str, form: str) -> str:
        values = [record[name] for record in records if is_number(record.get(name))]
        return form.format(statistics.median(values)) if values else "unknown"

    rows = [("steps", str(len(records)))]
    if records:
        first, last = records[0]["loss"], records[-1]["loss"]
        rows.append(
            ("loss, first and last step", " ".join(f"{x:.4f}" if is_number(x) else str(x) for x in (first, last)))
        )
        rows.append(("peak memory, GiB", f"{max(record['peak_memory_gib'] for record in records):.2f}"))
    rows += [("tokens/s, median", median("tokens_per_second", "{:,.0f}")), ("MFU, median", median("mfu", "{:.2%}"))]
    for cell in code_cells(notebook):
        seconds = cell.metadata.get("papermill", {}).get("duration") or 0
        if seconds > 2:
            rows.append((f"In [{cell.execution_count}], seconds", f"{seconds:.1f}  {cell.source.splitlines()[0][:60]}"))
    return rows


def check(executed: Path, metrics: Path, max_memory_gib: float | None) -> int:
    """Print what a run measured and whether it is as required; 1 if it isn't."""
    notebook = nbformat.read(executed, as_version=4)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for name, value in summary(notebook, records):
        print(f"{name:<26} {value}")
    checks = checks_of(notebook, records, max_memory_gib)
    for item in checks:
        print(f"{'ok  ' if item.passed else 'FAIL'} {item.name}: {item.found} (expected {item.expected})")
    return 0 if all(item.passed for item in checks) else 1


# ------------------------------------------------------------------------------------------------------------ refresh


class Placeholders:
    """Replaces what names the machine that ran the notebook: paths, hosts, users, private addresses.

    Args:
        paths: folder → placeholder. The longest folder that fits is taken.
        names: name → placeholder, replaced as whole words.
        known: the sources of the notebook and the package. A name or a temporary path that stands there is no trace
            of the machine and stays: `root` is a user, and a word of the code.
    """

    def __init__(self, paths: dict[str, str], names: dict[str, str], known: str = "") -> None:
        self.known = known
        self.rules: list[tuple[re.Pattern[str], str]] = []
        # A path begins a word, or follows the end of a colour (ESC[1m).
        begin, end = r"(^|[^\w.-]|\x1b\[[\d;]*m)", r"(?![\w-])"
        for path in sorted(paths, key=len, reverse=True):
            if len(path) > 1:
                self.rules.append((re.compile(begin + re.escape(path) + end, re.M), rf"\1{paths[path]}"))
        for name, placeholder in names.items():
            if len(name) > 1 and not re.search(rf"\b{re.escape(name)}\b", known):
                self.rules.append((re.compile(rf"(\b){re.escape(name)}\b"), rf"\1{placeholder}"))
        private = r"(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d+"
        self.rules.append((re.compile(rf"(?<![\d.])(){private}(?![\d.])"), r"\1<ip>"))
        self.temporary = re.compile(r"(?<![\w.-])/(?:var/)?tmp/[\w./-]+")

    def __call__(self, text: str) -> str:
        for pattern, replacement in self.rules:
            text = pattern.sub(replacement, text)
        return self.temporary.sub(self._replace_temporary, text)

    def _replace_temporary(self, match: re.Match[str]) -> str:
        path = match.group()
        return path if path in self.known else "{tmp}" + path.split("tmp", 1)[1]

    @classmethod
    def of_this_machine(cls, storage: Path, notebook: NotebookNode) -> Placeholders:
        """The replacements for a run that wrote to `storage`."""
        home, cache = Path.home(), Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        paths = {storage: "{storage}", ROOT: "{repo}", home: "{home}", cache: "{cache}", Path(sys.prefix): "{python}"}
        paths |= {Path(sys.base_prefix): "{python}"}
        for variable in ("TP2D_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
            if os.environ.get(variable):
                paths[Path(os.environ[variable]).expanduser()] = "{cache}"
        with_links_resolved = {path.resolve(): placeholder for path, placeholder in paths.items()}
        host = socket.gethostname()
        names = {host: "{host}", host.split(".")[0]: "{host}", socket.getfqdn(): "{host}", getpass.getuser(): "{user}"}
        sources = [cell.source for cell in notebook.cells]
        sources += [file.read_text() for file in sorted(ROOT.glob("tp2d_helpers/*.py"))]
        names = {name: placeholder for name, placeholder in names.items() if name != "localhost"}
        return cls({str(k): v for k, v in (with_links_resolved | paths).items()}, names, "\n".join(sources))


def replace_texts(value: Any, replace: Callable[[str], str]) -> Any:
    """`value` with `replace` applied to every text in it."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, list):
        return [replace_texts(item, replace) for item in value]
    if isinstance(value, dict):
        return NotebookNode({key: replace_texts(item, replace) for key, item in value.items()})
    return value


def clean_outputs(outputs: list[NotebookNode], count: int, replace: Callable[[str], str]) -> list[NotebookNode]:
    """Outputs as they are stored: no stderr, no widgets, neighbouring pieces of stdout joined, `replace` applied."""
    cleaned: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if cleaned and cleaned[-1].output_type == "stream":
                cleaned[-1].text += output.text
                continue
        output = NotebookNode(output)
        if "data" in output:
            kept = {k: v for k, v in output.data.items() if not k.startswith("application/vnd.jupyter.widget")}
            output.data = NotebookNode(
                {
                    kind: v if kind in ("image/png", "image/jpeg") else replace_texts(v, replace)
                    for kind, v in kept.items()
                }
            )
            if not kept:
                continue
        if "execution_count" in output:
            output.execution_count = count
        cleaned.append(output)
    for output in cleaned:
        if output.output_type == "stream":
            output.text = replace(output.text)
    return cleaned


def clean(notebook: NotebookNode, replace: Callable[[str], str]) -> NotebookNode:
    """A copy of an executed notebook as it is stored: nothing that changes between runs or names the machine.

    Raises:
        ValueError: if a text was replaced in a cell whose output nbval compares: it would differ everywhere else.
    """
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    count = 0
    for cell in notebook.cells:
        dropped = ("papermill", "execution", "ExecuteTime")
        cell.metadata = NotebookNode(
            {k: v for k, v in cell.metadata.items() if k not in dropped and (k, v) != ("tags", [])}
        )
        if cell.cell_type != "code":
            continue
        count += 1
        untouched = clean_outputs(cell.outputs, count, str)
        cell.execution_count, cell.outputs = count, clean_outputs(cell.outputs, count, replace)
        if "nbval-check-output" in cell.metadata.get("tags", []) and cell.outputs != untouched:
            first = cell.source.strip().splitlines()[0]
            raise ValueError(f"the cell {first!r} is tagged nbval-check-output, but its output names this machine")
    kept = {k: v for k, v in notebook.metadata.items() if k not in ("papermill", "widgets")}
    notebook.metadata = NotebookNode({**kept, **METADATA})
    return notebook


def refresh() -> int:
    """Run the notebook on its own parameters and store its outputs in it, unless a cell fails."""
    before = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder).resolve()
        context, run_dir = parse([], {"storage_path": str(storage), "experiment_name": "tp_autotp"})
        if status := execute(context, run_dir):
            print(f"{NOTEBOOK.name} is as it was", file=sys.stderr)
            return status
        executed = nbformat.read(run_dir / EXECUTED, as_version=4)
        cleaned = clean(executed, Placeholders.of_this_machine(storage, executed))
    now = nbformat.read(NOTEBOOK, as_version=4)
    sources = [[(cell.cell_type, cell.source) for cell in version.cells] for version in (before, cleaned, now)]
    if not sources[0] == sources[1] == sources[2]:
        raise ValueError(f"{NOTEBOOK.name} was edited during the run and is left as it is; run again")
    scratch = NOTEBOOK.with_name(f".{NOTEBOOK.name}.{os.getpid()}")
    nbformat.write(cleaned, scratch)
    scratch.replace(NOTEBOOK)
    print(f"stored the outputs of {len(code_cells(cleaned))} cells in {NOTEBOOK}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    own = list(arguments)
    papermill_options: list[str] = []
    if "--" in own:
        own, papermill_options = own[: own.index("--")], own[own.index("--") + 1 :]
    memory = argparse.ArgumentParser(add_help=False)
    memory.add_argument("--max-memory-gib", type=float, metavar="N", help="fail if a worker's peak is above this")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run_command = commands.add_parser("run", parents=[memory], help="run the notebook")
    run_command.add_argument("--check", action="store_true", help="check the run afterwards")
    check_command = commands.add_parser("check", parents=[memory], help="check what a run left behind")
    check_command.add_argument("executed", type=Path)
    check_command.add_argument("metrics", type=Path)
    commands.add_parser("refresh", help="store the notebook's outputs in it")
    chosen = parser.parse_args(own)
    try:
        if chosen.command == "run":
            return run(papermill_options, chosen.check, chosen.max_memory_gib)
        if chosen.command == "check":
            return check(chosen.executed, chosen.metrics, chosen.max_memory_gib)
        return refresh()
    except click.exceptions.Exit as done:  # after papermill's --help
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (OSError, ValueError, yaml.YAMLError) as error:  # a file that isn't there or can't be read, a bad parameter
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
