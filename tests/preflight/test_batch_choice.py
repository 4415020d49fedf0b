"""A global batch that is asked for: cut as set, or as the planner finds it fastest; refused where it can't be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tp2d_helpers.checkpoint.run_folder import write_manifest
from tp2d_helpers.checkpoint.settings import continue_run, record_run
from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.demo import SHAPES
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.planning import advice
from tp2d_helpers.planning.candidates import GIB, MODES, SAFE, fastest
from tp2d_helpers.planning.constants import Constants
from tp2d_helpers.planning.memory import Setting, memory_per_gpu
from tp2d_helpers.preflight import batch, plan
from tp2d_helpers.preflight.batch import choose_batch, fit_batch
from tp2d_helpers.preflight.checks import memory_on
from tp2d_helpers.speed import optimizations
from tp2d_helpers.speed.devices import device_named
from tp2d_helpers.training.elastic import first_size, possible_dp_sizes

SEVEN = ModelFacts.of_shape(SHAPES["qwen2-7b"])
H200S = {"GPU": 8.0, "accelerator_type:H200": 1.0}
SIZES = ("batch_size_per_gpu", "gradient_accumulation_steps", "activation_checkpointing")


@pytest.fixture(autouse=True)
def _a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With GPUs, and never calibrated."""
    monkeypatch.setattr(optimizations, "compilers", lambda on_gpu: True)
    for module in (batch, advice):
        monkeypatch.setattr(module, "constants_of", lambda device: Constants())


def asked(samples: int = 64, **settings: Any) -> Config:
    """A config with a global batch and a micro-batch to be chosen, on 2 × 2 GPUs."""
    large = dict(tp_size=2, dp_size=2, seq_length=4096, use_gpu=True, batch_size_per_gpu="auto")
    return make_config(**{**large, "global_batch_size": samples, **settings})


def choose(config: Config, resources: dict[str, float] = H200S) -> tuple[Config, str]:
    """(the config, preflight's row in one text)."""
    chosen, rows = choose_batch(fit_batch(config), SEVEN, resources)
    return chosen, " ".join(rows[0]) if rows else ""


# What a global batch leaves.


def test_accumulation_follows_from_the_global_batch() -> None:
    config, row = choose(asked(batch_size_per_gpu=4))
    assert (config.gradient_accumulation_steps, config.samples_per_step) == (8, 64)
    assert "64 samples per step = batch_size_per_gpu 4 × dp_size 2 × gradient_accumulation_steps 8" in row
    assert fit_batch(asked(batch_size_per_gpu=4, gradient_accumulation_steps=8)).gradient_accumulation_steps == 8
    other = config.change(dp_size=1, batch_size_per_gpu=3)  # free to be changed, as ever
    assert choose(other) == (other, "") and other.samples_per_step == 24


@pytest.mark.parametrize("settings, parts", [
    (dict(samples=0), ["batch_size_per_gpu = 'auto': global_batch_size", "it is 0", "say to 32"]),
    (dict(samples=63), ["global_batch_size = 63", "dp_size = 2", "take 62 or 64"]),
    (dict(samples=1), ["global_batch_size = 1: must be a multiple of dp_size = 2; take 2"]),
    (dict(samples=20, batch_size_per_gpu=4), ["batch_size_per_gpu × dp_size = 4 × 2 = 8; take 16 or 24"]),
    (dict(samples=64, batch_size_per_gpu=4, gradient_accumulation_steps=3),
     ["gradient_accumulation_steps = 3", "global_batch_size = 64", "it must be 8; take 1 to let it follow"]),
    (dict(samples=64, gradient_accumulation_steps=3), ["must divide the 32 samples of each replica"]),
])  # fmt: skip
def test_a_global_batch_that_cannot_be_cut(settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        fit_batch(asked(**settings))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name, value, right", [
    ("batch_size_per_gpu", "Auto", "should be 'auto'"), ("batch_size_per_gpu", "max", "should be 'auto'"),
    ("batch_size_per_gpu", 0, "greater than or equal to 1"), ("activation_checkpointing", "Auto", "'full' or 'auto'"),
    ("global_batch_size", "auto", "valid integer"), ("global_batch_size", -1, "greater than or equal to 0"),
])  # fmt: skip
def test_other_texts(name: str, value: Any, right: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?m)^{name} = {value!r}: .*{right}"):
        make_config(**{name: value})


