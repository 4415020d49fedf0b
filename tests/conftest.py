"""Fixtures of all tests: caches of their own, models small enough to train in a second, and runs on a grid."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Set before the libraries are imported: no test reaches for the network, or leaves something in the user's caches.
CACHE = tempfile.TemporaryDirectory(prefix="tp2d-tests-")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=f"{CACHE.name}/datasets", TP2D_CACHE=f"{CACHE.name}/tp2d",
                  TOKENIZERS_PARALLELISM="false")  # fmt: skip

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package, whatever the current folder

import grid  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from tiny import TINY  # noqa: E402

from tp2d_helpers import cgroups  # noqa: E402
from tp2d_helpers.cache import build_once, cache_dir  # noqa: E402
from tp2d_helpers.config import make_config  # noqa: E402
from tp2d_helpers.demo import build_model  # noqa: E402

MODELS: dict[str, dict[str, Any]] = {
    "qwen2-tied": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2-untied": dict(model_type="qwen2", tie_word_embeddings=False),
    "qwen2-dropout": dict(model_type="qwen2", tie_word_embeddings=True, attention_dropout=0.1),
    "llama": dict(model_type="llama", tie_word_embeddings=False),
    "qwen3": dict(model_type="qwen3", tie_word_embeddings=True, head_dim=8),
    # A window shorter than the sequence, or it would compute what Llama does.
    "mistral": dict(model_type="mistral", tie_word_embeddings=False, head_dim=8, sliding_window=32),
}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Path]:
    """tiny_model(name): the folder of a model of `MODELS` with seeded fp32 weights, about 200,000 of them."""

    def folder(name: str) -> Path:
        shape = TINY | MODELS[name]
        return build_once(cache_dir() / name, lambda scratch: build_model(shape, scratch, dtype=torch.float32))

    return folder


@pytest.fixture(scope="session")
def family() -> Callable[..., Path]:
    """family(model_type, **shape): the folder of a tiny model whose biases and norms are random, too."""
    return tiny.family


@pytest.fixture(scope="session")
def train(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., grid.Run]:
    """train(model, **settings): 20 steps of 4 samples by the notebook's `train_func`; asked again, the same run.

    `model` is a name in `MODELS` or a folder. The global batch stays 4 whatever dp_size and
    gradient_accumulation_steps are. `patch` goes to `run_grid`.
    """

    @functools.cache
    def run(model: str | Path, patch: Callable | None = None, **settings: Any) -> grid.Run:
        accumulation, dp_size = settings.get("gradient_accumulation_steps", 1), settings.get("dp_size", 1)
        defaults = dict(
            model_name=str(tiny_model(model) if model in MODELS else model), dataset_name="demo", use_gpu=False,
            tp_size=1, dp_size=1, batch_size_per_gpu=4 // dp_size // accumulation, seq_length=64, debug_steps=20,
            learning_rate=1e-3, warmup_steps=4, storage_path=str(tmp_path_factory.mktemp("run")),
        )  # fmt: skip
        config = make_config(**{**defaults, **settings})
        return grid.trained(config, patch)

    return run


@pytest.fixture
def control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, str]], None]:
    """control_groups(own, files): this process is in the groups `own`, and `files` are what these have."""

    def made(own: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(text)
        (tmp_path / "self").write_text(own)
        monkeypatch.setattr(cgroups, "ROOT", tmp_path / "cgroup")
        monkeypatch.setattr(cgroups, "OWN", tmp_path / "self")

    return made


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--all-types`: every model type at every grid."""
    parser.addoption("--all-types", action="store_true", help="every model type in test_matrix.py, test_lifetime.py")


MATRIX: list[tuple[str, ...]] = []


@pytest.fixture(scope="session")
def matrix() -> list[tuple[str, ...]]:
    """Rows (model type, grid, largest difference of losses, of norms, of weights), printed as a table at the end."""
    return MATRIX


GENERATIONS: dict[tuple[str, str], dict[str, float | str]] = {}


@pytest.fixture(scope="session")
def generations() -> dict[tuple[str, str], dict[str, float | str]]:
    """(version that wrote a folder, model type) → largest differences of logits, printed as a table at the end."""
    return GENERATIONS


OUTCOMES: list[tuple[str, str, str]] = []


@pytest.fixture(scope="session")
def outcomes() -> list[tuple[str, str, str]]:
    """Rows (fault, what became of the run, time to recover), printed as a table at the end of the tests."""
    return OUTCOMES


READERS = ("tokens", "in: 4.57", "out: 4.57", "out: pinned", "out: newest", "out: peft")


def _short(found: float | str) -> str:
    if isinstance(found, str):
        return found.partition("\n")[0][:40]
    return f"{found:.0e}" if found else "0"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tables."""
    for title, head, rows in (
        ("faults", ("fault", "outcome", "recovery"), OUTCOMES),
        (
            "exports",
            ("type", "written by", *READERS),
            [
                (kind, origin, *(_short(found.get(name, "")) for name in READERS))
                for (origin, kind), found in sorted(GENERATIONS.items(), key=lambda item: item[0][::-1])
            ],
        ),
        ("model types", ("type", "grid", "loss", "norm", "weight"), MATRIX),
    ):
        if rows:
            terminalreporter.section(title)
            for row in [head, ("---",) * len(head), *rows]:
                terminalreporter.write_line("| " + " | ".join(row) + " |")
