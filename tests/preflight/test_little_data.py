"""What is done with little data: how much is held out of it, and what is said if it is too little."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.preflight.data import check_data


@pytest.fixture
def run(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """run(number, **settings): the config of a run on so many documents of 31 tokens and an end."""
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path / "cache"))

    def config(number: int, **more: object) -> Config:
        path = tmp_path / f"{number}.jsonl"
        rows = ({"text": f"{i:04}" + " the" * 200} for i in range(number))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = dict(model_name=str(tiny_model("llama")), dataset_name=str(path), use_gpu=False, tp_size=1,
                        dp_size=1, seq_length=32, packing=False, batch_size_per_gpu=4, eval_samples="auto")  # fmt: skip
        return make_config(**{**settings, **more})

    return config


def checked(config: Config) -> tuple[int, int, str]:
    _, data, _, chosen = check_data(config, ModelFacts.read(config.model_name))
    return data.samples, data.eval_samples, chosen


@pytest.mark.parametrize("number, held_out", [(200, 16), (128, 16), (30, 3), (9, 1), (7, 0)])
def test_at_most_an_eighth_is_held_out(run: Callable[..., Config], number: int, held_out: int) -> None:
    samples, evaluated, chosen = checked(run(number))
    assert (samples, evaluated) == (number - held_out, held_out)
    words = (
        f"{held_out} samples held out, of {held_out} documents" if held_out else "no samples held out, as there are few"
    )
    assert chosen.endswith(words)


def test_what_needs_held_out_samples_is_refused_without(run: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"eval_samples = 'auto': .* has 7 samples of 32 tokens, too few"):
        checked(run(7, eval_interval=1))


def test_another_dataset_may_be_small(run: Callable[..., Config]) -> None:
    other = Path(run(5).dataset_name)
    other.write_text(other.read_text().replace("the", "a"))
    assert checked(run(40, eval_dataset_name=str(other)))[:2] == (40, 5)


def test_what_is_said_works(run: Callable[..., Config]) -> None:
    """The settings that the error names are those of a run with a step."""
    with pytest.raises(
        ConfigError, match=r"3 padded samples .* fewer than one global batch of 8 .*This works: "
    ) as error:
        checked(run(3, gradient_accumulation_steps=2))
    assert str(error.value).endswith("batch_size_per_gpu = 3, gradient_accumulation_steps = 1")
    assert checked(run(3, batch_size_per_gpu=3, gradient_accumulation_steps=1))[:2] == (3, 0)
    with pytest.raises(ConfigError, match="This works: seq_length = ") as error:
        checked(run(1, packing=True, seq_length=1024, eval_samples=0))
    length = int(str(error.value).rpartition(" ")[2])
    assert checked(run(1, packing=True, seq_length=length, eval_samples=0))[0] >= 4
