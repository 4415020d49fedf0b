"""Combinations of settings, drawn: a model's shape, its data and training, a grid and what the grid's ranks do.

One is a dictionary that JSON can hold:

    model      `model_type` and what its config has besides `tiny.TINY`
    data       one of `DATA`
    training   settings that the result depends on: those of the one process that it is compared with, too
    grid       settings that it does not depend on
    stand_ins  what `outcomes.stand_in` puts in place of what only GPUs or long samples have
    resume     settings of the grid that takes over in the middle; absent if none does
    plain      whether the one process is compared with plain PyTorch
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import tiny
from families import TYPES
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.lora import ALL, kinds, targets

Case = dict[str, Any]
DATA = ("demo", "text", "chats")
STEPS = 4
EPSILON = (
    1e-6  # of Adam: by the usual 1e-8, a gradient that is all rounding, as of a bias of keys, moves a weight as far
)
# Of what some config has, what else it may be. That a field is there does not say that its class can do it.
FIELDS: dict[str, list[Any]] = {
    "hidden_size": [48, 96], "num_hidden_layers": [1, 3], "vocab_size": [2049, 2051, 2056],
    "intermediate_size": [96, 130, 177], "ffn_dim": [130, 177], "n_inner": [96, 177], "ffn_hidden_size": [130, 177],
    "moe_intermediate_size": [40, 48, 96], "shared_expert_intermediate_size": [33, 64], "word_embed_proj_dim": [32],
    "num_attention_heads": [4, 12, 16], "num_key_value_heads": [1, 2, 8], "num_kv_heads": [1, 2, 8],
    "head_dim": [4, 12],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2], "sliding_window": [None, 5, 16],
    "clip_qkv": [0.02, 0.5], "attn_logit_softcapping": [None, 5.0], "final_logit_softcapping": [None, 5.0],
    "hidden_act": ["gelu", "relu", "silu"], "hidden_activation": ["gelu", "silu"], "activation_function": ["relu"],
    "rms_norm_eps": [1e-3], "layer_norm_eps": [1e-3], "initializer_range": [0.1], "num_ln_in_parallel_attn": [1, 2],
    "num_experts_per_tok": [1, 3], "n_shared_experts": [2], "first_k_dense_replace": [0, 2], "n_group": [2],
    "topk_group": [2], "routed_scaling_factor": [2.5], "decoder_sparse_step": [2], "mlp_only_layers": [[], [0]],
    "logit_scale": [0.5], "logits_scaling": [4.0], "residual_multiplier": [0.25], "embedding_multiplier": [3.0],
    "attention_multiplier": [0.5], "query_pre_attn_scalar": [8], "partial_rotary_factor": [0.25, 1.0],
    "no_rope_layers": [[1, 0]], "linear_num_value_heads": [8], "linear_num_key_heads": [2],
    "linear_conv_kernel_dim": [2],
}  # fmt: skip
NOT_ASKED = {"use_cache", "is_decoder", "add_cross_attention", "summary_use_proj", "summary_proj_to_labels"}
SUBSETS = ("block_all_reduce", "fused_loss", "fused_step")
# What a combination is made simpler towards; whatever else is set goes.
ONE_PROCESS = dict(tp_size=1, dp_size=1, zero_stage=1, optimizations="none")
PLAIN = dict(precision="fp32", seq_length=32, seed=0, learning_rate=1e-3, packing=True, max_grad_norm=0.0,
             weight_decay=0.0, adam_epsilon=EPSILON, debug_steps=STEPS)  # fmt: skip


def draw(choose: Random, ranks: int = 4, compiles: float = 0.0, resumes: float = 0.0) -> Case:
    """A combination for at most `ranks` ranks; the shares of those that are compiled, and resumed on another grid."""
    return draw_grid(choose, draw_training(choose), ranks, compiles, resumes)


def draw_training(choose: Random) -> Case:
    """The part of a combination that its result depends on."""
    model, data = draw_model(choose), choose.choice(DATA)
    if data == "chats" and model.get("vocab_size", 0) < 2056:
        model["vocab_size"] = 2056
    precision = choose.choices(["fp32", "bf16", "fp16"], [80, 12, 8])[0]
    training: dict[str, Any] = dict(
        precision=precision, seq_length=choose.choice([24, 33, 48, 61, 64]), seed=choose.randrange(1000),
        learning_rate=1e-3, global_batch_size=choose.choice([2, 3, 4, 4, 6, 8]), packing=_packing(choose),
        learning_rate_schedule=choose.choice(["constant", "linear", "cosine", "warmup-stable-decay"]),
        warmup_steps=choose.choice([0, 1, 0.5]), weight_decay=choose.choice([0.0, 0.01, 0.5]),
        max_grad_norm=choose.choice([0.0, 0.02, 1.0, 1.0]), adam_beta2=choose.choice([0.95, 0.999]),
        adam_epsilon=EPSILON, debug_steps=STEPS,
    )  # fmt: skip
    if precision == "bf16" and choose.random() < 0.25:
        training["master_weights"] = "bf16"
    if choose.random() < 0.3:
        training |= _lora(choose, model)
    if choose.random() < 0.25:
        training |= dict(eval_samples=choose.choice([1, 3]), eval_interval=2)
    if data == "chats" and choose.random() < 0.3:
        training["loss_on"] = "all"
    return dict(model=model, data=data, training=training, plain=choose.random() < 0.2)


def draw_model(choose: Random) -> dict[str, Any]:
    """A type of `families.TYPES`, its shape as it is there or with up to three fields otherwise."""
    kind = choose.choice([kind for kind in TYPES if kind in CONFIG_MAPPING])  # older transformers have fewer
    shape = dict(TYPES[kind])
    if choose.random() < 0.35:
        return dict(model_type=kind, **shape)
    known = AutoConfig.for_model(**tiny.tiny_shape(kind, **shape)).to_dict()
    own = known.keys() - PretrainedConfig().to_dict().keys() - NOT_ASKED
    values = {name: values for name, values in FIELDS.items() if name in own}
    values |= {name: [not known[name]] for name in own if isinstance(known[name], bool)}
    for name in choose.sample(sorted(values), choose.randint(1, 3)):
        shape[name] = choose.choice(values[name])
    if choose.random() < 0.1:  # for three ranks
        shape |= dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    if "layer_types" in shape and len(shape["layer_types"]) != shape.get("num_hidden_layers", 2):
        shape["layer_types"] = (shape["layer_types"] * 3)[: shape["num_hidden_layers"]]
    return dict(model_type=kind, **shape)


def _packing(choose: Random) -> bool | str:
    return choose.choice([True, True, False, "documents", "auto"])


def _lora(choose: Random, model: dict[str, Any]) -> dict[str, Any]:
    names = ALL
    if choose.random() < 0.5:
        try:
            found = kinds(targets(ModelFacts.of_shape(tiny.tiny_shape(**model)).meta, ALL))
            names = ",".join(choose.sample(found, choose.randint(1, len(found))))
        except Exception:  # a model that can't be built, as will show
            names = ALL
    return dict(lora_rank=choose.choice([1, 4, 8]), lora_alpha=8.0, lora_targets=names)


def draw_grid(choose: Random, training: Case, ranks: int, compiles: float = 0.0, resumes: float = 0.0) -> Case:
    """A combination of `draw_training`'s, with a grid for it."""
    found = _grid(choose, training, ranks)
    optimizations = _optimizations(choose)
    stand_ins: dict[str, Any] = {}
    if choose.random() < 0.4:
        stand_ins["rows"] = choose.choice([7, 43])
    if isinstance(training["training"]["packing"], str) and choose.random() < 0.4:
        stand_ins["attend"] = True
    if choose.random() < 0.25:
        stand_ins["graphs"] = True
    elif choose.random() < compiles:
        optimizations = ",".join({*SUBSETS} | {"compile"}) if optimizations == "auto" else f"compile,{optimizations}"
        optimizations = optimizations.removesuffix(",none")
        stand_ins["backend"] = choose.choice(["aot_eager", "aot_eager", "inductor"])
    case = dict(training, grid=found | dict(optimizations=optimizations), stand_ins=stand_ins)
    if choose.random() < resumes:
        case["resume"] = _grid(choose, training, ranks) | dict(optimizations=_optimizations(choose))
    return case