# What the planner chooses.


def test_the_fastest_that_fits() -> None:
    """As `fastest` has it; preflight's memory check accepts it, and says how full it gets."""
    config, row = choose(asked())
    best = fastest(SEVEN, device_named("H200"), 4, 64, 4096, tp_sizes=[2], modes=["none"])
    assert [getattr(config, name) for name in SIZES] == [getattr(best.setting, name) for name in SIZES]
    assert (config.samples_per_step, config.global_batch_size) == (64, 0)
    found, parts = memory_on(config, SEVEN, device_named("H200"))
    assert f"that fit: {found.split()[0]} of 139.8 GiB, by the planner (constants of H200)" in row
    assert "tight" not in parts and config.batch_size_per_gpu > 1


def test_each_auto_by_itself() -> None:
    """16 × 4096 tokens fit with checkpointing alone; without any, 4 do; with a count of micro-batches, that stays."""
    mode, row = choose(asked(batch_size_per_gpu=16, activation_checkpointing="auto"))
    assert (mode.batch_size_per_gpu, mode.activation_checkpointing) == (16, "full")
    assert row.endswith("activation_checkpointing 'full'") and mode.samples_per_step == 64
    both, _ = choose(asked(activation_checkpointing="auto"))
    assert both.activation_checkpointing == "none"
    counted, _ = choose(asked(gradient_accumulation_steps=16))
    assert (counted.batch_size_per_gpu, counted.gradient_accumulation_steps) == (2, 16)
    alone, _ = choose(asked(samples=0, batch_size_per_gpu=2, activation_checkpointing="auto"))
    assert (alone.activation_checkpointing, alone.samples_per_step) == ("none", 4)


def test_the_smallest_gpu_counts() -> None:
    both = H200S | {"accelerator_type:A100": 1.0}
    mixed, large = choose(asked(activation_checkpointing="auto"), both)[0], choose(asked())[0]
    assert mixed.batch_size_per_gpu < large.batch_size_per_gpu


@pytest.mark.parametrize("types, name", [([], "no type of GPU"), (["H200", "Gaudi"], "H200, Gaudi")])
def test_a_gpu_of_unknown_memory_is_refused(types: list[str], name: str) -> None:
    with pytest.raises(ConfigError, match=f"batch_size_per_gpu = 'auto': Ray names {name}, .* set it"):
        choose(asked(), {"GPU": 4.0} | {f"accelerator_type:{kind}": 1.0 for kind in types})


def test_nothing_fits() -> None:
    """It says what the smallest would need, and what would fit with more of the rest."""
    with pytest.raises(ConfigError) as error:
        choose(asked(seq_length=65536))
    text = str(error.value)
    assert text.startswith("batch_size_per_gpu = 'auto': nothing fits into 125.8 GiB, 90% of H200's. tp_size")
    assert "= 1 × 65536" in text and "activation_checkpointing = 'full'" in text and "What fits" in text
    with pytest.raises(ConfigError, match="take more GPUs, a smaller model, or a seq_length below 4096"):
        choose(asked(tp_size=1, dp_size=1, activation_checkpointing="auto"), {"GPU": 1.0, "accelerator_type:L4": 1.0})


def test_a_refused_micro_batch_names_auto() -> None:
    with pytest.raises(ConfigError, match='batch_size_per_gpu = "auto" with global_batch_size = 64 takes the fastest'):
        memory_on(asked(samples=0, batch_size_per_gpu=32), SEVEN, device_named("H200"))


def test_it_fits_with_fewer_replicas_too() -> None:
    """A replica's share of the optimizer grows as others go: what fits at dp_size 4 must fit at min_dp_size."""

    def needed_by_two(config: Config) -> float:
        """GiB."""
        fewer = dict(dp_size=2, gradient_accumulation_steps=2 * config.gradient_accumulation_steps)
        return memory_per_gpu(SEVEN.shard(1), Setting.of(config.model_dump() | fewer)).total / GIB

    wide = asked(tp_size=1, dp_size=4, seq_length=2048, activation_checkpointing="auto")
    elastic, _ = choose(wide.change(min_dp_size=2))
    assert possible_dp_sizes(elastic)[0] == 2 and needed_by_two(elastic) <= SAFE * 139.8
    assert needed_by_two(choose(wide)[0]) > SAFE * 139.8  # so the choice is another one


