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
from tp2d_helpers.config import ConfigError, make_config
from tp2d_helpers.data.dataset import Packing, TokenDataset, load_samples
from tp2d_helpers.data.overlap import repeated_documents, same_source
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.data.tokens import prepare_tokens
from tp2d_helpers.demo import demo_documents
from tp2d_helpers.preflight.checks import check_resilience


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


# What is evaluated on must not be trained on.


@pytest.fixture
def train_folder(tmp_path: Path) -> Path:
    """A folder with two files to train on and one that is not, and other ways to the first one."""
    for name in ("a", "b", "test"):
        write(tmp_path / "data" / f"{name}.jsonl", [f"{name} {i} of this file" for i in range(9)])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data" / "a.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "data" / "a.jsonl")
    (tmp_path / "folder").symlink_to(tmp_path / "data")
    return tmp_path


@pytest.mark.parametrize("evaluated", [
    "data/a.jsonl", "data/../data/a.jsonl", "link.jsonl", "hard.jsonl", "folder/a.jsonl", "folder", "data", "data/a*",
    "data/test.jsonl,data/a.jsonl", "data/[ax]*l",
])  # fmt: skip
def test_a_file_that_is_trained_on(train_folder: Path, evaluated: str) -> None:
    names = ",".join(str(train_folder / name) for name in evaluated.split(","))
    for dataset in ("data", "folder", "data/*.jsonl", "data/a.jsonl"):
        assert "a.jsonl" in same_source(str(train_folder / dataset), names).replace("hard", "a").replace("link", "a")
    config = dict(dataset_name=str(train_folder / "data"), eval_dataset_name=names, eval_samples=1)
    with pytest.raises(
        ConfigError, match=r"^eval_dataset_name = .*: must be another dataset than .* has .*\.jsonl, too"
    ):
        check_resilience(make_config(**config))


@pytest.mark.parametrize(
    "evaluated", ["data/test.jsonl", "folder/test*", "org/set", "demo", "no such", "/no/such/file"]
)
def test_what_is_not_trained_on_passes(train_folder: Path, evaluated: str) -> None:
    """What isn't there is for those who read it to say."""
    evaluated = str(train_folder / evaluated) if "test" in evaluated else evaluated
    assert same_source(str(train_folder / "data"), evaluated) == ""


@pytest.mark.parametrize("trained, evaluated, config, same", [
    ("org/set", "org/set:train", "", True), ("org/set:train", "org/set", "", True), ("org/set", "org/set", "", True),
    ("org/set:a", "org/set:a", "", True), ("org/set", "org/set:test", "", False), ("org/set", "org/other", "", False),
    ("wikitext", "wikitext:train", "wikitext-2-raw-v1", True), ("wikitext", "wikitext:train", "", True),
    ("org/set:train[:90%]", "org/set:train[90%:]", "", False), ("demo", "demo", "", True),
])  # fmt: skip
def test_a_split_that_is_trained_on(trained: str, evaluated: str, config: str, same: bool) -> None:
    assert bool(same_source(trained, evaluated, config)) == same


@pytest.mark.parametrize("packing, seq_length, samples", [(True, 10, 4), (False, 8, 4), ("documents", 30, 2)])
@pytest.mark.parametrize("copies", [[], [0, 2], range(7)])
def test_documents_that_are_trained_on(
    tokenizer: str, cache: Path, tmp_path: Path, packing: Packing, seq_length: int, samples: int, copies: list[int]
) -> None:
    """By their text, whatever the file is called and whatever its format; those alone that are evaluated on count."""
    trained, evaluated = [[" ".join([letter] * 12) for letter in letters] for letters in ("ABCDEFGHI", "abcdefg")]
    evaluated = [trained[-1 - i] + " \n" if i in copies else text for i, text in enumerate(evaluated)]
    source, other = write(tmp_path / "trained.jsonl", trained), write(tmp_path / "evaluated.csv", evaluated)
    data = load_samples(tokenizer, str(source), seq_length, packing, samples, str(other), progress=False)
    tokens = torch.cat([data[index]["input_ids"] for index in range(data.samples, len(data))])
    letters = set(load_tokenizer(tokenizer).decode(tokens, skip_special_tokens=True)) - {*" \n"}
    assert repeated_documents(data) == (sum(letter.isupper() for letter in letters), len(letters))
    assert 2 <= len(letters) < 7
