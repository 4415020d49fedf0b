"""What is chosen, what is refused before a worker starts, and what an out-of-memory error says."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.demo import SHAPES
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.planning import advice, out_of_memory
from tp2d_helpers.planning.advice import ways_out
from tp2d_helpers.planning.candidates import GIB, HEADER, SAFE, candidates, fastest
from tp2d_helpers.planning.memory import ON_GPU, Setting
from tp2d_helpers.planning.out_of_memory import explain_out_of_memory
from tp2d_helpers.preflight.checks import check_memory, memory_on
from tp2d_helpers.speed import optimizations
from tp2d_helpers.speed.devices import device_named

SEVEN = ModelFacts.of_shape(SHAPES["qwen2-7b"])
SMALL = ModelFacts.of_shape(SHAPES["qwen2.5-0.5b"])
H200 = device_named("H200")
TOO_LARGE = dict(tp_size=2, dp_size=1, batch_size_per_gpu=16, seq_length=4096, use_gpu=True)


@pytest.fixture(autouse=True)
def _compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with GPUs: Triton is there."""
    monkeypatch.setattr(optimizations, "compilers", lambda on_gpu: True)


def test_candidates_fit_and_are_sorted() -> None:
    found = candidates(SEVEN, H200, 2, 8, 4096)
    assert found and all(one.memory.total <= SAFE * 139.8 * GIB for one in found)
    assert all(one.setting.global_tokens == 8 * 4096 for one in found)
    assert {one.setting.tp_size * one.setting.dp_size for one in found} == {2}
    rates = [one.tokens_per_second_per_gpu for one in found]
    assert rates == sorted(rates, reverse=True)
    assert len(found[0].row()) == len(HEADER)


def test_tp_where_the_model_does_not_fit_without() -> None:
    """Plain data parallelism is faster for what fits; on 2 GPUs of 80 GiB, the 7B model needs TP or recomputation."""
    assert fastest(SMALL, H200, 2, 32, 1024).setting.tp_size == 1
    base = Setting(optimizations=ON_GPU, gradient_dtype="bf16")
    large = fastest(SEVEN, device_named("H100"), 2, 8, 2048, modes=["none"], base=base)
    assert large.setting.tp_size == 2 and large.memory.total <= SAFE * 79.1 * GIB
    with pytest.raises(ConfigError, match="nothing fits into 1 × H100 of 79 GiB at a global batch of 8 samples"):
        fastest(SEVEN, device_named("H100"), 1, 8, 4096)


def test_what_can_not_be_divided_is_no_candidate() -> None:
    """Qwen2.5-0.5B has 2 key-value heads; 6 samples are no multiple of 4 replicas."""
    sizes = {(one.setting.tp_size, one.setting.dp_size) for one in candidates(SMALL, H200, 4, 6, 512)}
    assert sizes == {(2, 2)}


def test_refused_with_what_would_fit() -> None:
    config = make_config(**TOO_LARGE)
    with pytest.raises(ConfigError) as error:
        memory_on(config, SEVEN, H200)
    text = str(error.value)
    assert "tp_size × dp_size = 2 × 1, batch_size_per_gpu × seq_length = 16 × 4096" in text
    assert "weights 7.6, masters and moments 45.6, activations" in text and "H200 has 139.8 GiB" in text
    assert "batch_size_per_gpu = 8, gradient_accumulation_steps = 2 (" in text
    assert "activation_checkpointing = 'full' (" in text


def test_what_is_proposed_is_accepted() -> None:
    setting = Setting.of(make_config(**TOO_LARGE).model_dump())
    ways = ways_out(SEVEN, H200, setting, SAFE * 139.8 * GIB)
    assert len(ways) == 3
    for way in ways:
        values = {name: value for name, value in vars(way.setting).items() if name in Config.model_fields}
        values.pop("optimizations")
        found, parts = memory_on(make_config(**{**TOO_LARGE, **values}), SEVEN, H200)
        assert found.endswith("of 139.8 GiB per GPU") and "tight" not in parts
        assert way.setting.global_tokens == setting.global_tokens


def test_ways_out_of_a_single_sample() -> None:
    """No smaller micro-batch is left: checkpointing, another stage, more TP."""
    setting = Setting(dp_size=4, seq_length=32768, optimizations=ON_GPU)
    changes = [advice._changes(setting, way.setting) for way in ways_out(SEVEN, H200, setting, SAFE * 139.8 * GIB)]
    assert all("batch_size_per_gpu" not in changed for changed in changes)
    assert {"activation_checkpointing": "full"} in changes


def test_nothing_fits() -> None:
    config = make_config(**{**TOO_LARGE, "tp_size": 1, "batch_size_per_gpu": 1})
    with pytest.raises(ConfigError, match="take more GPUs, a smaller model, or a seq_length below 4096"):
        memory_on(config, SEVEN, device_named("L4"))


def test_stage_3_runs_without_what_it_can_not() -> None:
    third = candidates(SEVEN, H200, 2, 8, 1024, zero_stages=[3])
    assert third and {one.setting.optimizations for one in third} == {frozenset({"fused_loss", "fused_step"})}