def test_the_size_to_start_with_before_the_choice() -> None:
    config = fit_batch(asked(samples=12, dp_size=4, min_dp_size=1))
    assert possible_dp_sizes(config) == [1, 2, 3, 4]
    assert [first_size(config, {"GPU": gpus}).dp_size for gpus in (2, 6, 8)] == [1, 3, 4]


def test_a_vocabulary_that_tp_size_does_not_divide() -> None:
    odd = ModelFacts.of_shape({**SHAPES["qwen2-7b"], "vocab_size": 151_937})
    config, _ = choose_batch(asked(), odd, H200S)
    assert config.batch_size_per_gpu in (1, 2, 4, 8, 16, 32)


# A run that goes on.


def test_another_grid_keeps_the_global_batch(tmp_path: Path) -> None:
    """The run has numbers; "auto" may cut its global batch in another way."""
    begun, _ = choose(asked(storage_path=str(tmp_path), experiment_name="first"))
    record_run(begun)
    folder = begun.run_dir / "checkpoint_00000003"
    folder.mkdir()
    where = dict(step=3, epoch=0, epoch_step=3, world_size=1, tp_size=2, dp_size=2, zero_stage=1)
    write_manifest(folder, 0, {}, **where, metrics={"loss": 1.0})
    here = dict(storage_path=str(tmp_path), experiment_name="first")
    for samples in (64, 0):  # of "auto" without one, the run's
        config, _ = choose(continue_run(asked(samples, dp_size=4, **here)))
        assert config.samples_per_step == 64 and config.dp_size == 4
    with pytest.raises(ConfigError, match="global_batch_size = 32: the run's is 64, and stays as it was"):
        continue_run(asked(32, **here))
    config, _ = choose(continue_run(asked(64, batch_size_per_gpu=2, gradient_accumulation_steps=7, **here)))
    assert config.gradient_accumulation_steps == 16  # as without global_batch_size; preflight's row tells it


# All of preflight.

SMALL = dict(dataset_name="demo", seq_length=64, batch_size_per_gpu="auto", activation_checkpointing="auto")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on two cores and no GPU."""
    ray.init(num_cpus=2, num_gpus=0, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_on_cpu_a_share_is_one_micro_batch(cluster: None, tmp_path: Path) -> None:
    config = make_config(**SMALL, model_name="demo", use_gpu=False, tp_size=1, dp_size=2, global_batch_size=8,
                         storage_path=str(tmp_path))  # fmt: skip
    done = plan.preflight(config)
    assert [getattr(done.config, name) for name in SIZES] == [4, 1, "none"]
    row = next(row for row in done.rows if row[0] == "batch")
    assert row[1] == "CPU, memory is not planned" and row[2].startswith("8 samples per step = batch_size_per_gpu 4")
    follows = plan.preflight(config.change(batch_size_per_gpu=2))
    assert follows.config.gradient_accumulation_steps == 2 and "batch" in [row[0] for row in follows.rows]
    for samples in (0, 7):
        with pytest.raises(ConfigError, match="global_batch_size"):
            plan.preflight(config.change(global_batch_size=samples))


def test_on_gpus(
    cluster: None, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As Ray would report them: the table says what was taken, and the config that workers get has numbers."""
    monkeypatch.setattr(plan, "connect", lambda: {"GPU": 2.0, "CPU": 2.0, "accelerator_type:H200": 1.0})
    monkeypatch.setattr(plan, "check_placement", lambda *_: [2])
    config = make_config(**SMALL, model_name=str(tiny_model("llama")), use_gpu=True, tp_size=2, dp_size=1,
                         global_batch_size=16, storage_path=str(tmp_path))  # fmt: skip
    done = plan.preflight(config)
    assert done.config.samples_per_step == 16 and isinstance(done.config.batch_size_per_gpu, int)
    assert done.config.activation_checkpointing in MODES
    names = [row[0] for row in done.rows]
    assert names[names.index("memory") + 1] == "batch"
