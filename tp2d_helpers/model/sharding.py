"""What AutoTP must make of each weight: the plan that its result is held against.

AutoTP follows the model's own `base_model_tp_plan`, and warns, or says nothing, where it leaves a weight whole.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.speed.layers import decoder_layers

# How a weight of each style of the Hugging Face plan is cut: the dimension of `weight` ([out, in]) that is divided.
SPLIT_DIM = {"colwise": 0, "rowwise": 1}
WHOLE = {"replicated_with_grad_allreduce", "embedding_rowwise"}  # the embedding: see `planned_shapes`
FUSED = ("qkv", "query_key_value", "gate_up")  # several matrices in one: a plain cut would mix them up


def meta_model(hf_config: transformers.PretrainedConfig, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model without storage: shapes only, nothing is allocated.

    Raises:
        ConfigError: if `AutoModelForCausalLM` can't build it.
    """
    try:
        with torch.device("meta"):
            return random_model(hf_config, dtype)
    except Exception as error:
        raise ConfigError(
            f"model_name: {hf_config.model_type!r} is not a model that AutoModelForCausalLM builds "
            f"({str(error).splitlines()[0] if isinstance(error, ValueError) else reason(error)})"
        ) from error


def random_model(hf_config: transformers.PretrainedConfig, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model with random weights."""
    # A config class that came with its model was loaded because the user trusts that model's code.
    trusted = type(hf_config).__module__.startswith("transformers_modules")
    settings = {} if dtype is None else {"dtype": dtype}
    return AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trusted, **settings)


def sharding_plan(model: torch.nn.Module, tp_size: int) -> dict[str, int | None]:
    """Which dimension of each decoder weight AutoTP must divide: 0, 1, or None for a weight that stays whole.

    The names are those of the base model's parameters. The rule is the model's own `base_model_tp_plan`, which AutoTP
    follows. It is refused where AutoTP would leave a matrix whole, cut heads apart, or mix fused matrices up.

    Raises:
        ConfigError: for an architecture that AutoTP can't shard correctly, or a tp_size that doesn't divide it.
    """
    hf_config, text = model.config, model.config.get_text_config()
    kind = f"model_name: {hf_config.model_type!r} can't be sharded by AutoTP: "
    plan = getattr(hf_config, "base_model_tp_plan", None)
    if not plan:
        part = "" if text is hf_config else f" (that of its text model, {text.model_type!r}, is not used)"
        raise ConfigError(f"{kind}its config has no tp_plan{part}. Qwen2, Qwen3, Llama, Mistral have; take tp_size 1")
    if model.get_output_embeddings() is None:
        raise ConfigError(kind + "it has no output head; take tp_size 1")
    unknown = sorted(set(plan.values()) - set(SPLIT_DIM) - WHOLE)
    if unknown:
        raise ConfigError(
            kind + f"its plan has the styles {unknown}; supported are {sorted({*SPLIT_DIM, *WHOLE})}. Take tp_size 1"
        )
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if kv_heads % tp_size or heads % tp_size:
        fits = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and heads % n == 0]
        raise ConfigError(f"tp_size = {tp_size}: must divide the {kv_heads} key-value heads; possible are {fits}")
    layers = {id(parameter) for layer in decoder_layers(model) for parameter in layer.parameters()}
    result: dict[str, int | None] = {}
    for name, parameter in model.base_model.named_parameters():
        module, _, kind_of = name.rpartition(".")
        style = next((s for pattern, s in plan.items() if fnmatch.fnmatch(module, pattern)), None)
        dim = SPLIT_DIM.get(style)
        result[name] = None if kind_of == "bias" and style == "rowwise" else dim
        if id(parameter) not in layers or parameter.ndim < 2:
            continue
        if dim is None or any(word in name for word in FUSED):
            raise ConfigError(
                kind + f"{name} {list(parameter.shape)} is not covered by a plain column or row cut. Take tp_size 1"
            )
        if parameter.shape[dim] % tp_size:
            raise ConfigError(f"tp_size = {tp_size}: does not divide {name} {list(parameter.shape)} in dimension {dim}")
    return result


def shard_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of this rank's shard; ZeRO stage 3, which cuts it further, keeps it in `ds_shape`."""
    return getattr(parameter, "ds_shape", parameter.shape)


def shard_table(model: torch.nn.Module, tp_size: int) -> list[list[Any]]:
    """What AutoTP makes of each kind of weight: rows of [name, cut, whole shape, shard shape, count].

    `setup_model_with_autotp` compares every shard with this plan. Layers of one kind share a row; a meta model will do.
    """
    rows: dict[str, list[Any]] = {}
    shards = planned_shapes(model, tp_size)
    vocabulary = _vocabulary(model)
    for name, parameter in model.named_parameters():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        whole, shard = list(parameter.shape), list(shards[name])
        # PyTorch keeps a weight as [out, in]: cutting `out` divides the columns of the A in X·A.
        cut = "none" if whole == shard else "column-wise" if whole[0] != shard[0] else "row-wise"
        cut = "by vocabulary" if cut != "none" and id(parameter) in vocabulary else cut
        rows.setdefault(kind, [f"`{kind}`", cut, str(whole), str(shard), 0])[4] += 1
    return list(rows.values())


def planned_shapes(model: torch.nn.Module, tp_size: int) -> dict[str, torch.Size]:
    """Shape of each rank's shard, by name: the decoder by its plan, the head (and a tied embedding) by vocabulary."""
    if tp_size == 1:
        return {name: parameter.shape for name, parameter in model.named_parameters()}
    prefix, vocabulary = model.base_model_prefix + ".", _vocabulary(model)
    dims = {prefix + name: dim for name, dim in sharding_plan(model, tp_size).items()}
    shapes = {}
    for name, parameter in model.named_parameters():
        shape, dim = list(parameter.shape), 0 if id(parameter) in vocabulary else dims.get(name)
        if dim is not None:
            shape[dim] //= tp_size
        shapes[name] = torch.Size(shape)
    return shapes


def divided_dimension(whole: torch.Size, shard: torch.Size) -> int | None:
    """In which dimension a weight is divided; None if it stays whole."""
    return next((dim for dim, sizes in enumerate(zip(whole, shard, strict=True)) if sizes[0] != sizes[1]), None)


def _vocabulary(model: torch.nn.Module) -> set[int]:
    """Ids of what is cut by vocabulary: the head's weight, which may be the embedding's, too, and its bias."""
    head = model.get_output_embeddings()
    return set() if head is None else {id(parameter) for parameter in head.parameters()}


def check_shards(module: torch.nn.Module, planned: dict[str, torch.Size]) -> None:
    """Compare a sharded model with `planned_shapes`. Raises `RuntimeError` with the weights that differ."""
    found = {name: shard_shape(parameter) for name, parameter in module.named_parameters()}
    wrong = [f"{n}: {list(found.get(n, []))}, planned {list(s)}" for n, s in planned.items() if found.get(n) != s]
    if wrong:
        raise RuntimeError(f"AutoTP did not shard the model as planned ({len(wrong)} weights): " + "; ".join(wrong[:4]))
