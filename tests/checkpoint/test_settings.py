"""What may change when a run is continued, what must not, and what the driver says of it before it writes anything."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tp2d_helpers.checkpoint import settings
from tp2d_helpers.checkpoint.files import write_json
from tp2d_helpers.checkpoint.run_folder import FORMAT, check_origin, last_step, read_manifest, write_manifest
from tp2d_helpers.checkpoint.settings import continue_run, record_run, same_model
from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.data.dataset import TokenDataset
from tp2d_helpers.data.tokens import prepare_tokens
from tp2d_helpers.preflight.folder import check_checkpoints
from tp2d_helpers.training.metrics import append

DATA = {"documents": 3, "tokens": 700, "sha256": "abc"}
MODEL = {"commit": None, "config": "c", "weights": "w", "code": None}


@pytest.fixture
def first(tmp_path: Path) -> Config:
    """A run of 2 × 2 with a global batch of 4, as its first launch records it."""
    config = make_config(storage_path=str(tmp_path), experiment_name="first", batch_size_per_gpu=2, dp_size=2)
    record_run(config, DATA, model=MODEL)
    return config


def checkpoint(config: Config, step: int = 3, epoch: int = 0, epoch_step: int = 3, world_size: int = 1) -> Path:
    """A checkpoint without files, with the manifest of rank 0 alone."""
    folder = config.run_dir / f"checkpoint_{step:08d}"
    folder.mkdir()
    where = dict(step=step, epoch=epoch, epoch_step=epoch_step, world_size=world_size)
    grid = dict(tp_size=config.tp_size, dp_size=config.dp_size, zero_stage=config.zero_stage)
    write_manifest(folder, 0, {}, **where, **grid, metrics={"loss": 1.0})
    return folder


def rows(config: Config, steps: int = 6, data: dict[str, Any] = DATA) -> dict[str, tuple[str, str]]:
    """Preflight's rows about the run's folder, by name."""
    return {name: row for name, *row in check_checkpoints(continue_run(config), config, data, steps)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The global batch, and the grid.


def test_another_grid_keeps_the_global_batch(first: Config) -> None:
    checkpoint(first)
    assert continue_run(first.change(tp_size=4, dp_size=1)).gradient_accumulation_steps == 2
    assert continue_run(first.change(dp_size=4, batch_size_per_gpu=1, gradient_accumulation_steps=9)) == first.change(
        dp_size=4, batch_size_per_gpu=1
    )
    with pytest.raises(ConfigError, match=r"batch_size_per_gpu × dp_size = 2 × 3: must divide .* global batch of 4"):
        continue_run(first.change(dp_size=3))
    assert [continue_run(first.change(tp_size=1, zero_stage=stage)).zero_stage for stage in (2, 3)] == [2, 3]


def test_a_run_with_a_value_that_is_no_more(first: Config) -> None:
    """What is set now counts."""
    folder = checkpoint(first)
    manifest = read_manifest(folder)
    settings = manifest["settings"] | {"activation_checkpointing": "selective"}
    write_json(folder / "rank_0.json", {**manifest, "settings": settings})
    assert continue_run(first) == first
    assert "activation_checkpointing 'selective' → 'none'" in rows(first)["changed since"][0]


def test_a_run_that_was_made_at_stage_0(first: Config) -> None:
    """As older versions let it."""
    folder = checkpoint(first)
    manifest = read_manifest(folder)
    write_json(folder / "rank_0.json", {**manifest, "settings": manifest["settings"] | {"zero_stage": 0}})
    with pytest.raises(ConfigError, match=r"made with zero_stage 0, whose checkpoints .* Export it"):
        continue_run(first)


def test_an_adapted_accumulation_is_told(first: Config) -> None:
    checkpoint(first)
    found = rows(first.change(gradient_accumulation_steps=4))
    assert "gradient_accumulation_steps 1, so that a step keeps its 4 samples" in found["checkpoint"][1]
    assert "gradient_accumulation_steps 2, so that" in rows(first.change(dp_size=1))["checkpoint"][1]
    assert rows(first)["checkpoint"] == ["complete", "goes on from checkpoint_00000003"]


@pytest.mark.parametrize("left", [None, "unfinished"])
@pytest.mark.parametrize("asked", [
    dict(gradient_accumulation_steps=4), dict(dp_size=3), dict(batch_size_per_gpu=8), dict(zero_stage=3),
    dict(tp_size=1, zero_stage=2),
], ids=str)  # fmt: skip
def test_before_a_checkpoint_what_is_asked_counts(first: Config, asked: dict[str, int], left: str | None) -> None:
    """As after a first launch that ran out of memory."""
    if left:
        checkpoint(first, world_size=2)
    assert continue_run(first.change(**asked)) == first.change(**asked)
    found = rows(first.change(**asked), data={})
    assert ("begins anew" in found["checkpoint"][1]) if left else not found


def test_auto_is_compared_by_what_it_came_to(first: Config) -> None:
    """Where it is known; the workers compare it in any case."""
    folder = checkpoint(first)
    manifest = read_manifest(folder)
    write_json(folder / "rank_0.json", {**manifest, "precision": "bf16"})
    assert continue_run(first).precision == "auto" and continue_run(first.change(precision="bf16"))
    with pytest.raises(ConfigError, match="precision: 'bf16' then, 'fp32' now"):
        continue_run(first.change(precision="fp32"))


@pytest.mark.parametrize("packing", [True, False, "documents"])
def test_auto_packing_is_as_the_run_began(first: Config, packing: bool | str) -> None:
    """Older versions recorded True: what "auto" would come to now is of no account."""
    record_run(first.change(packing=packing), DATA, model=MODEL)
    for checkpoints in range(2):
        assert continue_run(first).packing == packing and continue_run(first.change(packing=packing))
        for other in {True, False, "documents"} - {packing}:
            with pytest.raises(ConfigError, match=f"packing: {packing!r} then, {other!r} now"):
                continue_run(first.change(packing=other))
        if not checkpoints:
            checkpoint(first)


# Hyperparameters.


def test_what_has_changed_is_told(first: Config) -> None:
    """Since the checkpoint, not since the last launch, which may have come to nothing."""
    checkpoint(first)
    now = first.change(learning_rate=1e-3, weight_decay=0.5, num_epochs=2, storage_path=first.storage_path)
    for _ in range(2):
        assert rows(now)["changed since"] == [
            "num_epochs 1 → 2, learning_rate 1e-05 → 0.001, weight_decay 0.01 → 0.5", "what is set now counts"
        ]  # fmt: skip
        record_run(now, DATA, model=MODEL)
    assert "changed since" not in rows(first)


def test_every_setting_counts_or_is_refused(first: Config) -> None:
    """None that differs goes unmentioned, but those that say where the run is."""
    checkpoint(first)
    other: dict[type, Any] = {int: lambda v: v + 1, float: lambda v: v / 2, bool: lambda v: not v}
    special = dict(use_gpu=False, precision="bf16", master_weights="bf16", activation_checkpointing="full",
                   optimizations="none", keep_checkpoints_by="loss", text_files="paragraph", zero_stage=2,
                   dp_size=1, batch_size_per_gpu=1, loss_on="all", learning_rate_schedule="linear",
                   min_learning_rate=1e-6, trackers="none", packing=False, lora_dropout=0.1,
                   global_batch_size=4, gradient_dtype="fp32", chat_date="2026-01-01",
                   leave_out_rows="no_answer")  # fmt: skip
    needs = dict(min_learning_rate=dict(learning_rate_schedule="linear"))
    for name, value in first.model_dump().items():
        if name in ("storage_path", "experiment_name"):
            continue
        now = special.get(name, other.get(type(value), lambda v: v + "x")(value) if name not in special else None)
        try:
            found = rows(first.change(**{name: now}, **needs.get(name, {})))
        except ConfigError as error:
            assert f"{name}: {value!r} then, {now!r} now" in str(error)
        else:
            told = " ".join(text for row in found.values() for text in row)
            assert f"{name} {value!r} → {now!r}" in told or f"{name} {value}, so that" in told


def test_a_rate_that_another_curve_changes_is_told(first: Config) -> None:
    """Its last before and first after, as a cosine to the end of an epoch has another half of it when there are two."""
    first = first.change(learning_rate_schedule="cosine")
    record_run(first, DATA, model=MODEL)
    checkpoint(first)
    append(first.run_dir / "metrics.jsonl", [dict(step=3, learning_rate=7.5e-6)])  # after 2 of 6 steps
    assert "changed since" not in rows(first)
    assert rows(first.change(weight_decay=0.1))["changed since"][1] == "what is set now counts"
    assert rows(first.change(num_epochs=2))["changed since"] == [
        "num_epochs 1 → 2",
        "what is set now counts; the learning rate was 7.5e-06 in step 3 and is 8.54e-06 in step 4 of 12",
    ]


# Where an epoch ends.


@pytest.mark.parametrize("steps, num_epochs, told", [
    (6, 1, "goes on from checkpoint_00000003"),
    (3, 2, "goes on from checkpoint_00000003, epoch 1 is over: 3 steps of 3 are done"),
    (2, 1, "goes on from checkpoint_00000003, epoch 1 is over: 3 steps of 2 are done, "
           "nothing is left to train: num_epochs is 1"),
])  # fmt: skip
def test_an_epoch_that_is_over_is_told(first: Config, steps: int, num_epochs: int, told: str) -> None:
    checkpoint(first)
    assert rows(first.change(num_epochs=num_epochs), steps)["checkpoint"][1] == told


@pytest.mark.parametrize("where, steps, num_epochs, last", [
    (dict(), 6, 2, 12), (dict(), 3, 2, 6), (dict(), 2, 3, 7), (dict(), 2, 1, 3), (dict(step=9, epoch=1), 6, 2, 12),
    (dict(step=9, epoch=1), 2, 2, 9), (dict(step=12, epoch=2, epoch_step=0), 6, 1, 12), (None, 6, 2, 12),
])  # fmt: skip
def test_the_last_step(first: Config, where: dict[str, int] | None, steps: int, num_epochs: int, last: int) -> None:
    """As the progress counts it, whatever the length of epochs was before."""
    if where is not None:
        checkpoint(first, **where)
    assert last_step(first.change(num_epochs=num_epochs), steps) == last


# The model and the data.


NAMES = dict(model_name="a/b", dataset_name="c", dataset_config="d", text_column="e", text_files="paragraph",
             dataset_percentage=50.0, eval_dataset_name="f")  # fmt: skip


def test_names_do_not_count_where_contents_do(first: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run with a checkpoint; of one without, contents may change under the names that they had."""
    now = {**MODEL}
    monkeypatch.setattr(settings, "model_identity", lambda *model: dict(now))
    other = {**DATA, "sha256": "def"}
    named = first.change(**NAMES)
    for have_checkpoint in (False, True):
        assert continue_run(named) == named and same_model(named) == now
        rows(named)
        if have_checkpoint:
            with pytest.raises(ConfigError, match="its tokens are not those"):
                rows(first, data=other)
        else:
            assert not rows(first, data=other)
        with pytest.raises(ConfigError, match="its tokens are not those"):
            rows(named, data=other)
        now["weights"] = "other"
        with pytest.raises(ConfigError, match=r"its weights are not what .* weights w… then, weights other… now"):
            same_model(named)
        if have_checkpoint:
            with pytest.raises(ConfigError, match=r"its weights are not what .* or take another experiment_name"):
                same_model(first)
        else:
            assert same_model(first) == now
            checkpoint(first)
        now["weights"] = "w"


