"""Are the model's weights there, whole, and those of its config? Asked of the files' headers; no weight is read.

What `from_pretrained` doesn't find, it draws at random, with a line in a worker's log. So the names and shapes in the
files go through transformers' own mapping, onto a model without storage, and what would not be loaded is refused.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub import get_safetensors_metadata, is_offline_mode, try_to_load_from_cache
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.loading_report import LoadStateDictInfo

from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.data.files import is_lfs_pointer
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.sharding import meta_model
from tp2d_helpers.model.text_part import KEY_MAPPING

NAMES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)  # in transformers' order
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weight(NamedTuple):
    """What a file's header says of a weight."""

    file: str
    dtype: str
    shape: list[int]


def check_weights(model_name: str, model: ModelFacts) -> str:
    """What the weights are, in a few words: files, width, what the model doesn't use.

    Raises:
        ConfigError: with the file and the weight, for weights that are missing, of another shape, quantised or more
            than the config says, and for files that are missing, cut off or pointers of Git LFS.
    """
    try:
        if quantised := getattr(model.config, "quantization_config", None):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
            raise ConfigError(f"is quantised (quantization_config: {method}) and can't be trained; take the original")
        if _find(model_name, "adapter_config.json"):
            raise ConfigError("holds an adapter (adapter_config.json): merge it with its model, and take the result")
        files = _files(model_name)
        weights = {name: weight for path, names in files.items() for name, weight in _read(path, names).items()}
        weights = weights or _read_from_hub(model_name)
        unused = _compare(model, weights) if weights else set()
        if weights and model.tied:
            _check_tied(model, files, weights)
    except ConfigError as error:
        raise ConfigError(f"model_name = {model_name!r}: {error}") from error.__cause__
    if not weights:
        return "weights to be downloaded, not looked at"
    number, widths = len({weight.file for weight in weights.values()}), sorted({w.dtype for w in weights.values()})
    found = f"weights in {number} file{'s' * (number > 1)}{'' if files else ' of the hub'}, {', '.join(widths)}"
    if model.part_of:  # of the towers of images and sound, the names alone
        unused = {name.removeprefix("model.").partition(".")[0] for name in unused}
    return found + (f"; not used: {_some(unused)}" if unused else "")


def _find(model_name: str, file: str) -> Path | None:
    """A file of a model, in its folder or in the hub's cache."""
    if Path(model_name).is_dir():
        return Path(model_name, file) if Path(model_name, file).exists() else None
    path = try_to_load_from_cache(model_name, file)
    return Path(path) if isinstance(path, str) else None


def _files(model_name: str) -> dict[Path, set[str]]:
    """The files of weights, each with the names that an index says are in it; none if the hub still has some."""
    complete = Path(model_name).is_dir() or is_offline_mode()
    found = next(filter(None, (_find(model_name, name) for name in NAMES)), None)
    if not found and complete:
        raise ConfigError(f"has no weights ({SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME})")
    if not found or found.suffix != ".json":
        return {found: set()} if found else {}
    _refuse_pointer(found)
    try:
        place = json.loads(found.read_text(encoding="utf-8"))["weight_map"]
        files = {file: {name for name in place if place[name] == file} for file in sorted(set(place.values()))}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{found.name} can't be read ({reason(error)})") from error
    missing = [file for file in files if not _find(model_name, file)]
    if missing and complete:
        raise ConfigError(f"{_some(missing)} of {len(files)} files that {found.name} names: missing")
    return {} if missing else {_find(model_name, file): names for file, names in files.items()}


def _refuse_pointer(path: Path) -> None:
    if is_lfs_pointer(path):
        raise ConfigError(f"{path.name} is a Git LFS pointer and not the file itself: run `git lfs pull`")


def _read(path: Path, expected: set[str]) -> dict[str, Weight]:
    """What a file holds, by its header. An index says that the expected names are in it."""
    _refuse_pointer(path)
    try:
        found = (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)
    except Exception as error:  # of three libraries
        size = f"{path.stat().st_size:,} bytes"
        raise ConfigError(f"{path.name} ({size}) is cut off, or is no file of weights ({reason(error)})") from error
    if lacking := expected - found.keys():
        raise ConfigError(f"{path.name} lacks {_some(lacking)}, which its index says it has")
    return found


def _read_safetensors(path: Path) -> dict[str, Weight]:
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: Weight(path.name, part.get_dtype(), part.get_shape()) for name, part in slices.items()}


def _read_pickle(path: Path) -> dict[str, Weight]:
    """No code in it is executed, and no weight is read."""
    try:
        found = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except RuntimeError:  # older than PyTorch 1.6, or damaged
        found = torch.load(path, map_location="meta", weights_only=True)
    if any(not isinstance(weight, torch.Tensor) for weight in found.values()):
        raise ValueError(f"it holds {list(found)[:4]}, and not weights by name")
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {n: Weight(path.name, names.get(w.dtype, str(w.dtype)), list(w.shape)) for n, w in found.items()}


