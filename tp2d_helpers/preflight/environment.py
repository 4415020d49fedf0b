"""What of the process's environment would end a run with another library's error: looked at before Ray starts."""

from __future__ import annotations

import getpass
import importlib
import os
import socket
import sys
import tempfile
from pathlib import Path

from tp2d_helpers.cache import cache_dir
from tp2d_helpers.config import ConfigError, reason

# {variable: (its good values, None for "not set", what it would do)}
SWITCHES: dict[str, tuple[set[str | None], str]] = {
    "RAY_TRAIN_V2_ENABLED": ({None, "1", "true"}, "turns off the version of Ray Train that this needs"),
    "DS_ACCELERATOR": ({None, "cpu", "cuda"}, "is a device that this does not know"),
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": (
        {None, "", "0", "n", "no", "false"},
        "lets checkpoints execute code, and PyTorch refuses it together with what keeps them from it",
    ),
}


def check_environment(starts_ray: bool = False) -> None:
    """Look at the variables and folders that Ray, DeepSpeed, PyTorch and the caches depend on.

    Args:
        starts_ray: a Ray of this machine's own will be started.

    Raises:
        ConfigError: one line with the variable, its value, and what to set.
    """
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        name = next((name for name in ("PYTHONUTF8", "LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "LANG")
        cure = "set PYTHONUTF8 to 1 (or LANG to C.UTF-8, and unset LC_ALL), and start Python again"
        _refuse(name, f"Python writes file names, texts and what it prints in {encoding}, which lacks letters", cure)
    for name, (good, what) in SWITCHES.items():
        if (value := os.environ.get(name)) not in good and (value or "").lower() not in good:
            _refuse(name, what, "unset it, and start Python again")
    actions = [part.partition(":")[0].strip() for part in os.environ.get("PYTHONWARNINGS", "").split(",")]
    if any(action and "error".startswith(action) for action in actions):  # Python takes beginnings, too
        _refuse("PYTHONWARNINGS", "makes errors of what libraries warn of", "unset it, and start Python again")
    try:
        getpass.getuser()  # which PyTorch's compiler asks for
    except (KeyError, OSError):
        _refuse("USER", f"and the user id {os.getuid()} has no name in this system", "set USER to any name")
    try:
        folders = _caches() | (_rays() if starts_ray else {})
    except RuntimeError as error:  # of `Path.home`
        _refuse("HOME", f"and there is no home folder ({reason(error)})", "set HOME to a folder that can be written")
    _check_folders(folders)
    _check_token()
    if starts_ray:
        check_interfaces()


def _check_folders(folders: dict[str, Path]) -> None:
    lacking = {}
    for name, folder in folders.items():
        if not folder.is_absolute():
            _refuse(name, "no absolute path, and workers have another working folder", f"set it to {folder.absolute()}")
        if (trouble := cannot_write(folder)) and name in os.environ:
            _refuse(name, f"{folder} can't be written ({trouble})", "set it to a folder that can")
        if trouble:
            lacking[name] = f"{folder} can't be written ({trouble})"
    if lacking:
        _refuse("HOME", "; ".join(lacking.values()), f"set HOME to a folder that can, or {', '.join(lacking)}")


def _refuse(name: str, what: str, cure: str) -> None:
    value = repr(os.environ[name]) if name in os.environ else "not set"
    raise ConfigError(f"{name} = {value}: {what}; {cure}")


def _caches() -> dict[str, Path]:
    """{variable: folder} of what every node builds or fetches: models, tokens, kernels; data sets."""
    variable = next((name for name in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME") if os.environ.get(name)), "")
    parts = {"HF_HOME": "datasets", "XDG_CACHE_HOME": "huggingface/datasets"}
    folder = Path(os.environ.get(variable) or "~/.cache/huggingface/datasets", parts.get(variable, "")).expanduser()
    return {"TP2D_CACHE": cache_dir(), variable or "HF_HOME": folder}


def _rays() -> dict[str, Path]:
    """{variable: folder} of what Ray writes as it starts: its sockets and logs."""
    return {"RAY_TMPDIR": Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")}


def token_file() -> Path:
    """From which Ray reads its token, unless it is in `RAY_AUTH_TOKEN`."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def reads_token_file() -> bool:
    """Whether Ray takes its token from there: it wants one, and the environment has none."""
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not os.environ.get("RAY_AUTH_TOKEN")


def _check_token() -> None:
    if not reads_token_file() or not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        if not token_file().read_text().strip():
            raise OSError(0, "the file is empty")
    except (OSError, ValueError) as error:
        what = f"Ray can't read a token there ({getattr(error, 'strerror', None) or reason(error)})"
        cure = "write the cluster's token into it (for a Ray of this machine alone, any word), or unset it"
        _refuse("RAY_AUTH_TOKEN_PATH", what, cure)


def cannot_write(folder: Path) -> str:
    """Why not; "" if it can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))  # a full disk still has room for names
    except OSError as error:
        return error.strerror or reason(error)
    return ""


def check_interfaces() -> None:
    """The network interfaces that gloo, by name, and NCCL, by the beginning of a name, are told to use are there.

    Raises:
        ConfigError: as `check_environment` does.
    """
    there = sorted(name for _, name in socket.if_nameindex())
    gloo, nccl = (os.environ.get(f"{name}_SOCKET_IFNAME", "") for name in ("GLOO", "NCCL"))
    exact, starts = nccl.startswith("="), [part.partition(":")[0] for part in nccl.lstrip("=").split(",")]
    found = {
        "GLOO_SOCKET_IFNAME": set(gloo.split(",")) <= {"", *there},  # it takes all that are listed,
        "NCCL_SOCKET_IFNAME": nccl.startswith("^")  # and NCCL those that it finds
        or any(name == start if exact else name.startswith(start) for name in there for start in starts),
    }
    for variable in [name for name, good in found.items() if not good]:
        _refuse(variable, f"there is no such interface, but {', '.join(there)}", "unset it, or name one of these")


def check_hook() -> None:
    """The function that a place lets Ray ask for the environment of workers is there.

    Raises:
        ConfigError: as `check_environment` does.
    """
    module, _, name = os.environ.get("RAY_RUNTIME_ENV_HOOK", "").rpartition(".")
    try:
        if "RAY_RUNTIME_ENV_HOOK" in os.environ:
            getattr(importlib.import_module(module), name)
    except Exception as error:  # the module runs as it is imported
        what = f"Ray asks this function for the environment of workers, and it can't be imported ({reason(error)})"
        _refuse("RAY_RUNTIME_ENV_HOOK", what, "unset it, or add its module's folder to PYTHONPATH")
