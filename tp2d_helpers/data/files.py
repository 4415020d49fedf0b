"""Which files a local dataset is: each one in a folder is used, or named as left out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import metadata_load

from tp2d_helpers.config import ConfigError

TEXT_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt")  # these can be compressed, too
FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".tsv", ".arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
NOT_TRAINED_ON = {"test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}  # other splits' names
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # `datasets` writes them
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Files:
    """The files of a local dataset: those that are read, in this order, and the names of those that are not."""

    used: list[Path]
    left_out: list[str]

    def __str__(self) -> str:
        names = ", ".join(self.left_out[:4]) + ", …" * (len(self.left_out) > 4)
        total = len(self.used) + len(self.left_out)
        return f"files used {len(self.used)} of {total}" + (f" (not {names})" if names else "")


def local_files(dataset_name: str, dataset_config: str = "") -> Files | None:
    """The files of a local dataset; None for the demo and for a hub id.

    Of a folder these are all files in a known format, however they are called, but those whose name or subfolder says
    that they belong to another split, such as `test.jsonl`. Hidden files don't count. Where the folder's README.md
    declares configs, as clones of hub datasets do, it is the files of `dataset_config`.

    Raises:
        ConfigError: if there is nothing there, or nothing in a known format.
    """
    path, name = Path(dataset_name).expanduser(), f"dataset_name = {dataset_name!r}"
    if dataset_name == "demo" or not path.exists():
        if dataset_name.startswith((".", "/", "~")):
            raise ConfigError(f"{name}: no such file or folder")
        return None
    declared = path.is_dir() and _declares_configs(path / "README.md")
    if dataset_config and not declared:
        raise ConfigError(f"dataset_config = {dataset_config!r}: a local file or folder has none; set it to ''")
    if path.is_file():
        if not format_of(path):
            compressed = f"; {', '.join(TEXT_FORMATS)} also with {', '.join(COMPRESSED)}"
            raise ConfigError(f"{name}: a local file must be one of {', '.join(FORMATS)}{compressed}")
        return Files([path], [])
    found = [p for p in sorted(path.rglob("*")) if not any(part[0] == "." for part in p.relative_to(path).parts)]
    found = [p for p in found if p.is_symlink() or not p.is_dir()]  # what a link to a folder holds is not looked at
    if declared:
        builder = datasets.load_dataset_builder(str(path), dataset_config or None)
        used = [Path(file) for file in builder.config.data_files["train"]]
    else:
        used = [p for p in found if p.is_file() and format_of(p) and not _is_left_out(p.relative_to(path))]
    chosen = {p.resolve() for p in used}
    left_out = [str(p.relative_to(path)) for p in found if p.resolve() not in chosen]
    if not used:
        raise ConfigError(
            f"{name}: the folder doesn't contain any data files to train on, which are {', '.join(FORMATS)} not named "
            f"for another split (test, validation, …); it has {left_out[:8]}"
        )
    return Files(used, left_out)


def absolute_name(dataset_name: str) -> str:
    """The name of a dataset from any working directory: that of the workers is another one than the driver's."""
    path = Path(dataset_name).expanduser()
    return str(path.absolute()) if dataset_name and path.exists() else dataset_name


def _declares_configs(readme: Path) -> bool:
    try:
        return bool((metadata_load(readme) or {}).get("configs"))
    except (OSError, ValueError):
        return False


def _is_left_out(path: Path) -> bool:
    words = {word for part in path.parts for word in re.split("[^a-z]+", part.lower())}
    return path.name in NOT_DATA or bool(words & NOT_TRAINED_ON)


def format_of(path: Path) -> str | None:
    """A file's format, one of `FORMATS`, whatever its compression; None if it has no known one."""
    last, before = path.suffix.lower(), Path(path.stem).suffix.lower()
    if last in COMPRESSED:
        return before if before in TEXT_FORMATS else None
    return last if last in FORMATS else None


def stamp(*paths: Path) -> list[list[Any]]:
    """What changes when local files, or what is in folders, change: names, sizes and times."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the small text that Git has in place of a large file that was not fetched."""
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
