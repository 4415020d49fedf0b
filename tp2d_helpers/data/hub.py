"""A dataset of the hub → its files in the hub's cache, by split, and its commit.

The files are chosen as `datasets` chooses them, and read by `readers`: `datasets` itself fits the values of all files
to the types of the first one's. Without a way to the hub it is what `hf download`, or an earlier run, put into the
cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, constants, metadata_load, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.files import format_of

DEFAULT_CONFIGS = {"wikitext": "wikitext-2-raw-v1", "Salesforce/wikitext": "wikitext-2-raw-v1"}
PATIENCE = 5  # seconds to wait for the hub's word on a commit
# Of a builder's settings, those that say which files, and what they are called; any other changes how they are read.
WHICH = {"name", "version", "description", "data_dir", "data_files", "features"}
SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(.*)")
Splits = dict[str, list[Path]]


def hub_dataset(dataset_name: str, dataset_config: str = "") -> tuple[str, str | None, str]:
    """(id, config, split) of a hub dataset; what is not said as it is by default."""
    hub_id, _, split = dataset_name.partition(":")
    return hub_id, dataset_config or DEFAULT_CONFIGS.get(hub_id), "".join(split.split()) or "train"


def is_offline() -> bool:
    """Whether the hub isn't to be asked, by HF_HUB_OFFLINE or HF_DATASETS_OFFLINE."""
    return bool(constants.HF_HUB_OFFLINE or datasets.config.HF_DATASETS_OFFLINE)


def commit_of(dataset_name: str, dataset_config: str = "") -> str | None:
    """The commit of a hub dataset: the hub's, or the cache's if it can't be asked. None if neither knows it."""
    hub_id, config, _ = hub_dataset(dataset_name, dataset_config)
    if not is_offline():
        with contextlib.suppress(Exception):  # of several libraries, for whatever the network does
            return HfApi().dataset_info(hub_id, timeout=PATIENCE).sha
    if folder := snapshot(hub_id):
        return folder.name
    if is_offline():
        with contextlib.suppress(Exception):
            return datasets.load_dataset_builder(hub_id, config).hash  # of those that `datasets` has read before
    return None


def hub_files(dataset_name: str, dataset_config: str = "") -> Splits | None:
    """The files of a hub dataset's splits, fetched if there is a way to the hub.

    Returns:
        None if it is for `datasets` to read them: as their format isn't one of `readers`, or their README says how they
        are to be read, or it has them in a cache of its own.

    Raises:
        ConfigError: if the cache has a part of the files only, or it has no such config.
    """
    hub_id, config, _ = hub_dataset(dataset_name, dataset_config)
    if not is_offline():
        try:
            return _fetch(hub_id, config)
        except Exception:
            if not (folder := snapshot(hub_id)):
                raise
    elif not (folder := snapshot(hub_id)):
        return None
    return _find(folder, dataset_name, dataset_config)


def rows_of(split: str, splits: list[str], dataset_name: str) -> datasets.ReadInstruction:
    """A split or parts of splits, as `datasets` takes them: "train[:10%]+validation[100:200]"; "all" is all of them.

    Raises:
        ConfigError: if it is no such thing, or names a split that is not there.
    """
    try:
        rows = datasets.ReadInstruction.from_spec("+".join(splits) if split == "all" else split)
        rows.to_absolute(dict.fromkeys(splits, 100))
        return rows
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"dataset_name = {dataset_name!r}: {error}. Its splits are {', '.join(splits)}; a part of one is written "
            f"{splits[0]}[:10%] or {splits[0]}[100:200], and several are joined by +"
        ) from error


def _fetch(hub_id: str, config: str | None) -> Splits | None:
    """Fetch the files of a config, all splits."""
    builder = datasets.load_dataset_builder(hub_id, config)
    found = builder.config.data_files
    prefix = f"hf://datasets/{hub_id}@{builder.hash}/"
    urls = [url for files in (found or {}).values() for url in files]
    if not urls or not all(url.startswith(prefix) for url in urls) or not _is_plain(builder.config, urls):
        return None
    names = [url.removeprefix(prefix) for url in urls]
    folder = Path(
        snapshot_download(hub_id, repo_type="dataset", allow_patterns=[*map(glob.escape, names), "README.md"])
    )
    if folder.name != builder.hash:
        raise ConfigError(f"dataset_name: {hub_id} got a new commit while it was looked up; start again")
    return {str(split): [folder / url.removeprefix(prefix) for url in files] for split, files in found.items()}


