"""What would keep Ray from starting, or end a run with another library's error, is told in a line, and in time."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
import ray
from grid import IMPORT_PATH

from tp2d_helpers.config import ConfigError
from tp2d_helpers.preflight import address, connection
from tp2d_helpers.preflight.environment import check_environment

FOLDERS = ("TP2D_CACHE", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN",
           "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")  # fmt: skip
PATCH = f"{platform.python_version()}9"  # of this Python, another patch


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, on which all caches depend."""
    for name in FOLDERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name, value, parts", [
    ("RAY_TRAIN_V2_ENABLED", "0", ["turns off the version of Ray Train", "unset it"]),
    ("RAY_TRAIN_V2_ENABLED", "yes", ["turns off the version of Ray Train", "unset it"]),  # as Ray reads it
    ("DS_ACCELERATOR", "xpu", ["a device that this does not know"]),
    ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1", ["lets checkpoints execute code"]),
    ("PYTHONWARNINGS", "default,error::DeprecationWarning", ["makes errors of what libraries warn of", "unset it"]),
    ("PYTHONWARNINGS", "err", ["makes errors of what libraries warn of", "unset it"]),
    ("TP2D_CACHE", "/proc/cache", ["/proc/cache can't be written", "set it to a folder that can"]),
    ("TP2D_CACHE", "cache", ["no absolute path", "set it to /"]),
    ("HF_HOME", "/proc/hf", ["/proc/hf/datasets can't be written", "set it to a folder that can"]),
    ("HF_DATASETS_CACHE", "/proc/hf", ["/proc/hf can't be written"]),
    ("RAY_TMPDIR", "/proc/ray", ["/proc/ray can't be written"]),
    ("GLOO_SOCKET_IFNAME", "eth77", ["there is no such interface, but ", "lo"]),
    ("NCCL_SOCKET_IFNAME", "eth77,=ib", ["there is no such interface"]),
    ("GLOO_SOCKET_IFNAME", "lo,eth77", ["there is no such interface"]),  # gloo takes all that are listed
    ("GLOO_SOCKET_IFNAME", "^docker", ["there is no such interface"]),
    ("NCCL_SOCKET_IFNAME", "=l", ["there is no such interface"]),
])  # fmt: skip
def test_a_variable_that_stands_in_the_way(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, parts: list[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        check_environment(starts_ray=True)
    message = str(caught.value)
    assert message.startswith(f"{name} = {value!r}: ") and "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name, value", [
    ("RAY_TRAIN_V2_ENABLED", "1"), ("RAY_TRAIN_V2_ENABLED", "True"), ("DS_ACCELERATOR", "cpu"),
    ("PYTHONWARNINGS", "always"), ("PYTHONWARNINGS", "ignore:an error:UserWarning:some.errors"),
    ("GLOO_SOCKET_IFNAME", "lo"), ("NCCL_SOCKET_IFNAME", "^docker"), ("NCCL_SOCKET_IFNAME", "l"),
    ("NCCL_SOCKET_IFNAME", "=lo"), ("NCCL_SOCKET_IFNAME", "eth77,lo:6"),
])  # fmt: skip
def test_a_variable_that_does_not(home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    check_environment(starts_ray=True)


def test_a_home_that_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused only as far as it is needed: everything that goes there can go elsewhere."""
    monkeypatch.setenv("HOME", "/proc")
    with pytest.raises(ConfigError) as caught:
        check_environment(starts_ray=True)
    message = str(caught.value)
    assert message.startswith("HOME = '/proc': /proc/.cache/tp2d can't be written (") and "\n" not in message
    assert message.endswith("set HOME to a folder that can, or TP2D_CACHE, HF_HOME")
    for name in ("TP2D_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(home / name))
    check_environment(starts_ray=True)


def test_a_user_without_a_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under any user id."""

    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", unknown)
    monkeypatch.delenv("USER", raising=False)
    with pytest.raises(ConfigError, match=r"^USER = not set: .*set USER to any name$"):
        check_environment()


def test_a_locale_without_letters(home: Path) -> None:
    """As of a container without a locale, in which Python's own way out is off."""
    check = "from tp2d_helpers.preflight.environment import check_environment; check_environment()"
    environment = {name: value for name, value in os.environ.items() if name != "LANG"}
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": IMPORT_PATH}
    for utf8, code in (("0", 1), ("1", 0)):
        run = subprocess.run([sys.executable, "-c", check], env=environment | {"PYTHONUTF8": utf8}, capture_output=True)
        assert run.returncode == code, run.stderr
        assert (b"ConfigError: PYTHONUTF8 = '0': Python writes file names, " in run.stderr) == bool(code)
        assert (b"set PYTHONUTF8 to 1 (or LANG to C.UTF-8, and unset LC_ALL)" in run.stderr) == bool(code)


def test_an_address_at_which_something_else_answers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and says nothing. Ray would wait for more than three minutes."""
    with socket.create_server(("", 0)) as server:  # Ray asks at the outside address
        there = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", there)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(address, "ANSWER_SECONDS", 4)
        silence = rf"RAY_ADDRESS = '{there}'.*: no Ray cluster answers there \(nothing within 4 s\)"
        with pytest.raises(ConfigError, match=silence):
            connection.connect()


def test_a_head_that_was_killed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With "auto", Ray takes its address from the raylets that run, or from what the last `ray start` wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        there = f"127.0.0.1:{probe.getsockname()[1]}"
    (home / "ray").mkdir()
    (home / "ray" / "ray_current_cluster").write_text(there)
    for name, value in {"RAY_TMPDIR": str(home), "RAY_ADDRESS": "auto"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    raylet = ["raylet", "-c", "import time; time.sleep(60)", f"--gcs-address={there}"]  # whatever else runs here
    process = subprocess.Popen(raylet, executable=sys.executable)
    began = time.monotonic()
    try:
        with pytest.raises(ConfigError, match=rf"'auto' \(\S+{there[9:]}\): no Ray cluster answers .*refused"):
            connection.connect()
    finally:
        process.kill()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("there", [
    "127.0.0.1", "localhost", "10.0.0.1:6379/", "anyscale://my-cluster", " auto", "AUTO", "head:port", "head:99999",
    "user@head:6379", " ", "::1:6379",
])  # fmt: skip
def test_an_address_that_is_none(home: Path, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", there)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError) as caught:
        connection.connect()
    message = str(caught.value)
    assert message.startswith(f"RAY_ADDRESS = {there!r}: is no address of a Ray cluster; set it to host:port of")
    assert "to auto, or unset it" in message and "\n" not in message


@pytest.mark.parametrize("there", ["http://head:8265", "HTTPS://head", " http://head:8265/"])
def test_the_address_of_a_job_server(home: Path, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", there)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"is the address of a job server, .* set it to host:port"):
        connection.connect()


@pytest.mark.parametrize("there", ["head:6379", "10.0.0.1:6379", "[::1]:6379", "auto", "local"])
def test_an_address_that_is_one(there: str) -> None:
    address.check_form(there)


@pytest.mark.parametrize("cluster, level, refused", [
    ({}, "patch", False), ({"ray_version": "2.9.3"}, "patch", True), ({"python_version": "3.9.1"}, "minor", True),
    ({"python_version": PATCH}, "patch", True), ({"python_version": PATCH}, "minor", False),
])  # fmt: skip
def test_a_cluster_of_other_versions(
    monkeypatch: pytest.MonkeyPatch, cluster: dict[str, str], level: str, refused: bool
) -> None:
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", level)
    there = {"ray_version": ray.__version__, "python_version": platform.python_version()} | cluster
    said = (
        rf"has Ray {there['ray_version']} on Python {there['python_version']}, and here it is Ray {ray.__version__} on"
    )
    with pytest.raises(ConfigError, match=said) if refused else contextlib.nullcontext():
        address.check_versions("'auto'", there if cluster else {})


UV = """
import os, sys
from tp2d_helpers.preflight import connection
try:
    connection.connect()
except ValueError as error:
    print(error)
else:
    import ray
    print(ray.get(ray.remote(lambda: sys.executable).remote()))
"""


def under_uv(folder: Path, **environment: str) -> tuple[str, float]:
    """What the last line of a driver is whose parent calls itself "uv run", and after how many seconds."""
    (folder / "driver.py").write_text(UV)
    above = "import subprocess, sys; sys.exit(subprocess.run([sys.argv[-2], sys.argv[-1]]).returncode)"
    (folder / "run").write_text(above)
    command = ["uv", "run", sys.executable, str(folder / "driver.py")]
    environment = os.environ | {"PYTHONPATH": IMPORT_PATH, "RAY_TMPDIR": "/tmp"} | environment
    began = time.monotonic()
    ran = subprocess.run(command, executable=sys.executable, env=environment, cwd=folder, capture_output=True,
                         text=True, timeout=180)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1], time.monotonic() - began


@pytest.mark.slow
def test_under_uv_run_workers_have_the_drivers_python(tmp_path: Path) -> None:
    assert under_uv(tmp_path)[0] == sys.executable


@pytest.mark.parametrize("environment, parts", [
    ({"RAY_ADDRESS": "auto"}, ["'uv run ", "set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 and start Python again"]),
    ({"RAY_RUNTIME_ENV_HOOK": "no_such.hook"}, ["RAY_RUNTIME_ENV_HOOK = 'no_such.hook': ", "No module named"]),
    pytest.param({"RAY_RUNTIME_ENV_HOOK": "hook.python"}, ["py_executable = '", "RAY_RUNTIME_ENV_HOOK = 'hook.p"],
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_a_place_that_starts_workers_by_another_python(
    tmp_path: Path, environment: dict[str, str], parts: list[str]
) -> None:
    (tmp_path / "hook.py").write_text("def python(env):\n    return env | {'py_executable': '/no/such/python'}\n")
    said, seconds = under_uv(tmp_path, **environment | {"PYTHONPATH": f"{IMPORT_PATH}{os.pathsep}{tmp_path}"})
    assert all(part in said for part in parts) and seconds < 60, said


LAUNCH = """
import ray, sys
from tp2d_helpers.preflight import connection

quote, connection.shlex.quote, connection.WORKER_SECONDS = connection.shlex.quote, lambda text: text, 5
try:
    connection.connect()
except ValueError as error:
    print(error)
connection.shlex.quote, connection.WORKER_SECONDS = quote, 60
connection.connect()
print(ray.get(ray.remote(lambda: sys.executable).options(runtime_env={"env_vars": {"A": "b"}}).remote()))
"""


def test_a_python_with_a_space_in_its_path(tmp_path: Path) -> None:
    """Its workers start. Where they don't, whatever the reason is, that is said after a limit of time."""
    folder = tmp_path / "my $env; (1)"
    venv.EnvBuilder(symlinks=True).create(folder)
    path = os.pathsep.join([IMPORT_PATH, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    environment = os.environ | {"PYTHONPATH": path, "RAY_TMPDIR": "/tmp"}
    command = [str(folder / "bin" / "python"), "-c", LAUNCH]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    refused, python = ran.stdout.splitlines()
    assert refused.startswith("Ray answers, but starts no worker process within 5 s (GetTimeoutError")
    assert str(folder) in refused and python == str(folder / "bin" / "python")
    assert sys.executable != python


@pytest.mark.parametrize("text", ["[]", "{", '{"runtime_env": {"py_modules": 3}}', '{"runtime_env": "x"}'])
def test_a_jobs_variable_in_another_form(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(connection.JOB, text)
    with pytest.raises(ConfigError, match=f"^{connection.JOB}: .* can't be read"):
        connection._helpers()
    monkeypatch.setenv(connection.JOB, "")
    assert "py_modules" in connection._helpers()


def test_a_python_that_prints_as_it_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A site's: what it says is not taken for the cluster's answer."""
    (tmp_path / "sitecustomize.py").write_text("print('Welcome to the cluster')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS = '127.0.0.1:9'.*: no Ray cluster answers there \(Connection"):
        address.find_cluster("127.0.0.1:9")
