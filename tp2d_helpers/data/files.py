"""Which files a local dataset is: each one in a folder is used, or named as left out."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import metadata_load

from tp2d_helpers.config import ConfigError

TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")  # these can be compressed, too
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt", ".tsv", ".arrow", ".feather")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
NOT_TRAINED_ON = {"test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}  # other splits' names
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # `datasets` writes them
GLOB = re.compile(r"[*?[]")
OF_A_SPLIT = re.compile(r"[\w.-]+(/[\w.-]+)?:[^/,]*")  # "id:split" of a hub dataset, or a part of it: "id:train[:10%]"
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

    Its name is a file, a folder or a glob, or several of them with commas between. Of a folder these are all files in a
    known format, however they are called, but those whose name or subfolder says that they belong to another split,
    such as `test.jsonl`; and so of a glob, unless it asks for such a split by name. Hidden files don't count. Where the
    folder's README.md declares configs, as clones of hub datasets do, it is the files of `dataset_config`; where
    `save_to_disk` of `datasets` wrote it, those of the dataset, or of its train split.

    Raises:
        ConfigError: if there is nothing there, or nothing in a known format, or a file is named twice.
    """
    parts, name = _parts(dataset_name), f"dataset_name = {dataset_name!r}"
    if not parts:
        return None
    found = [_files_of(Path(part).expanduser(), dataset_config, name) for part in parts]
    used = [path for files in found for path in files.used]
    if twice := [str(path) for path, times in Counter(path.resolve() for path in used).items() if times > 1]:
        raise ConfigError(f"{name}: it names {', '.join(twice[:4])} more than once")
    return Files(used, [path for files in found for path in files.left_out])


def config_of(evaluated: str, dataset_name: str, dataset_config: str) -> str:
    """The config of a dataset to evaluate on: that of the training's, if it is of the same hub dataset."""
    return dataset_config if evaluated.split(":")[0] == dataset_name.split(":")[0] else ""


def _parts(dataset_name: str) -> list[str]:
    """The paths and globs in the name of a local dataset; none in that of any other."""
    if dataset_name in ("", "demo"):
        return []
    if Path(dataset_name).expanduser().exists():
        return [dataset_name]
    if OF_A_SPLIT.fullmatch(dataset_name) and not _there(Path(dataset_name)):
        return []
    parts = [part.strip() for part in _between_commas(dataset_name) if part.strip()]
    local = len(parts) > 1 or GLOB.search(dataset_name) or dataset_name.startswith((".", "/", "~"))
    return parts if local else []


def is_local(dataset_name: str) -> bool:
    """Whether it is the name of files or folders, be they there or not."""
    return bool(_parts(dataset_name))


def _between_commas(name: str) -> Iterator[str]:
    """The parts of a name, the longest first: a comma may belong to a path that is there."""
    pieces = name.split(",")
    while pieces:
        ends = range(len(pieces), 1, -1)
        there = (end for end in ends if _there(Path(",".join(pieces[:end]).strip()).expanduser()))
        end = next(there, 1)
        yield ",".join(pieces[:end])
        pieces = pieces[end:]


def _there(path: Path) -> list[Path]:
    """A path that is there, or what it matches as a glob."""
    return [path] if path.exists() else _look_in(path)[1]


def _files_of(path: Path, dataset_config: str, name: str) -> Files:
    """The files of one path or glob. `name` begins the errors."""
    declared = path.is_dir() and _declares_configs(path / "README.md")
    if dataset_config and not declared:
        raise ConfigError(f"dataset_config = {dataset_config!r}: a local file or folder has none; set it to ''")
    if path.is_file():
        if not format_of(path):
            compressed = f"; {', '.join(TEXT_FORMATS)} also with {', '.join(COMPRESSED)}"
            raise ConfigError(f"{name}: a local file must be one of {', '.join(FORMATS)}{compressed}")
        return Files([path], [])
    base, found = _look_in(path)
    found = [p for p in found if p.is_symlink() or not p.is_dir()]  # what a link to a folder holds is not looked at
    asked = _is_of_another_split(path, base)
    if not path.exists() and path == base:
        raise ConfigError(f"{name}: no such file or folder" + f" as {path}" * (str(path) not in name))
    if declared:
        try:
            builder = datasets.load_dataset_builder(str(path), dataset_config or None)
        except FileNotFoundError as error:
            if not GLOB.search(str(path)):
                raise
            raise ConfigError(
                f"{name}: its README.md declares configs, and `datasets`, which reads them, takes the *, ? or [ in the "
                "folder's path for a pattern; rename the folder, or name the files in it"
            ) from error
        used = [Path(file) for file in builder.config.data_files["train"]]
    elif (used := _saved_files(path, name)) is None:
        used = [p for p in found if p.is_file() and format_of(p) and p.name not in NOT_DATA]
        used = [p for p in used if asked or not _is_of_another_split(p, base)]
    chosen = {p.resolve() for p in used}
    left_out = [str(p.relative_to(base)) for p in found if p.resolve() not in chosen]
    if not used:
        where = "the folder doesn't contain" if path == base else f"{path.name} doesn't match"
        raise ConfigError(
            f"{name}: {where} any data files to train on, which are {', '.join(FORMATS)} not named for another split "
            f"(test, validation, …); it has {left_out[:8]}"
        )
    return Files(used, left_out)


def _saved_files(path: Path, name: str) -> list[Path] | None:
    """The files of a folder that `save_to_disk` wrote: what `map` cached beside them is no data. None of any other."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if "train" not in splits:
            raise ConfigError(
                f"{name}: it has no split 'train' but {splits}; name the folder of one: {path / splits[0]}"
            )
        path = path / "train"
    if not (path / "state.json").is_file():
        return None
    return [
        path / file["filename"] for file in json.loads((path / "state.json").read_text(encoding="utf-8"))["_data_files"]
    ]


def absolute_name(dataset_name: str) -> str:
    """The name of a dataset from any working directory: that of the workers is another one than the driver's."""
    return ",".join(str(Path(part).expanduser().absolute()) for part in _parts(dataset_name)) or dataset_name


def paths_of(dataset_name: str) -> list[Path]:
    """The files and folders that the name of a local dataset leads to; none of any other."""
    paths = [Path(part).expanduser() for part in _parts(dataset_name)]
    return [found for path in paths for found in _there(path)]


def _look_in(path: Path) -> tuple[Path, list[Path]]:
    """A folder and all that is in it; of a glob the folder that it begins with, and what it matches; nothing hidden."""
    prefixes = itertools.accumulate(map(Path, path.parts), Path.joinpath)
    whole = itertools.takewhile(lambda prefix: prefix.exists() or not GLOB.search(prefix.name), prefixes)
    base = max(whole, key=lambda prefix: len(prefix.parts), default=Path())
    found = sorted(base.glob("**/*" if path == base else str(path.relative_to(base))))
    return base, [p for p in found if not any(part[0] == "." for part in p.relative_to(base).parts)]


def _declares_configs(readme: Path) -> bool:
    try:
        return bool((metadata_load(readme) or {}).get("configs"))
    except (OSError, ValueError):
        return False


def _is_of_another_split(path: Path, base: Path) -> bool:
    """Whether a file or glob says, below the folder `base`, that it belongs to a split other than the training's."""
    words = {word for part in path.relative_to(base).parts for word in re.split("[^a-z]+", part.lower())}
    return bool(words & NOT_TRAINED_ON)


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
