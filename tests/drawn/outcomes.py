"""What becomes of a drawn combination: refused on the driver, equal to one process, or a fault."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grid
import pytest
import torch
from combinations import ONE_PROCESS, Case, settings_of, simpler
from grid import Run, assert_alike_on_all_ranks, assert_equal_runs, differences
from materials import accept, data_of, model_of
from plain import plain_run
from replay import Replay

from tp2d_helpers.checkpoint.resize import convert
from tp2d_helpers.checkpoint.run_folder import newest_checkpoint
from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.model import engine
from tp2d_helpers.model.apart import why_masked
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.rehearsal import rehearse
from tp2d_helpers.speed import cross_entropy, documents, graphs, layers, loss, optimizations
from tp2d_helpers.training.metrics import keep_until

LOSS, NORM = 0.01, 0.03  # tolerances in bf16 and fp16, relative


@dataclass
class Outcome:
    """What became of a combination.

    Attributes:
        kind: "equal"; "refused" by preflight; "no model", where transformers itself can't build or train it; or a
            fault: "preflight", "reference", "run", "resume" (an exception there), "difference", "plain".
        message: of the error; without one, the largest differences.
    """

    kind: str
    message: str = ""
    seconds: float = 0.0

    @property
    def fault(self) -> bool:
        """Whether the package is at fault."""
        return self.kind not in ("equal", "refused", "no model")

    @property
    def why(self) -> str:
        """What is alike in messages that are alike: the last line, without numbers, paths and what is quoted."""
        last = [line for line in self.message.splitlines() if line.strip()][-1:]
        return re.sub(r"'[^']*'|[-+]?\d[\d.,e+-]*|/\S+", "…", "".join(last))[:140]


class Trouble(Exception):
    """Ends a combination with a kind of `Outcome`."""


def outcome(case: Case) -> Outcome:
    """Check a combination as preflight does, train it, and compare it with one process."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tp2d-drawn-") as folder:
        try:
            kind, message = "equal", _compared(case, Path(folder))
        except Trouble as trouble:
            kind, message = trouble.args
    return Outcome(kind, message, time.monotonic() - begun)


def _compared(case: Case, folder: Path) -> str:
    """The largest differences. Raises `Trouble`."""
    model = _try("no model", model_of, json.dumps(case["model"]), case["data"] == "chats")
    config = _accepted(case, "grid", folder)
    base = {name: case[name] for name in ("model", "data", "training")} | dict(grid=ONE_PROCESS)
    one = _try("reference", _reference, json.dumps(base))
    patch = functools.partial(stand_in, json.dumps(case["stand_ins"])) if case["stand_ins"] else None
    if case.get("resume"):
        config = config.change(checkpoint_interval=2)
    run = _try("run", grid.trained, config, patch)
    found = _try("difference", compare, run, one)
    if case.get("resume") and len(run.records) > 2:
        shutil.rmtree(newest_checkpoint(config.run_dir)[0])
        keep_until(config.run_dir / "metrics.jsonl", 2)
        resumed = _accepted(case, "resume", folder)
        if any(getattr(resumed, name) != getattr(config, name) for name in ("tp_size", "dp_size", "zero_stage")):
            _try("conversion", convert, newest_checkpoint(config.run_dir)[0])
        _try("resumed difference", compare, _try("resumed run", grid.trained, resumed), one)
    if case.get("plain") and config.precision == "fp32" and not rehearse(ModelFacts.read(model).config).own_loss:
        _try("plain difference", assert_equal_runs, one, _try("plain run", plain_run, one.config))
    return found


def _accepted(case: Case, part: str, folder: Path) -> Config:
    settings = settings_of(case, part)
    if settings is None:
        raise Trouble("refused", "the global batch can't be cut so")
    model = model_of(json.dumps(case["model"]), case["data"] == "chats")
    place = dict(model_name=model, dataset_name=data_of(case["data"]), storage_path=str(folder), experiment_name="run")
    return _try("preflight", accept, dict(use_gpu=False, trackers="none", **settings, **place))


@functools.lru_cache(maxsize=4)
def _reference(base: str) -> Run:
    """What one process makes of the same training."""
    with tempfile.TemporaryDirectory(prefix="tp2d-drawn-") as folder:
        return grid.trained(_accepted(json.loads(base), "grid", Path(folder)))


def _try(kind: str, function: Callable, *args: Any) -> Any:
    try:
        return function(*args)
    except Trouble:
        raise
    except ConfigError as error:
        raise Trouble("refused" if kind == "preflight" else kind, f"ConfigError: {error}") from error
    except AssertionError as error:
        raise Trouble(kind, str(error).partition("\nassert ")[0]) from error
    except Exception as error:
        told = str(error) if isinstance(error, RuntimeError) and str(error).startswith("rank") else ""
        raise Trouble(kind, (told or traceback.format_exc()).strip()) from error


def compare(run: Run, one: Run) -> str:
    """Assert that a run is that of one process: in fp32 the same, in bf16 and fp16 much the same. Returns how much so.

    In each of them, what several ranks hold must be the same bit for bit.
    """
    exact = run.config["precision"] == "fp32"
    if exact:
        assert_equal_runs(run, one)
    assert_alike_on_all_ranks(run)
    if any(record["grad_norm"] is None for record in (*run.records, *one.records)):
        return "steps of fp16 were left out: which overflow depends on how a batch is cut"
    for now, then in zip(run.records, one.records, strict=True):
        for name, tolerance in (("loss", LOSS), ("eval_loss", 1e-5 if exact else LOSS), ("grad_norm", NORM)):
            new, old = (math.inf if record[name] is None else record[name] for record in (now, then))
            same = new == pytest.approx(old, rel=tolerance, nan_ok=True)
            assert same, f"step {then['step']}: {name} {now[name]} != {then[name]}"
    return "loss {:.0e}, norm {:.0e}, weights {:.0e}".format(*differences(run, one)) if exact else ""


def stand_in(given: str, names: dict[str, Any]) -> None:
    """For `trained(patch=)`: chunks of the loss, replayed passes, attention by document, a compiler's backend."""
    chosen, stand_ins = optimizations.chosen_optimizations, json.loads(given)
    if "rows" in stand_ins:
        cross_entropy.ROWS, loss.worth_chunks = stand_ins["rows"], lambda *_: True
    if "graphs" in stand_ins:

        def with_graphs(config: dict[str, Any], on_gpu: bool) -> tuple[set[str], str]:
            """As on a GPU."""
            return chosen(config, on_gpu)[0] | ({"cuda_graph"} & chosen(config, True)[0]), ""

        optimizations.chosen_optimizations = with_graphs
        graphs._graphed, graphs._waits_for_host = Replay, lambda *_: True
    if "attend" in stand_ins:

        def keep_apart(model: torch.nn.Module) -> None:
            """As on a GPU, without its kernel."""
            if not why_masked(model.config, torch.bfloat16):
                model.set_attn_implementation(documents.NAME)

        engine.keep_documents_apart = keep_apart
    if "backend" in stand_ins:
        layers.compile_layers = functools.partial(layers.compile_layers, backend=stand_ins["backend"])


def simplest(case: Case, found: Outcome, tries: int = 40) -> tuple[Case, Outcome]:
    """The simplest combination found that fails in the same way, and how it does."""
    others = simpler(case)
    for _ in range(tries):
        if (other := next(others, None)) is None:
            break
        if other != case and ((now := outcome(other)).kind, now.why) == (found.kind, found.why):
            case, found, others = other, now, simpler(other)
    return case, found