def test_tight_is_said_and_not_refused() -> None:
    config = make_config(**{**TOO_LARGE, "batch_size_per_gpu": 4})
    found, parts = memory_on(config, SEVEN, H200)
    assert "tight" not in parts
    needed = float(found.split()[0])
    _, parts = memory_on(config, SEVEN, replace(H200, memory=needed / 0.95))
    assert parts.endswith("GiB; tight: it may run out of memory")


@pytest.mark.parametrize("use_gpu, resources, rows", [
    (True, {"GPU": 2.0, "accelerator_type:H200": 1.0}, 1),
    (True, {"GPU": 2.0}, 0),  # Ray doesn't know
    (False, {"GPU": 2.0, "accelerator_type:H200": 1.0}, 0),
])  # fmt: skip
def test_row_of_preflight(tiny_model: Any, use_gpu: bool, resources: dict[str, float], rows: int) -> None:
    config = make_config(model_name=str(tiny_model("llama")), use_gpu=use_gpu)
    found = check_memory(config, ModelFacts.read(config.model_name), resources)
    assert len(found) == rows
    if rows:
        assert found[0][0] == "memory" and found[0][1].endswith(" of 139.8 GiB per GPU")


def test_a_gpu_that_is_not_known_is_named() -> None:
    """Ray's types may have one that the table lacks: nothing is predicted, and the row says why."""
    resources = {"GPU": 2.0, "accelerator_type:Gaudi": 1.0, "accelerator_type:H200": 1.0}
    assert check_memory(make_config(**TOO_LARGE), SEVEN, resources) == [
        ("memory", "Gaudi: not a GPU that is known here", "no prediction")
    ]


def test_the_smallest_of_several_gpus_counts() -> None:
    """A worker may get it, whatever the order in which Ray names them."""
    config = make_config(**{**TOO_LARGE, "batch_size_per_gpu": 4})
    assert check_memory(config, SEVEN, {"accelerator_type:H200": 1.0})
    for types in (["L4", "H200"], ["H200", "L4"], ["L4"]):
        with pytest.raises(ConfigError, match=r"L4 has 22\.0 GiB"):
            check_memory(config, SEVEN, {f"accelerator_type:{name}": 1.0 for name in types})


def test_the_fewest_replicas_count() -> None:
    """7B at ZeRO 1 fits into two H200 and not into one: a run that may shrink to one is refused before it does."""
    settings = dict(use_gpu=True, tp_size=1, dp_size=2, seq_length=64, gradient_accumulation_steps=2, lora_rank=0)
    config, gpus = make_config(**settings), {"accelerator_type:H200": 1.0}
    [(_, found, _)] = check_memory(config, SEVEN, gpus)
    assert found.endswith("GiB per GPU")
    [(_, found, _)] = check_memory(config.change(dp_size=4, min_dp_size=2), SEVEN, gpus)
    assert found.endswith("GiB per GPU at dp_size 2")
    with pytest.raises(ConfigError, match=r"tp_size × dp_size = 1 × 1, .* needs "):
        check_memory(config.change(min_dp_size=1), SEVEN, gpus)


SAID = (
    "CUDA out of memory. Tried to allocate 4.64 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1 GiB is free."
)


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line: the configuration, what was asked for and taken, three ways out below what was predicted."""
    monkeypatch.setattr(out_of_memory, "_gpu", lambda: ("NVIDIA H200", 139.8, 137.5))
    config = make_config(**{**TOO_LARGE, "batch_size_per_gpu": 4}).model_dump()
    with pytest.raises(RuntimeError) as caught, explain_out_of_memory(config, SEVEN):
        raise torch.OutOfMemoryError(SAID)
    error = pickle.loads(pickle.dumps(caught.value))  # as it comes to the driver
    text = str(error)
    assert "\n" not in text and caught.value.__suppress_context__ and type(error) is RuntimeError
    assert "2 × 1, batch_size_per_gpu × seq_length = 4 × 4096, zero_stage 1, activation_checkpointing 'none'" in text
    assert "Tried to allocate 4.64 GiB; tensors took 137.5 of the 139.8 GiB of NVIDIA H200" in text
    assert "batch_size_per_gpu = 1, gradient_dtype = 'bf16', gradient_accumulation_steps = 4 (" in text
    assert text.count("; or ") == 1 and "nan" not in text


def test_out_of_memory_without_a_known_gpu(tiny_model: Any) -> None:
    """The model's config is loaded if it isn't given; a GPU that isn't in the table is no second error."""
    config = make_config(model_name=str(tiny_model("llama")), use_gpu=True, batch_size_per_gpu=8).model_dump()
    message = r"out of GPU memory at tp_size × dp_size = 2 × 2, .* 8 × 512"
    with pytest.raises(RuntimeError, match=message), explain_out_of_memory(config):
        raise torch.OutOfMemoryError("out of memory")


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), explain_out_of_memory({}, SEVEN):
        raise KeyError("x")
    with explain_out_of_memory({}, SEVEN):
        pass
