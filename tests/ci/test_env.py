"""ci/env.sh: the environment that the other scripts make."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from grid import ROOT

BASH = os.environ.get("TP2D_BASH", "bash")  # one of macOS's age, where there is one


@pytest.mark.parametrize("name", ["plain", "with a space"])
def test_two_first_starts_at_once(tmp_path: Path, name: str) -> None:
    """One makes the environment, the other waits; its scripts run, whatever the checkout is called."""
    (checkout := tmp_path / name / "ci").mkdir(parents=True)
    shutil.copy(ROOT / "ci" / "env.sh", checkout)
    (checkout.parent / "requirements.txt").write_text("# none\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "PYTHONPATH")}
    started = [
        subprocess.Popen([BASH, "-c", 'source ci/env.sh; echo "$PYTHON"; .venv/bin/pip --version'],
                         cwd=checkout.parent, env=environment | {"PATH": path, "HOME": str(tmp_path / "home")},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    printed = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    (python, pip), (other, _) = (out.splitlines() for out, _ in printed)
    assert python == other and " " not in python and Path(python).exists() and pip.startswith("pip ")
    assert sum(errors.count("Installing requirements.txt") for _, errors in printed) == 1
    ready = (checkout.parent / ".venv" / ".ready").read_text().strip()
    assert ready == hashlib.sha256(b"# none\n").hexdigest()
