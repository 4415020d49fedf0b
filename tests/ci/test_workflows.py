"""GitHub's workflows: valid by GitHub's schema, and careful with what they may do."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ci.notebook import ROOT
from tp2d_helpers.config import Config

FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))


def problems(*files: Path, schema: str = "vendor.github-workflows") -> str:
    """What `check-jsonschema` finds in workflows; its schemas come with it."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def parsed(file: Path) -> dict:
    content = yaml.safe_load(file.read_text())
    return content | {"on": content.pop(True)}  # YAML 1.1 takes "on" for true


def commands(file: Path) -> list[str]:
    """What the steps run."""
    return [step["run"] for job in parsed(file)["jobs"].values() for step in job["steps"] if "run" in step]


def test_schema(tmp_path: Path) -> None:
    assert [file.stem for file in FILES] == ["cpu", "gpu", "newest"]
    assert problems(*FILES) == "" and problems(*FILES, schema="custom.github-workflows-require-timeout") == ""
    broken = tmp_path / "broken.yml"
    broken.write_text(FILES[0].read_text().replace("runs-on:", "run-on:"))
    assert "run-on" in problems(broken)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_permissions_and_versions(file: Path) -> None:
    content = parsed(file)
    assert content["permissions"] == {"contents": "read"} and "concurrency" in content
    assert "pull_request_target" not in content["on"]  # it would hand secrets to a fork's code
    for job in content["jobs"].values():
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in used)
        [checkout] = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
        assert checkout["with"]["persist-credentials"] is False


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_commands_are_shell_and_their_scripts_are_there(file: Path) -> None:
    for command in commands(file):
        assert "${{" not in command  # what a stranger wrote would be run
        subprocess.run(["bash", "-n"], input=command, text=True, check=True)
        scripts = re.findall(r"\bci/\S+\.sh\b", command)
        assert all((ROOT / script).is_file() for script in scripts)


def test_both_commands_of_the_readme_run_on_the_oldest_and_newest_python() -> None:
    [job] = parsed(ROOT / ".github/workflows/cpu.yml")["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.12"]
    assert commands(ROOT / ".github/workflows/cpu.yml") == ["bash ci/run_notebook.sh", "bash ci/run_tests.sh"]
    assert all(command in (ROOT / "README.md").read_text() for command in commands(ROOT / ".github/workflows/cpu.yml"))


def test_forks_get_no_gpu(settings: Callable[[str], Config]) -> None:
    content = parsed(ROOT / ".github/workflows/gpu.yml")
    [job] = content["jobs"].values()
    assert content["on"]["pull_request"] == {"types": ["labeled"]} and "self-hosted" in job["runs-on"]
    assert "github.event.pull_request.head.repo.full_name == github.repository" in job["if"]
    notebook, tests = commands(ROOT / ".github/workflows/gpu.yml")
    assert settings(notebook.replace("$STEPS", "20")).debug_steps == 20
    assert (ROOT / tests.split("#")[0].split()[-1]).is_dir()


def test_the_newest_libraries_are_unpinned_and_no_others(tmp_path: Path) -> None:
    """The `sed` of newest.yml, done to requirements.txt."""
    [install] = [command for command in commands(ROOT / ".github/workflows/newest.yml") if "sed" in command]
    line = install.splitlines()[0]
    subprocess.run(["bash", "-c", line], cwd=ROOT, env={"RUNNER_TEMP": str(tmp_path)}, check=True)
    before, after = (file.read_text().splitlines() for file in (ROOT / "requirements.txt", tmp_path / "newest.txt"))
    changed = [new.split("#")[0].strip() for old, new in zip(before, after, strict=True) if old != new]
    assert {"torch", "deepspeed", "ray[train]", "transformers"} <= set(changed)
    assert not {"pydantic", "pytest", "jupyterlab"} & set(changed) and not any("==" in name for name in changed)
