"""What the checks of a place advise is done, to the letter: then Ray starts, and a worker works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from grid import IMPORT_PATH
from test_connection import FOLDERS

from tp2d_helpers.cache import cache_dir

DRIVER = """
from tp2d_helpers.preflight import connection
try:
    connection.connect()
except ValueError as error:
    print(error)
else:
    import ray
    print(ray.get(ray.remote(lambda: "works").remote()))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a home in it, a token, a long path and the module of a hook."""
    for name in ("home", "cache", "hf", "a" * 100, "modules"):
        (tmp_path / name).mkdir()
    (tmp_path / "token").write_text("word\n")
    (tmp_path / "modules" / "hook.py").write_text("def environment(env):\n    return env\n")
    return tmp_path


def outcome(place: Path, changes: dict[str, str | None], *launcher: str) -> str:
    """The last line of a driver in an environment with these changes: None takes a variable away."""
    variables = {name: value for name, value in os.environ.items() if name not in (*FOLDERS, "RAY_ADDRESS")}
    variables |= {"PYTHONPATH": IMPORT_PATH, "HOME": str(place / "home"), "RAY_TMPDIR": "/tmp"}
    variables["TP2D_CACHE"] = str(cache_dir())  # where the demo is already
    for name, value in changes.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value.format(place=place, modules=f"{IMPORT_PATH}{os.pathsep}{place}/modules")
    ran = subprocess.run([*launcher, sys.executable, "-c", DRIVER], env=variables, cwd=place,
                         capture_output=True, text=True, timeout=120)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1]


NO_LETTERS = dict(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="POSIX", LANG="POSIX")
ADVICE = [
    (dict(HOME="/proc/none", TP2D_CACHE=None), "set HOME to a folder that can, or TP2D_CACHE, HF_HOME",
     [dict(TP2D_CACHE="{place}/cache", HF_HOME="{place}/hf"), dict(HOME="{place}/home")]),
    (dict(RAY_AUTH_TOKEN_PATH="{place}/none"),
     "write the cluster's token into it (for a Ray of this machine alone, any word), or unset it",
     [dict(RAY_AUTH_TOKEN_PATH="{place}/token"), dict(RAY_AUTH_TOKEN_PATH=None)]),
    (dict(RAY_TMPDIR="/proc/ray"), "set it to a folder that can", [dict(RAY_TMPDIR="/tmp/tp2d-ray")]),
    (dict(RAY_TMPDIR="{place}/" + "a" * 100), "set it to a short path that can be written", [dict(RAY_TMPDIR="/tmp")]),
    (dict(TP2D_CACHE="cache"), "set it to {place}/cache", [dict(TP2D_CACHE="{place}/cache")]),
    (dict(RAY_TRAIN_V2_ENABLED="0"), "unset it, and start Python again", [dict(RAY_TRAIN_V2_ENABLED=None)]),
    (dict(DS_ACCELERATOR="xpu"), "unset it, and start Python again", [dict(DS_ACCELERATOR=None)]),
    (NO_LETTERS, "set PYTHONUTF8 to 1 (or LANG to C.UTF-8, and unset LC_ALL), and start Python again",
     [dict(PYTHONUTF8="1"), dict(PYTHONUTF8=None, LANG="C.UTF-8", LC_ALL=None)]),
    (dict(GLOO_SOCKET_IFNAME="eth77"), "unset it, or name one of these",
     [dict(GLOO_SOCKET_IFNAME="lo"), dict(GLOO_SOCKET_IFNAME=None)]),
    (dict(RAY_RUNTIME_ENV_HOOK="hook.environment"), "unset it, or add its module's folder to PYTHONPATH",
     [dict(PYTHONPATH="{modules}"), dict(RAY_RUNTIME_ENV_HOOK=None)]),
    (dict(RAY_ADDRESS="localhost"), "or unset it to use this machine alone", [dict(RAY_ADDRESS=None)]),
    (dict(RAY_ADDRESS="127.0.0.1:9"), "or unset RAY_ADDRESS to use this machine alone", [dict(RAY_ADDRESS=None)]),
]  # fmt: skip


@pytest.mark.parametrize(
    "place_has, advice, cures",
    [pytest.param(*case, marks=[pytest.mark.slow] * (number > 1)) for number, case in enumerate(ADVICE)],
    ids=[",".join(case[0]) for case in ADVICE],
)
def test_advice_that_is_followed(
    place: Path, place_has: dict[str, str], advice: str, cures: list[dict[str, str | None]]
) -> None:
    assert advice.format(place=place) in outcome(place, place_has)
    for cure in cures:
        assert outcome(place, place_has | cure) == "works", cure


@pytest.mark.slow
def test_a_user_without_a_name(place: Path) -> None:
    """As in a container that runs under any user id: it can have a name, and then all works."""
    nameless = dict(USER=None, LOGNAME=None, LNAME=None, USERNAME=None)
    as_another = ["unshare", "--user", "--map-user=4711"]
    if subprocess.run([*as_another, "true"], capture_output=True).returncode:
        pytest.skip("this user can't have another id in a namespace")
    assert outcome(place, nameless, *as_another).endswith("set USER to any name")
    assert outcome(place, nameless | dict(USER="any"), *as_another) == "works"
