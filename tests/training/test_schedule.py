"""The learning rate of every step: each schedule, on each grid, over a whole run; AdamW's betas and epsilon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import Run, assert_equal_runs, run_grid
from plain import plain_run, rate_of

from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.training.schedule import check_schedule, learning_rate_at

Train = Callable[..., Run]
SCHEDULES = ["constant", "linear", "cosine", "warmup-stable-decay"]
RATE = 1e-3  # of all runs of `train`


def settings(schedule: str, **others: Any) -> dict[str, Any]:
    """Of a schedule that ends at a tenth of the rate, if it can."""
    return dict(learning_rate_schedule=schedule, min_learning_rate=0.0 if schedule == "constant" else 1e-4, **others)


def rates(records: list[dict[str, Any]]) -> list[float]:
    return [record["learning_rate"] for record in records]


@pytest.mark.parametrize("warmup_steps", [0, 3, 0.25, 1e-9])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_curve(schedule: str, warmup_steps: float) -> None:
    config = make_config(learning_rate=RATE, **settings(schedule, warmup_steps=warmup_steps)).model_dump()
    for total in (20, 21):
        found = [learning_rate_at(step, config, total) for step in range(1, total + 1)]
        assert found == pytest.approx([rate_of(config, done, total) for done in range(total)], rel=1e-12, abs=1e-18)
        assert max(found) == pytest.approx(RATE)
        if schedule != "constant":  # the minimum comes after the last step
            assert 1e-4 < found[-1] < 4e-4 and found[-1] == min(found[10:])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tp_size, dp_size", [(1, 1), (2, 2)])
def test_a_whole_run(train: Train, schedule: str, tp_size: int, dp_size: int) -> None:
    run = train("qwen2-tied", num_epochs=2, debug_steps=5, tp_size=tp_size, dp_size=dp_size,
                **settings(schedule, warmup_steps=0.2))  # fmt: skip
    assert len(run.records) == 10
    assert rates(run.records) == pytest.approx([rate_of(run.config, done, 10) for done in range(10)], rel=1e-12)
    if (tp_size, schedule) == (2, "cosine"):
        assert_equal_runs(run, plain_run(run.config))


@pytest.mark.parametrize("zero_stage, dp_size, optimizations", [
    (1, 2, "auto"), (2, 2, "none"), (3, 2, "auto"), (1, 1, "auto"),
])  # fmt: skip
def test_betas_and_epsilon(train: Train, zero_stage: int, dp_size: int, optimizations: str) -> None:
    """Far from AdamW's defaults, so that one that is not passed on would show."""
    adam = dict(adam_beta1=0.5, adam_beta2=0.8, adam_epsilon=1e-3)
    run = train("qwen2-untied", zero_stage=zero_stage, dp_size=dp_size, optimizations=optimizations, **adam)
    assert_equal_runs(run, plain_run(run.config))


def corrections(engine: Any, *groups: Any) -> list[float]:
    """For `run_grid(after=)`: what the kernel for GPUs divides the moments by, in the step after the last."""
    return engine.optimizer._count_step(torch.tensor(2.0), torch.tensor(0.0)).tolist()


def test_the_kernel_for_gpus_is_told_the_betas(train: Train) -> None:
    """Its scalars are computed on all devices: clipping, both corrections of the moments, whether the step is taken."""
    config = train("qwen2-tied", debug_steps=2, warmup_steps=0).config
    config |= dict(adam_beta1=0.5, adam_beta2=0.8, experiment_name="betas")
    (found,) = run_grid(config, after=corrections)
    assert found == pytest.approx([0.5, 1 - 0.5**3, (1 - 0.8**3) ** 0.5, 1.0])


# Values that can't work.


@pytest.mark.parametrize("wrong, message", [
    (dict(learning_rate=1e-5, learning_rate_schedule="cosine", min_learning_rate=1e-4),
     "min_learning_rate = 0.0001: must be below learning_rate, which is 1e-05"),
    (dict(learning_rate=1e-5, learning_rate_schedule="cosine", min_learning_rate=1e-5), "must be below learning_rate"),
    (dict(min_learning_rate=1e-6), "min_learning_rate = 1e-06: the learning_rate_schedule 'constant' never goes there"),
    (dict(warmup_steps=1.0), "warmup_steps = 1.0: must be a valid number of steps (0, 1, 2 …), or a share"),
    (dict(warmup_steps=2.5), "warmup_steps = 2.5: must be a valid number of steps"),
    (dict(warmup_steps=-0.1), "warmup_steps = -0.1: must be a valid number of steps"),
    (dict(learning_rate_schedule="cosin"), "'constant', 'linear', 'cosine' or 'warmup-stable-decay'"),
])  # fmt: skip
def test_wrong_values(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(**wrong)
    assert message in str(error.value)


def test_a_minimum_above_the_rate_that_auto_takes() -> None:
    """It is known once "auto" is settled, and refused then."""
    config = make_config(learning_rate="auto", learning_rate_schedule="linear", min_learning_rate=1e-4)
    with pytest.raises(ConfigError, match="must be below learning_rate, which is 1e-05"):
        config.change(learning_rate=1e-5)


def test_a_warmup_as_long_as_the_run() -> None:
    config = make_config(warmup_steps=10, learning_rate_schedule="linear")
    with pytest.raises(ConfigError, match="warmup_steps = 10: the run has 10 steps, so none would be left"):
        check_schedule(config, 10)
    assert check_schedule(config, 11) == "1e-05 after 10 steps of warm-up, linear to 0 at step 11"
    assert check_schedule(Config(warmup_steps=0.1), 11) == "1e-05 after 2 steps of warm-up"