def _load(
    target: torch.nn.Module, weights: dict[str, Weight], names: dict[str, str] | None
) -> tuple[LoadStateDictInfo, set[str]]:
    """Load weights without contents into a model without storage, as `from_pretrained` would.

    Returns:
        (what is amiss, all that isn't used, what the class doesn't count included)
    """
    found = _convert(target, weights, names)
    unused = set(found.unexpected_keys)
    # Tied weights need be there once, and each class has names that don't count.
    target.mark_tied_weights_as_initialized(found)
    target.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    target._adjust_missing_and_unexpected_keys(found)
    return found, unused


def _convert(target: torch.nn.Module, weights: dict[str, Weight], names: dict[str, str] | None) -> LoadStateDictInfo:
    """Transformers' own mapping from the names and forms in files to those in memory."""
    contents = {name: torch.empty(w.shape, dtype=DTYPES[w.dtype], device="meta") for name, w in weights.items()}
    mapping, meta = get_model_conversion_mapping(target, names), {"": torch.device("meta")}
    how = LoadStateDictConfig(device_map=meta, dtype=torch.float32, weight_mapping=mapping)
    with _without_progress():
        found, _ = convert_and_load_state_dict_in_model(target, contents, how)
    return found


def _read_from_hub(model_name: str) -> dict[str, Weight]:
    """What the files hold that are still to be downloaded: the hub gives their headers. Nothing if it doesn't."""
    try:
        found = get_safetensors_metadata(model_name)
    except Exception:  # no safetensors, or a mirror that can't; the row says so
        return {}
    files = found.files_metadata.items()
    return {n: Weight(file, w.dtype, w.shape) for file, header in files for n, w in header.tensors.items()}


def _compare(model: ModelFacts, weights: dict[str, Weight]) -> set[str]:
    """Refuse weights that would not all be loaded. Returns those that the model has no use for: of a part, all."""
    target, floats = meta_model(model.config), {n: weight for n, weight in weights.items() if weight.dtype in DTYPES}
    found, unused = _load(target, floats, KEY_MAPPING if model.part_of else None)
    files = sorted({weight.file for weight in weights.values()})
    where = files[0] if len(files) == 1 else f"each of {len(files)} files"
    if wrong := [f"{name} {list(there)}, not {list(here)}" for name, there, here in found.mismatched_keys]:
        raise ConfigError(f"weights in {where} are of other shapes than its config says: {_some(wrong)}")
    if found.missing_keys and (other := [f"{n} is {w.dtype}" for n, w in weights.items() if n not in floats]):
        raise ConfigError(f"is quantised, and can't be trained: in {where}, {_some(other)}. Take the original")
    if found.conversion_errors:
        name, trace = next(iter(found.conversion_errors.items()))
        raise ConfigError(f"{name} can't be put together from {where} ({trace.strip().splitlines()[-1]})")
    if found.missing_keys:
        raise ConfigError(
            f"{where} lacks {_some(found.missing_keys)}, which would be drawn at random{_wrapper(floats, target)}"
        )
    if more := {name for name in found.unexpected_keys if _belongs(name, target)}:
        raise ConfigError(f"its config leaves out weights that are in {where}: {_some(more)}")
    return unused if model.part_of else found.unexpected_keys


def _check_tied(model: ModelFacts, files: Iterable[Path], weights: dict[str, Weight]) -> None:
    """Refuse a head that is not the embedding, where the config says that it is, whatever they are called.

    `from_pretrained` would keep both, and an export by the config would have the embedding alone.
    """
    target = meta_model(model.config)
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    names = KEY_MAPPING if model.part_of else None
    tied = {name for name, weight in target.named_parameters(remove_duplicate=False) if weight is embedding is head}
    alike = [name for name, weight in weights.items() if torch.Size(weight.shape) == embedding.shape]
    pair = [name for name in alike if tied - set(_convert(target, {name: weights[name]}, names).missing_keys)]
    paths = {path.name: path for path in files}
    if len(pair) < 2 or not paths:
        return
    found = [_tensor(paths[weights[name].file], name) for name in pair]
    if not all(torch.equal(found[0].to(other.dtype), other) for other in found[1:]):
        raise ConfigError(
            f"its config says that {' and '.join(pair)} are one (tie_word_embeddings), and in "
            f"{weights[pair[-1]].file} they differ: set tie_word_embeddings to false in config.json"
        )


def _tensor(path: Path, name: str) -> torch.Tensor:
    """A weight, mapped into memory where the file allows it."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    try:
        return torch.load(path, mmap=True, weights_only=True)[name]
    except RuntimeError:  # older than PyTorch 1.6
        return torch.load(path, weights_only=True)[name]


def _wrapper(names: Iterable[str], model: torch.nn.Module) -> str:
    """A hint, if all names in the files begin with a word that the model's don't."""
    first = {name.partition(".")[0] for name in names}
    if len(first) != 1 or any(name.startswith(f"{min(first)}.") for name in model.state_dict()):
        return ""
    return f". All names there begin with '{min(first)}.': save the model without its wrapper"


def _belongs(name: str, model: torch.nn.Module) -> bool:
    """Whether an unused weight is of a layer that the model has, or of one more layer of a kind that it has."""
    layer, _, _ = name.rpartition(".")
    modules = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    return layer in modules or re.sub(r"\.\d+\.", ".0.", name, count=1) in model.state_dict()


def _some(names: set[str] | list[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


@contextlib.contextmanager
def _without_progress() -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
