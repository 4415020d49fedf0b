"""What an import loads: nothing that isn't used, and the names that readers know from the package itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
from grid import ROOT

import tp2d_helpers

HEAVY = ("torch", "ray", "deepspeed", "transformers", "datasets", "numpy", "matplotlib")
ROOMS = ("cache", "data", "speed", "model", "checkpoint", "training", "planning", "preflight")


@pytest.mark.parametrize("code", [
    "import tp2d_helpers, " + ", ".join(f"tp2d_helpers.{room}" for room in ROOMS),
    "import tp2d_helpers.config",
    "from tp2d_helpers.checkpoint.export import main\ntry: main(['--help'])\nexcept SystemExit: pass",
], ids=["package and rooms", "config", "export --help"])  # fmt: skip
def test_light(code: str) -> None:
    code += f"\nimport sys\nprint('loaded', [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_public_names(room: str) -> None:
    """Each name that a package hands out is there; an unknown one is an AttributeError."""
    package = __import__(f"tp2d_helpers.{room}", fromlist=["x"]) if room else tp2d_helpers
    for name in package.__getattr__.names:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(package, "no_such_name")  # noqa: B009


def test_names_of_the_published_template() -> None:
    known = {"get_mixed_precision_dtype", "create_dataloader", "ModelParallelUnit", "setup_model_with_autotp",
             "save_checkpoint", "load_checkpoint"}  # fmt: skip
    assert set(tp2d_helpers.__all__) == known
