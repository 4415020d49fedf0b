"""Run the notebook, check what a run left behind, store a run's outputs, count what it asks of its reader.

python ci/notebook run [--check] [--max-memory-gib N] -- [papermill options]
python ci/notebook check EXECUTED.ipynb METRICS.jsonl [--max-memory-gib N]
python ci/notebook refresh
python ci/notebook numbers
python ci/notebook count [NOTEBOOK ...] [--seconds N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import yaml

if not __package__:  # `python ci/notebook` puts the folder itself on the path, where its modules are no package
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from ci.notebook import NOTEBOOK
from ci.notebook.check import check
from ci.notebook.lesson import compare
from ci.notebook.refresh import refresh, refresh_texts
from ci.notebook.run import run


def parser() -> argparse.ArgumentParser:
    """The parser of everything before "--"."""
    memory = argparse.ArgumentParser(add_help=False)
    memory.add_argument("--max-memory-gib", type=float, metavar="N", help="fail if a worker's peak is above this")
    whole = argparse.ArgumentParser(
        "notebook", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", required=True)
    run_command = commands.add_parser("run", parents=[memory], help="run the notebook")
    run_command.add_argument("--check", action="store_true", help="check the run afterwards")
    check_command = commands.add_parser("check", parents=[memory], help="check what a run left behind")
    check_command.add_argument("executed", type=Path)
    check_command.add_argument("metrics", type=Path)
    commands.add_parser("refresh", help="store the notebook's outputs in it, and the numbers")
    commands.add_parser("numbers", help="rewrite the measured numbers in its text and the READMEs' from the results")
    count = commands.add_parser("count", help="words, code, figures and minutes of notebooks, side by side")
    count.add_argument("notebooks", type=Path, nargs="*", default=[NOTEBOOK], metavar="NOTEBOOK")
    count.add_argument(
        "--seconds", type=float, default=0.0, metavar="N", help="that the run takes, where none are kept"
    )
    return whole


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    own = list(arguments)
    papermill_options: list[str] = []
    if "--" in own:
        own, papermill_options = own[: own.index("--")], own[own.index("--") + 1 :]
    chosen = parser().parse_args(own)
    try:
        if chosen.command == "run":
            return run(papermill_options, chosen.check, chosen.max_memory_gib)
        if chosen.command == "check":
            return check(chosen.executed, chosen.metrics, chosen.max_memory_gib)
        if chosen.command == "count":
            print(compare(chosen.notebooks, chosen.seconds))
            return 0
        return refresh() if chosen.command == "refresh" else refresh_texts()
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