def _grid(choose: Random, case: Case, ranks: int) -> dict[str, Any]:
    training, heads = case["training"], case["model"].get("num_attention_heads", 8)
    samples = training["global_batch_size"]
    tp_sizes = [size for size in (1, 2, 2, 3, 3, 4, 8) if heads % size == 0]
    sizes = [(tp, dp) for tp in tp_sizes for dp in (1, 2, 2, 4) if tp * dp <= ranks and samples % dp == 0]
    tp_size, dp_size = choose.choice(sizes)
    share = samples // dp_size
    steps = choose.choice([n for n in (1, 1, 2, 3, 4) if share % n == 0])
    grid = dict(tp_size=tp_size, dp_size=dp_size, gradient_accumulation_steps=steps,
                zero_stage=choose.choice([1, 2, 3]), activation_checkpointing=choose.choice(["none", "none", "full"]),
                gradient_dtype=choose.choice(["auto", "auto", "fp32", "bf16"]))  # fmt: skip
    if grid["gradient_dtype"] == "bf16" and training["precision"] != "bf16":
        grid["gradient_dtype"] = "auto"
    return grid | ({"batch_size_per_gpu": "auto"} if choose.random() < 0.1 else {})


def _optimizations(choose: Random) -> str:
    kind = choose.random()
    if kind < 0.5:
        return "auto"
    return "none" if kind < 0.65 else ",".join(choose.sample(SUBSETS, choose.randint(1, len(SUBSETS))))


