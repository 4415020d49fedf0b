"""A validation set of its own: what is held out is of that dataset, and training sees all of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import write
from grid import Run, assert_equal_runs

from tp2d_helpers.checkpoint.settings import check_same_data
from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.dataset import Packing, TokenDataset, load_samples
from tp2d_helpers.data.tokens import prepare_tokens
from tp2d_helpers.demo import demo_documents


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two files with documents of the demo."""
    folder, documents = tmp_path_factory.mktemp("halves"), demo_documents()
    return tuple(str(write(folder / f"{i}.jsonl", documents[i:20:2])) for i in (0, 1))


@pytest.mark.parametrize("packing", [True, False, "documents"])
def test_samples(tokenizer: str, halves: tuple[str, str], packing: Packing) -> None:
    trained, evaluated = (TokenDataset(prepare_tokens(tokenizer, half), 32, packing) for half in halves)
    both = load_samples(tokenizer, halves[0], 32, packing, 5, halves[1], dataset_percentage=50.0, progress=False)
    assert len(both) == both.samples + 5 and both.samples < trained.samples
    for index in range(both.samples):
        assert torch.equal(both[index]["input_ids"], trained[index]["input_ids"])
    for index in range(5):
        for name, tokens in evaluated[index].items():
            assert torch.equal(both[both.samples + index][name], tokens)


def test_it_is_of_the_data_s_identity(tokenizer: str, halves: tuple[str, str], tmp_path: Path) -> None:
    def identity(*evaluated: str) -> dict[str, Any]:
        return load_samples(tokenizer, halves[0], 32, True, 1, *evaluated, progress=False).identity

    other = write(tmp_path / "other.jsonl", ["of another text " * 40])
    first, second, none = identity(halves[1]), identity(str(other)), identity()
    check_same_data(first, identity(halves[1]), halves[0])
    for then, now, words in (
        (first, second, "10 documents of .* then, 1 documents of .* now"),
        (none, first, "documents of dataset_name then, 10 documents"),
        (first, none, "10 documents of .* then, documents of dataset_name now"),
    ):
        with pytest.raises(ConfigError, match=f"^eval_dataset_name: its tokens are not the run's: {words}"):
            check_same_data(then, now, halves[0])
    with pytest.raises(ConfigError, match=r"^dataset_name = 'x': its tokens are not those"):
        check_same_data(first, {**first, "sha256": "def"}, "x")


@pytest.mark.parametrize("name, content, message", [
    ("none.jsonl", None, "no such file or folder"), ("a.jsonl", "{", ".*a.jsonl can't be loaded, after 0 rows"),
    ("a.jsonl", '{"body": "a"}', "text_column = 'text': .*a.jsonl has no such column"),
])  # fmt: skip
def test_errors_name_it(tokenizer: str, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"^eval_dataset_name = '{tmp_path}/{name}': {message}"):
        load_samples(tokenizer, "demo", 32, True, 1, str(tmp_path / name), progress=False)


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_is_the_same_on_every_grid(
    train: Callable[..., Run], halves: tuple[str, str], packing: Packing
) -> None:
    settings = dict(dataset_name="demo", eval_dataset_name=halves[1], eval_samples=5, debug_steps=4, packing=packing)
    settings |= dict(eval_interval=2)
    run, reference = train("llama", **settings, tp_size=2, dp_size=2), train("llama", **settings)
    assert_equal_runs(run, reference)
    losses = [[record["eval_loss"] for record in r.records if record["eval_loss"]] for r in (run, reference)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-6)
    other = train("llama", **{**settings, "eval_dataset_name": halves[0]})
    assert_equal_runs(other, reference)  # the samples to train on don't depend on it
    assert other.records[-1]["eval_loss"] != pytest.approx(losses[1][-1], rel=1e-4)