def test_a_run_of_an_older_version_is_told_by_its_names(first: Config) -> None:
    record_run(first)
    checkpoint(first)
    assert rows(first)["checkpoint"][1] == (
        "goes on from checkpoint_00000003, model and data compared by name alone, as an older version recorded them"
    )
    for name, value in NAMES.items():
        with pytest.raises(ConfigError, match=f"{name}: .* then, .*{value}.* now"):
            continue_run(first.change(**{name: value}))


@pytest.fixture
def identity(tiny_model: Callable[[str], Path]) -> Callable[[Path], dict[str, Any]]:
    """identity(path): what is in a data file, by its tokens."""
    return lambda path: TokenDataset(prepare_tokens(str(tiny_model("llama")), str(path)), 8).identity


def write(path: Path, *documents: str) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def test_other_data_under_the_same_name(first: Config, identity: Callable, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", "the with statement", "yield")
    then = identity(path)
    record_run(first, then, model=MODEL)
    checkpoint(first)
    write(path, "the with statement", "await")  # equally many documents, and tokens or not
    now = identity(path)
    with pytest.raises(ConfigError) as error:
        rows(first, data=now)
    for part in (then["sha256"][:12], now["sha256"][:12], "2 documents of ", "then", "Restore the data"):
        assert part in str(error.value)
    assert "dataset_name = " in str(error.value)


@pytest.mark.parametrize("change", ["touched", "copied", "blank line", "other column"])
def test_the_same_data_in_another_file(first: Config, identity: Callable, tmp_path: Path, change: str) -> None:
    """What counts is what is trained on."""
    path = write(tmp_path / "data.jsonl", "the with statement", "yield")
    then = identity(path)
    record_run(first, then, model=MODEL)
    checkpoint(first)
    if change == "touched":
        os.utime(path, (1, 1))
    elif change == "copied":
        path = write(tmp_path / "copy.jsonl", "the with statement", "yield")
    elif change == "blank line":
        path = write(path, "the with statement", "", "yield")
    else:
        path.write_text('{"text": "the with statement", "n": 1}\n{"text": "yield", "n": 2}\n')
    assert identity(path) == then and rows(first, data=identity(path))["checkpoint"][0] == "complete"


def test_documents_that_are_cut_elsewhere(identity: Callable, tmp_path: Path) -> None:
    """The hash is of all tokens and of where documents begin."""
    one, two = write(tmp_path / "one.jsonl", "a b", "c"), write(tmp_path / "two.jsonl", "a", "b c")
    assert identity(one)["sha256"] != identity(two)["sha256"]
    assert identity(one)["documents"] == identity(two)["documents"] == 2


# A config.json that was lost.


def test_a_lost_config_is_refused_before_anything_is_written(first: Config) -> None:
    folder = checkpoint(first)
    run_id = read_manifest(folder)["run_id"]
    (first.run_dir / "config.json").unlink()
    before = contents(first.run_dir)
    with pytest.raises(ConfigError) as error:
        continue_run(first)
    for part in ("experiment_name = 'first'", "no config.json", "Restore it", run_id, "trust_checkpoint", "another"):
        assert part in str(error.value)
    assert contents(first.run_dir) == before

    trusting = first.change(trust_checkpoint=True)
    with pytest.raises(ConfigError, match="seed: 42 then, 7 now"):  # the checkpoint has the settings, too
        continue_run(trusting.change(seed=7))
    with pytest.raises(ConfigError, match="its tokens are not those"):
        rows(trusting, data={**DATA, "sha256": "def"})
    record_run(continue_run(trusting), DATA, model=MODEL)
    assert read_manifest(checkpoint(first, step=4))["run_id"] == run_id
    assert continue_run(first) == first  # it is whole again


def test_without_a_checkpoint_a_lost_config_is_a_new_run(first: Config) -> None:
    checkpoint(first, world_size=2)
    (first.run_dir / "config.json").unlink()
    assert continue_run(first.change(seed=7)).seed == 7


def test_a_checkpoint_of_an_older_version_is_refused(first: Config) -> None:
    """It has one parameter group: a universal one would be loaded without its norms and biases, and no error."""
    folder = checkpoint(first)
    manifest = read_manifest(folder)
    assert manifest.pop("format") == FORMAT
    write_json(folder / "rank_0.json", manifest)
    with pytest.raises(ConfigError, match=r"checkpoint_00000003: written by .* version .* \(format 1, not 3\)"):
        continue_run(first)


@pytest.mark.parametrize("kind, settings, refused", [
    ("llama", {}, False), ("cohere", {}, True), ("ernie4_5_moe", {}, True), ("qwen2_moe", {}, False),
    ("qwen2_moe", dict(lora_rank=4, lora_targets="all-linear"), True),
    ("qwen2_moe", dict(lora_rank=4, lora_targets="shared_expert_gate"), False),
    ("cohere", dict(lora_rank=4, lora_targets="all-linear"), False),
])  # fmt: skip
def test_format_2_is_refused_where_another_was_trained(
    family: Callable[..., Path], tmp_path: Path, kind: str, settings: dict[str, Any], refused: bool
) -> None:
    """Other weights decayed, were frozen or had an adapter; all other runs go on."""
    shape = dict(cohere=dict(use_qk_norm=True), qwen2_moe=dict(num_experts=4, shared_expert_intermediate_size=48))
    run = {"model_name": str(family(kind, **shape.get(kind, {}))), **settings}
    write_json(tmp_path / "rank_0.json", {"format": 2, "settings": run})
    with pytest.raises(ConfigError, match="format 2, not 3") if refused else contextlib.nullcontext():
        check_origin(tmp_path, False)