def snapshot(hub_id: str, patterns: list[str] | None = None) -> Path | None:
    """The folder of a dataset in the hub's cache, whole or not; with patterns, only if it has all such files."""
    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", local_files_only=True, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        part = getattr(error, "snapshot_path", None)  # newer ones know which files there should be
        return Path(part) if part and not patterns else None
    except ValueError:  # no id of a hub dataset
        return None


def _find(folder: Path, dataset_name: str, dataset_config: str) -> Splits | None:
    """Find the files of a config in a snapshot: of the splits that are wanted alone, if its README says which."""
    hub_id, config, split = hub_dataset(dataset_name, dataset_config)
    if not any(format_of(path) for path in folder.rglob("*")):  # the README alone, as `datasets` leaves it there
        return None
    declared, name = _declared(folder, hub_id, config), f"dataset_name = {dataset_name!r}"
    options: dict[str, Any] = {}
    if declared and "data_files" in declared:
        patterns = _by_split(declared["data_files"])
        wanted = {
            part.splitname
            for part in rows_of(split, [*patterns], dataset_name).to_absolute(dict.fromkeys(patterns, 100))
        }
        options["data_files"] = {split: files for split, files in patterns.items() if split in wanted}
    if declared and declared.get("data_dir"):
        options["data_dir"] = declared["data_dir"]
    try:
        found = datasets.load_dataset_builder(str(folder), declared and declared.get("config_name"), **options).config
    except FileNotFoundError as error:
        raise _incomplete(name, hub_id) from error
    files = {str(split): [Path(file) for file in files] for split, files in (found.data_files or {}).items()}
    every = [str(path) for paths in files.values() for path in paths]
    if not every or not _is_plain(found, every):
        return None
    wanted = [f for files in options.get("data_files", {}).values() for f in files]
    patterns = [str(Path(options.get("data_dir", "")) / pattern) for pattern in wanted]
    some_shards = any("-of-" in pattern for pattern in wanted)  # are asked for by name
    if not snapshot(hub_id, patterns or sorted({f"*{Path(path).suffix}" for path in every})):
        raise _incomplete(name, hub_id)
    if not some_shards and not _has_all_shards(every):
        raise _incomplete(name, hub_id)
    return files


def _has_all_shards(files: list[str]) -> bool:
    """Whether there are as many files as their names say: "train-00001-of-00004.parquet"."""
    counts = Counter(match.groups() for file in files if (match := SHARD.fullmatch(file)))
    return all(count == int(total) for (_, total, _), count in counts.items())


def _incomplete(name: str, hub_id: str) -> ConfigError:
    return ConfigError(
        f"{name}: the hub's cache has a part of its files only, and the hub can't be reached; where it can, run "
        f"`hf download {hub_id} --repo-type dataset`"
    )


def _declared(folder: Path, hub_id: str, config: str | None) -> dict[str, Any] | None:
    """What the README says of a config; None if it has none. The only one is the default, or the one that says so."""
    try:
        found = {
            one.get("config_name", "default"): one
            for one in (metadata_load(folder / "README.md") or {}).get("configs") or []
        }
    except OSError:
        found = {}
    default = [name for name, one in found.items() if len(found) == 1 or name == "default" or one.get("default")]
    chosen = config or (default[0] if default else None)
    if (found or chosen not in (None, "default")) and chosen not in found:
        raise ConfigError(
            f"dataset_config = {config or ''!r}: {hub_id} has "
            + (f"the configs {', '.join(found)}; take one of them" if found else "no configs; set it to ''")
        )
    return found.get(chosen)


def _by_split(data_files: Any) -> dict[str, list[str]]:
    """The patterns of each split, in any of the ways in which a README may have them."""
    if not (isinstance(data_files, list) and all(isinstance(one, dict) for one in data_files)):
        data_files = [{"split": "train", "path": data_files}]
    paths = {str(one["split"]): one["path"] for one in data_files}
    return {split: [path] if isinstance(path, str) else path for split, path in paths.items()}


def _is_plain(config: datasets.BuilderConfig, files: list[str]) -> bool:
    """Whether files are read as `readers` reads them: nothing else is set, such as a separator."""
    default = type(config)()
    odd = {
        field.name for field in dataclasses.fields(config)
        if field.name not in WHICH and getattr(config, field.name) != getattr(default, field.name)
    }  # fmt: skip
    tabs = all(format_of(Path(file)) == ".tsv" for file in files)
    return all(format_of(Path(file)) for file in files) and odd <= ({"sep", "delimiter"} if tabs else set())
