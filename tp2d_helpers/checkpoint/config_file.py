"""An export's config.json, which says the same to transformers 5 and to transformers 4.

Version 5 has a rope in one field, `rope_parameters`, and calls some others anew. Version 4, and programs that are built
on it, don't know these: they take the defaults of their classes, and give other logits without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from tp2d_helpers.checkpoint.files import read_json, write_json

# Version 4's classes of these count the entries of `rope_scaling`, and know its kind as "type".
COUNTED = {
    "phi3": ("short_factor", "long_factor"),
    "phimoe": ("short_factor", "long_factor", "short_mscale", "long_mscale", "original_max_position_embeddings"),
}
RENAMED = {"gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}}
ALIASES = ("num_experts",)  # of other classes' `num_local_experts`
# Gemma 4's heads of layers without a window, which are now in `per_layer_config`.
WITHOUT_WINDOW = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
UNKEPT = ("torch_dtype", "transformers_version", "auto_map")  # said anew, or of files that may not come along


def add_older_fields(folder: Path, config: transformers.PretrainedConfig, given: dict[str, Any]) -> None:
    """Complete the config.json that `save_pretrained` wrote by version 4's names, and the fields that the original had.

    Version 5 reads the same from it as before, or it is left as it is.

    Args:
        config: what was saved.
        given: the fields in the original's config.json; of a text model that is a part, in that part's.
    """
    path = folder / "config.json"
    said, was = read_json(path), _read(config, path)
    kept = {name: value for name, value in given.items() if name not in UNKEPT and not name.startswith("_")}
    names = {name: said[now] for name in ALIASES if (now := config.attribute_map.get(name)) in said}
    names |= {"torch_dtype": said["dtype"]} if "dtype" in said else {}
    names |= _without_window(said) if config.model_type.startswith("gemma4") else {}
    rope = _rope(config.model_type, said.get("rope_parameters") or {}, given)
    for older in (kept | rope, kept, {}):  # some classes that version 4 hasn't got read these fields in their own way
        write_json(path, dict(sorted((older | said | names).items())))
        if _read(config, path) == was:
            return
    write_json(path, said)


def _read(config: transformers.PretrainedConfig, path: Path) -> dict[str, Any] | None:
    """What `transformers` reads: all that the class knows, whatever else is carried along. None if it can't."""
    try:
        read = type(config).from_json_file(path).to_dict()
    except Exception:  # whatever a class makes of fields that it doesn't expect
        return None
    known = getattr(type(config), "__dataclass_fields__", read)
    return {name: value for name, value in read.items() if name in known}


def _without_window(said: dict[str, Any]) -> dict[str, Any]:
    """Gemma 4's older fields, if its layers differ in no other way than these can say."""
    layers, kinds = said.get("per_layer_config") or {}, said.get("layer_types") or []
    full = {str(layer) for layer, kind in enumerate(kinds) if kind == "full_attention"}
    first = next(iter(layers.values()), {})
    if (
        full != layers.keys()
        or any(layer != first for layer in layers.values())
        or not first.keys() <= WITHOUT_WINDOW.keys()
    ):
        return {}
    return {WITHOUT_WINDOW[name]: value for name, value in first.items()}


def _rope(model_type: str, rope: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Version 4's fields of a rope, or of two: one for layers with a window, and one for the others."""
    whole, window = rope.get("full_attention", rope), rope.get("sliding_attention")
    if "rope_theta" not in whole:
        return {}
    fields = {"rope_theta": whole["rope_theta"], "rope_scaling": _scaling(model_type, whole, given.get("rope_scaling"))}
    if "partial_rotary_factor" in whole:
        fields["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if window:
        fields["rope_local_base_freq"] = window["rope_theta"]
    if whole.get("rope_type") == "longrope" and "original_max_position_embeddings" in whole:
        fields["original_max_position_embeddings"] = whole["original_max_position_embeddings"]
    return fields | {name: fields[now] for name, now in RENAMED.get(model_type, {}).items() if now in fields}


def _scaling(model_type: str, rope: dict[str, Any], given: dict[str, Any] | None) -> dict[str, Any] | None:
    """As the original has it, if that is what the rope is; None for a rope that isn't scaled."""
    if rope.get("rope_type", "default") == "default":
        return None
    if given and all(rope.get("rope_type" if name == "type" else name) == value for name, value in given.items()):
        return given
    if model_type in COUNTED:
        return {"type": rope["rope_type"]} | {name: rope[name] for name in COUNTED[model_type] if name in rope}
    return {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