def simpler(case: Case) -> Iterator[Case]:
    """The combination with one thing less, in every way, the largest steps first."""
    for part in ("resume", "plain"):
        if case.get(part):
            yield {name: value for name, value in case.items() if name != part}
    plain = PLAIN | dict(global_batch_size=case["training"]["global_batch_size"])
    if case["training"] != plain:
        yield case | dict(training=plain)
    if case["stand_ins"]:
        yield case | dict(stand_ins={})
    yield from _without_each(case, "grid", ONE_PROCESS)
    model = case["model"]
    if model != dict(model_type="llama"):
        yield case | dict(model=dict(model_type="llama") | ({"vocab_size": 2056} if case["data"] == "chats" else {}))
    kept = TYPES[model["model_type"]]
    for name in model.keys() - {"model_type"}:
        if model[name] != kept.get(name, ...):
            rest = {key: value for key, value in model.items() if key != name}
            yield case | dict(model=rest | ({name: kept[name]} if name in kept else {}))
    if case["data"] != "demo":
        yield case | dict(data="demo")
    yield from _without_each(case, "training", plain)
    yield from _without_each(case, "stand_ins", {})
    for fewer in range(1, plain["global_batch_size"]):
        yield case | dict(training=case["training"] | dict(global_batch_size=fewer))


def _without_each(case: Case, part: str, plain: dict[str, Any]) -> Iterator[Case]:
    for name, value in case[part].items():
        if value != plain.get(name, ...):
            rest = {key: other for key, other in case[part].items() if key != name}
            yield case | {part: rest | ({name: plain[name]} if name in plain else {})}


def settings_of(case: Case, grid: str = "grid") -> dict[str, Any] | None:
    """The settings of a run, "grid" or "resume"; None where the global batch can't be cut so."""
    given = case["training"] | case[grid]
    micro, rest = divmod(given["global_batch_size"], given["dp_size"] * given.get("gradient_accumulation_steps", 1))
    return None if rest else dict(batch_size_per_gpu=micro) | given
