"""The folder for Anyscale's template repository keeps that repository's rules."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import yaml

from ci.anyscale.__main__ import LOCK, NAME, REPOSITORY, Links, main, requirements
from ci.notebook import NOTEBOOK, ROOT
from ci.notebook.cells import tagged
from tp2d_helpers.config import Config

URL = re.compile(r"\]\(([^)\s]+)|<[^>]+(?:src|href)=[\"']?([^\"'\s>]+)")
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)(?:\[[a-z]+\])?==([^\s;\\]+)", re.MULTILINE)
PLACES = (f"{REPOSITORY}/blob/main/", "https://raw.githubusercontent.com/anyscale/templates/main/")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anyscale") / "out"
    assert main(["make", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def template(out: Path) -> Path:
    return out / "templates" / NAME


@pytest.fixture(scope="module")
def entry(out: Path) -> dict:
    [entry] = yaml.safe_load((out / "BUILD.yaml").read_text())
    return entry


def test_the_notebook_has_no_outputs_and_all_of_its_cells(template: Path) -> None:
    made, own = (nbformat.read(file, as_version=4) for file in (template / "README.ipynb", NOTEBOOK))
    nbformat.validate(made)
    assert all(not cell.outputs and cell.execution_count is None for cell in made.cells if cell.cell_type == "code")
    cells = [cell for cell in made.cells if not cell.id.startswith("anyscale-")]
    assert [cell.metadata for cell in cells] == [cell.metadata for cell in own.cells]
    assert [cell.source for cell in cells if cell.cell_type == "code"] == [
        cell.source for cell in own.cells if cell.cell_type == "code"
    ]
    assert len(tagged(made, "parameters")) == 1
    assert [cell.id for cell in made.cells[1:4]] == ["anyscale-0", "anyscale-1", "anyscale-2"]  # before any import


def test_the_readme_is_what_nbconvert_makes_of_the_notebook(template: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nbconvert", "--to", "markdown", str(template / "README.ipynb"),
               "--output", "README", "--output-dir", str(tmp_path)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    assert (template / "README.md").read_bytes() == (tmp_path / "README.md").read_bytes()


def test_links_are_absolute_and_lead_to_what_is_there(out: Path, template: Path) -> None:
    notebook = nbformat.read(template / "README.ipynb", as_version=4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    texts += [file.read_text() for file in template.rglob("*.md")]
    urls = [found[0] or found[1] for text in texts for found in URL.findall(text)]
    assert not [url for url in urls if not url.startswith(("https://", "http://", "#", "data:"))]
    own = {
        place: [url.removeprefix(place).partition("#")[0] for url in urls if url.startswith(place)] for place in PLACES
    }
    assert len(own[PLACES[0]]) > 10 and len(own[PLACES[1]]) > 5
    assert not [path for paths in own.values() for path in paths if not (out / path).is_file()]
    assert all(path.endswith(".png") for path in own[PLACES[1]])


def test_another_repository_and_a_dead_link() -> None:
    links = Links("https://github.com/me/mine")
    text = '![a](images/grid.png) [b](https://a.b/c) [d](#e) [f](ci/benchmark/results/h100x2.json "ours: mfu")'
    made = links.absolute(text, ROOT)
    raw, pages = "https://raw.githubusercontent.com/me/mine/main", "https://github.com/me/mine/blob/main"
    assert made == (
        f"![a]({raw}/templates/{NAME}/images/grid.png) [b](https://a.b/c) [d](#e) "
        f'[f]({pages}/templates/{NAME}/ci/benchmark/results/h100x2.json "ours: mfu")'
    )
    with pytest.raises(ValueError, match=r"leads to images/no\.png, which is no file"):
        links.absolute("![a](images/no.png)", ROOT)


def test_the_helpers_are_all_there(template: Path) -> None:
    own, made = (
        {file.relative_to(root): file.read_bytes() for file in (root / "tp2d_helpers").rglob("*.py")}
        for root in (ROOT, template)
    )
    assert own == made
    assert not list(template.rglob("__pycache__"))


def test_requirements_are_what_training_needs(template: Path, pins: dict[str, str]) -> None:
    text = (template / "requirements.txt").read_text()
    named = dict(PIN.findall(text.lower()))
    assert {"torch", "deepspeed", "ray", "transformers", "matplotlib"} < set(named)
    assert not {"pytest", "nbval", "ruff", "jupyterlab", "papermill"} & set(named)
    assert named.items() <= pins.items()
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    assert all("==" in line for line in lines if line)
    with pytest.raises(ValueError, match="its sections must begin with"):
        requirements("# Training\ntorch==1\n\n# Checks\npytest==1\n")


def test_the_lock_fits_the_requirements(template: Path) -> None:
    """If it doesn't: `python ci/anyscale lock`, and commit what it writes."""
    text = (template / LOCK).read_text()
    wanted = dict(PIN.findall((template / "requirements.txt").read_text().lower()))
    locked = dict(PIN.findall(text.lower()))
    assert wanted.pop("ray") and "ray" not in locked  # the image's
    assert {name: locked.get(name) for name in wanted} == wanted
    for package in re.split(r"\n(?=\S)", text):
        assert package.startswith("#") or re.search(r"--hash=sha256:[0-9a-f]{64}\b", package), package
    assert "://" not in text  # of no other index than the one that the reader uses


