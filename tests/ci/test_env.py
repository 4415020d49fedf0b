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
HASH = hashlib.sha256(b"# none\n").hexdigest()


def checkout(folder: Path) -> Path:
    """One with the script and requirements.txt alone."""
    (folder / "ci").mkdir(parents=True)
    shutil.copy(ROOT / "ci" / "env.sh", folder / "ci")
    (folder / "requirements.txt").write_text("# none\n")
    return folder


def sourced(folder: Path, home: Path) -> subprocess.Popen:
    """Prints the interpreter, and what a script of the environment says."""
    (home / "bin").mkdir(parents=True, exist_ok=True)
    if not (home / "bin" / "python3").exists():
        (home / "bin" / "python3").symlink_to(sys.executable)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "PYTHONPATH")}
    return subprocess.Popen([BASH, "-c", 'source ci/env.sh; echo "$PYTHON"; .venv/bin/pip --version'], cwd=folder,
                            env=kept | {"PATH": f"{home}/bin:{os.environ['PATH']}", "HOME": str(home)},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "with a space"])
def test_two_first_starts_at_once(tmp_path: Path, name: str) -> None:
    """One makes the environment, the other waits; its scripts run, whatever the checkout is called."""
    folder = checkout(tmp_path / name)
    started = [sourced(folder, tmp_path / "home") for _ in range(2)]
    printed = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    (python, pip), (other, _) = (out.splitlines() for out, _ in printed)
    assert python == other and " " not in python and Path(python).exists() and pip.startswith("pip ")
    assert sum(errors.count("Installing requirements.txt") for _, errors in printed) == 1
    assert (folder / ".venv" / ".ready").read_text().strip() == HASH
    assert (folder / "requirements.txt").read_text() == "# none\n"  # by which they wait for each other


@pytest.mark.parametrize("ours", [True, False])
def test_an_environment_that_is_there(tmp_path: Path, ours: bool) -> None:
    """In a path with a space: one of an older version, to which it had a link, or somebody's own, which is kept."""
    folder, home = checkout(tmp_path / "a b"), tmp_path / "home"
    (folder / ".venv").mkdir()
    (folder / ".venv" / (".ready" if ours else "pyvenv.cfg")).touch()
    summed = subprocess.run(["cksum"], input=f"{folder}\n", capture_output=True, text=True, check=True).stdout.split()[
        0
    ]
    (home / ".cache" / "tp2d").mkdir(parents=True)
    (home / ".cache" / "tp2d" / f"venv-{summed}").symlink_to(folder / ".venv")
    process = sourced(folder, home)
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode == 0) == ours, errors
    if ours:
        assert printed.splitlines()[1].startswith("pip ") and (folder / ".venv").is_symlink()
    else:
        assert "was made by something else" in errors and (folder / ".venv" / "pyvenv.cfg").exists()


def test_a_link_that_a_user_made(tmp_path: Path) -> None:
    """Its target is made where the link says, not where the script is called."""
    folder = checkout(tmp_path / "here")
    (folder / ".venv").symlink_to("../elsewhere")
    process = sourced(folder, tmp_path / "home")
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and printed.startswith(f"{tmp_path}/elsewhere/bin/python"), errors
