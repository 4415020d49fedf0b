"""Run the notebook, check what a run left behind, store a run's outputs.

python ci/notebook run [--check] [--max-memory-gib N] -- [papermill options]
python ci/notebook check EXECUTED.ipynb METRICS.jsonl [--max-memory-gib N]
python ci/notebook refresh
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

from ci.notebook.check import check
from ci.notebook.refresh import refresh
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
    commands.add_parser("refresh", help="store the notebook's outputs in it")
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