def test_the_notebook_installs_the_lock_before_it_connects(template: Path) -> None:
    notebook = nbformat.read(template / "README.ipynb", as_version=4)
    _, install, connect = notebook.cells[1:4]
    assert install.source.startswith("%%bash\n") and f"-r {LOCK}" in install.source
    compile(connect.source, "connect", "exec")
    assert f'"{LOCK}"' in connect.source and '"tp2d_helpers"' in connect.source


def test_the_entry_names_what_is_there(out: Path, entry: dict, pins: dict[str, str]) -> None:
    assert set(entry) == {"name", "owner_team", "dir", "cluster_env", "compute_config", "test"}
    assert entry["name"] == NAME and (out / entry["dir"]).is_dir() and Path(entry["dir"]).name == NAME
    assert set(entry["compute_config"]) == {"AWS", "GCP"}
    for path in entry["compute_config"].values():
        assert Path(path).parent == Path("configs", NAME) and (out / path).is_file()
    test = entry["test"]
    assert set(test) == {"command", "tests_path", "timeout_in_sec"} and test["timeout_in_sec"] <= 1800
    assert (out / test["tests_path"] / test["command"].split()[-1]).is_file()
    image = re.fullmatch(r"anyscale/ray:(\d+\.\d+\.\d+)-py(\d)(\d+)-cu\d+", entry["cluster_env"]["image_uri"])
    assert image and image[1] == pins["ray"] and image[2] + "." + image[3] == "3.12"


@pytest.mark.parametrize("cloud", ["AWS", "GCP"])
def test_nodes_of_four_gpus(out: Path, entry: dict, cloud: str) -> None:
    config = yaml.safe_load((out / entry["compute_config"][cloud]).read_text())
    assert set(config) == {"head_node", "worker_nodes", "enable_cross_zone_scaling"}
    assert config["head_node"]["resources"] == {"CPU": 0}
    [worker] = config["worker_nodes"]
    gpus = {"g4dn.12xlarge": 4, "n1-standard-32-nvidia-t4-16gb-4": 4}[worker["instance_type"]]
    assert worker["max_nodes"] * gpus == 4


def test_the_test_script(out: Path, settings: Callable[[str], Config], pins: dict[str, str]) -> None:
    script = out / "tests" / NAME / "tests.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().replace("\\\n", " ").splitlines()
    assert "set -euxo pipefail" in lines
    assert not [line for line in lines if re.search(r"(?<!uv )pip install", line)]  # would reach the workers unhashed
    assert f"papermill=={pins['papermill']}" in script.read_text()
    [run] = [line for line in lines if line.startswith("papermill ")]
    assert run.startswith("papermill README.ipynb /tmp/tp_autotp.out.ipynb --log-output --kernel python3 --cwd . ")
    config = settings(run)
    assert config.num_workers == 4 and config.debug_steps and config.cluster_wait_seconds


def test_what_is_there_is_not_overwritten(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make", str(out)]) == 1
    assert "is not empty; name a new folder" in capsys.readouterr().err
