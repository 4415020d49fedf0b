"""How the places where the notebook runs call it."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from papermill.cli import papermill

from ci.notebook import NOTEBOOK, ROOT
from ci.notebook.check import parameters_of
from ci.notebook.run import find_file, given_parameters
from tp2d_helpers.config import Config, make_config


@pytest.fixture(scope="session")
def pins() -> dict[str, str]:
    """{package: version} of requirements.txt."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    return {item.name.lower(): str(item.specifier).removeprefix("==") for item in wanted}


@pytest.fixture(scope="session")
def settings() -> Callable[[str], Config]:
    """The settings of a run that a shell command starts: the notebook's, and what its papermill options set."""

    def settings(command: str) -> Config:
        words = shlex.split(command)
        options = words[next(number for number, word in enumerate(words) if word.startswith("-")) :]
        given = papermill.make_context("papermill", ["in.ipynb", "out.ipynb", *options]).params
        given["parameters_file"] = [find_file(file) for file in given["parameters_file"]]
        given["parameters"] = [(name, yaml.safe_load(value)) for name, value in given["parameters"]]
        own = parameters_of(nbformat.read(NOTEBOOK, as_version=4))
        return make_config(**own | given_parameters(given))

    return settings
