"""Draw combinations of settings for a while, on all cores: `python tests/drawn --minutes 10 --workers 8`.

Each that preflight accepts is trained and compared with one process (`outcomes.py`). A line is printed for each fault,
with the combination, which `--case` takes; the file of results, a JSON object per line, grows as they come.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(TESTS), str(TESTS.parent)]
GRIDS = 3  # for each model and training, which one process computes once


def main() -> None:
    """Draw, or run what is given."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="tp2d-drawn-") as scratch:
        os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="",
                          DS_ACCELERATOR="cpu", TORCHINDUCTOR_COMPILE_THREADS="1")  # fmt: skip
        for name in ("HF_DATASETS_CACHE", "TP2D_CACHE"):
            os.environ.setdefault(f"DRAWN_{name}", f"{scratch}/{name}")  # that of the first process, in those it starts
            os.environ[name] = os.environ[f"DRAWN_{name}"]
        if arguments.case:
            _run_one(json.loads(arguments.case), arguments.simplify)
        elif arguments.worker is not None:
            _work(arguments)
        else:
            _draw(arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=8, help="the most that a grid has")
    parser.add_argument("--compiles", type=float, default=0.08, help="the share of combinations that are compiled")
    parser.add_argument("--resumes", type=float, default=0.15, help="of those that go on upon another grid")
    parser.add_argument("--results", type=Path, default=Path("drawn.jsonl"), help="a file to append to")
    parser.add_argument("--case", help="a combination as JSON; nothing is drawn")
    parser.add_argument("--simplify", action="store_true", help="find the simplest combination that fails so, too")
    parser.add_argument("--summary", action="store_true", help="summarise the file of results; nothing is drawn")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _draw(arguments: argparse.Namespace) -> None:
    """Start workers, wait for them, and summarise."""
    if not arguments.summary:
        until = time.time() + 60 * arguments.minutes
        command = [sys.executable, str(Path(__file__).parent), *sys.argv[1:], "--until", str(until), "--worker"]
        workers = [subprocess.Popen([*command, str(i)]) for i in range(arguments.workers)]
        try:
            for worker in workers:
                worker.wait(timeout=max(1.0, until + 120 - time.time()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass
        finally:
            for worker in workers:
                worker.kill()
    rows = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    print(summary([json.loads(row) for row in rows]))


def _work(arguments: argparse.Namespace) -> None:
    """Draw and compare until the time is over. Of what all libraries print, nothing is shown."""
    told_to, silence = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    from combinations import draw_grid, draw_training
    from outcomes import outcome, simplest

    number, told = arguments.worker, set()
    while time.time() < arguments.until:
        choose = Random(f"{arguments.seed} {number}")
        training = draw_training(choose)
        for _ in range(GRIDS):
            case = draw_grid(choose, training, arguments.ranks, arguments.compiles, arguments.resumes)
            found = outcome(case)
            row = dict(
                drawn=number,
                kind=found.kind,
                why=found.why,
                message=found.message,
                seconds=round(found.seconds, 1),
                case=case,
            )
            if found.fault:
                if arguments.simplify and found.why not in told:
                    told.add(found.why)
                    row["simplest"] = simplest(case, found)[0]
                print(_line(row), file=told_to, flush=True)
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if time.time() > arguments.until or found.kind == "no model":
                break
        number += arguments.workers


def _run_one(case: dict[str, Any], simplify: bool) -> None:
    from outcomes import outcome, simplest

    found = outcome(case)
    print(f"{found.kind} in {found.seconds:.1f} s: {found.message}")
    if found.fault and simplify:
        case, found = simplest(case, found)
        print(f"simplest: {json.dumps(case)}\n{found.message}")
    sys.exit(found.fault)


def _line(row: dict[str, Any]) -> str:
    case = json.dumps(row.get("simplest", row["case"]))
    return f"FAULT {row['kind']} ({row['drawn']}): {row['message'].splitlines()[-1][:300]}\n    --case '{case}'"


def summary(rows: list[dict[str, Any]]) -> str:
    """How many were drawn, accepted and refused, by reason; and the faults by kind, each with an example's number."""
    by_kind = collections.Counter(row["kind"] for row in rows)
    seconds = sorted(row["seconds"] for row in rows if row["kind"] == "equal") or [0.0]
    lines = [
        f"{len(rows)} drawn: {by_kind['equal']} equal to one process (median {seconds[len(seconds) // 2]:.1f} s), "
        f"{by_kind['refused']} refused, {by_kind['no model']} that transformers can't build or train, "
        f"{len(rows) - sum(by_kind[kind] for kind in ('equal', 'refused', 'no model'))} faults"
    ]
    for kind in ("refused", *sorted(by_kind.keys() - {"equal", "refused", "no model"}), "no model"):
        reasons = collections.Counter(row["why"] for row in rows if row["kind"] == kind)
        lines += [f"  {kind:20} {count:4} × {why}" for why, count in reasons.most_common(40)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
