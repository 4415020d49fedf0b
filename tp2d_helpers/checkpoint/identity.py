"""Which model a run is of: by the contents of its files, wherever they are and whatever they are called."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed
from huggingface_hub import try_to_load_from_cache
from torch.utils.data import DataLoader
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from tp2d_helpers.checkpoint.run_folder import recorded
from tp2d_helpers.config import ConfigError
from tp2d_helpers.speed.agreement import everywhere

PARTS = ("config", "weights", "code")
UNREAD = {"_name_or_path", "transformers_version"}  # of a config.json: nothing depends on them
WHOLE = 64 * 2**20  # bytes; of a larger file of weights some blocks are read: 20 MB of one of 15 GB
BLOCK, STRIDE, DENSE = 4096, 4 * 2**20, 2**18  # bytes; DENSE where the file doesn't say where its tensors are


def model_identity(model_name: str, trust_remote_code: bool = False) -> dict[str, str | None]:
    """What tells a model from another of the same name: the hub's commit, and a SHA-256 of each of `PARTS`.

    Of large files of weights, blocks at the ends and in the middle of each tensor are hashed, and one every 4 MiB.

    Args:
        model_name: a folder, or the id of a model of which the hub's cache has the config.
        trust_remote_code: whether the code that comes with the model counts.

    Returns:
        None for what isn't known: the commit of a folder outside the cache, weights that are still to be downloaded.
    """
    if Path(model_name).is_dir():
        folder = Path(model_name).absolute()
    else:
        found = try_to_load_from_cache(model_name, "config.json")
        if not isinstance(found, str):
            return dict.fromkeys(("commit", *PARTS))
        folder = Path(found).parent
    cached = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    return {"commit": folder.name if cached else None, **_contents(folder, trust_remote_code)}


def differing(then: dict[str, Any], now: dict[str, Any], parts: Iterable[str] = PARTS) -> list[str]:
    """Which of the parts differ between two of `model_identity`; none where both are of one commit of the hub."""
    if then["commit"] and then["commit"] == now["commit"]:
        return []
    return [part for part in parts if then[part] != now[part]]


def check_model(
    then: dict[str, Any], now: dict[str, Any], model_name: str, parts: Iterable[str] = PARTS, cure: str = ""
) -> None:
    """Refuse a model that is not the one that a run began with.

    Args:
        then: the run's settings, as recorded; those of older versions lack "model", and are not compared.
        now: of the model that is called `model_name` (`model_identity`).
        parts: those that count.
        cure: what would help, but to restore the model.

    Raises:
        ConfigError: with both.
    """
    if not (known := then.get("model")):
        return
    if not known["weights"] and known["commit"]:  # downloaded since
        place = try_to_load_from_cache(then["model_name"], "config.json", revision=known["commit"])
        if isinstance(place, str):
            known = known | {"weights": _weights(Path(place).parent)}
    if wrong := differing(known, now, parts):
        what = " and ".join(wrong)
        raise ConfigError(
            f"model_name = {model_name!r}: its {what} {'is' if wrong in (['config'], ['code']) else 'are'} not what "
            f"this run was trained on: {describe(known, wrong)} then, {describe(now, wrong)} now. "
            f"Restore the model{cure}"
        )


def describe(identity: dict[str, Any], parts: Iterable[str] = ("weights",)) -> str:
    """An identity in a few words."""
    return ", ".join(
        f"{name} {identity[name][:12] + '…' if identity[name] else 'unknown'}"
        for name in ("commit", *parts)
        if identity[name] or name != "commit"
    )


def check_agreement(engine: deepspeed.DeepSpeedEngine, loader: DataLoader, run_dir: Path) -> None:
    """See that each node has the model and the tokens that the driver has: a file may be another there, or by now.

    Collective.

    Raises:
        ConfigError: on all ranks, with the first rank that has something else.
    """
    run = recorded(run_dir)
    name, data = engine.module.config.name_or_path, loader.dataset.identity
    found = everywhere({"data": data, "model": model_identity(name, run.get("trust_remote_code", False))})
    planned = {kind: run.get(kind) or found[0][kind] for kind in found[0]}
    files = "all nodes must see the same files, and these must stay as they are"
    for rank, other in enumerate(found):
        if wrong := differing(planned["model"], other["model"]):
            raise ConfigError(
                f"model_name = {name!r}: rank {rank} has another model than the run "
                f"({describe(other['model'], wrong)}, not {describe(planned['model'], wrong)}); {files}"
            )
        if other["data"] != planned["data"]:
            raise ConfigError(
                f"dataset_name: rank {rank} has other data than the run ({other['data']}, not {planned['data']}); "
                + files
            )


def code_files(folder: Path) -> list[Path]:
    """The modules that a model's classes are in, by its config.json, and those that they import from beside them."""
    named = _json(folder / "config.json").get("auto_map", {})
    places = [str(named[kind]).rpartition("--") for kind in ("AutoConfig", "AutoModelForCausalLM") if kind in named]
    files = [cached_file(repository or folder, f"{place.split('.')[0]}.py") for repository, _, place in places]
    found = {Path(needed) for file in files for needed in [file, *get_relative_import_files(file)]}
    return sorted(path for path in found if path.exists())


def _contents(folder: Path, trust_remote_code: bool) -> dict[str, str | None]:
    config = {name: value for name, value in _json(folder / "config.json").items() if name not in UNREAD}
    code = hashlib.sha256()
    for path in code_files(folder) if trust_remote_code else []:
        code.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "weights": _weights(folder),
        "code": code.hexdigest() if trust_remote_code else None,
    }


def _weights(folder: Path) -> str | None:
    """The hash of the files of weights that `from_pretrained` takes; None unless all of them are there."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)  # in its order
    first = next((folder / name for name in names if (folder / name).exists()), None)
    if first is None:
        return None
    index = _json(first).get("weight_map", {}) if first.suffix == ".json" else {first.name: first.name}
    files = [folder / name for name in sorted(set(index.values()))]
    if not files or not all(file.exists() for file in files):
        return None
    whole = hashlib.sha256()
    for file in files:
        whole.update(_sampled(file))
    return whole.hexdigest()


def _sampled(path: Path) -> bytes:
    """A hash of a file's size and blocks; of all of it, if it isn't large."""
    size, found = path.stat().st_size, hashlib.sha256()
    found.update(str(size).encode())
    with open(path, "rb") as file:
        if size <= WHOLE:
            found.update(file.read())
            return found.digest()
        places = set(range(0, size, DENSE))
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
            found.update(header)
            spans = [tensor["data_offsets"] for name, tensor in json.loads(header).items() if name != "__metadata__"]
            places = {8 + length + place for begin, end in spans for place in (begin, (begin + end) // 2, end - BLOCK)}
            places |= set(range(0, size, STRIDE))
        with ThreadPoolExecutor(16) as pool:  # each read of a network file system takes a while
            for block in pool.map(lambda place: os.pread(file.fileno(), BLOCK, max(place, 0)), sorted(places)):
                found.update(block)
    return found.digest()


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
