"""Training on a (tp, dp) grid equals training in one process: every loss, every gradient norm, the final weights.

In fp32 on CPU, where a difference is rounding error or a mistake. The last tests make the mistakes.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
from grid import Run, assert_equal_runs

from tp2d_helpers.demo import demo_documents
from tp2d_helpers.model.whole_weights import WholeWeights
from tp2d_helpers.speed import optimizations, reducers

Train = Callable[..., Run]
MODELS = ["qwen2-tied", "qwen2-untied", "llama", "qwen3", "mistral"]
STAGES = [(model, 1) for model in MODELS] + [(model, stage) for model in ("qwen2-tied", "llama") for stage in (2, 3)]
grids = pytest.mark.parametrize("tp_size, dp_size", [(2, 1), (1, 2), (2, 2), (4, 1)], ids=lambda size: str(size))


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 100 documents, from two words to more than a sequence."""
    path, draw = tmp_path_factory.mktemp("lines") / "lines.jsonl", random.Random(0)
    words = " ".join(demo_documents()).split()
    starts = [(draw.randrange(len(words) - 100), int(2 * 50 ** draw.random())) for _ in range(100)]
    path.write_text("".join(json.dumps({"text": " ".join(words[i : i + n])}) + "\n" for i, n in starts))
    return str(path)


@grids
@pytest.mark.parametrize("model, zero_stage", STAGES)
def test_equals_one_process(train: Train, model: str, zero_stage: int, tp_size: int, dp_size: int) -> None:
    assert_equal_runs(train(model, zero_stage=zero_stage, tp_size=tp_size, dp_size=dp_size), train(model))


@pytest.mark.parametrize("model", MODELS)
def test_the_reference_exercises_what_is_compared(train: Train, model: str) -> None:
    """Equal constants would prove nothing, nor would a clipping that never, or always, does the same."""
    run = train(model)
    assert len(run.records) == 20
    assert run.losses()[-1] < run.losses()[0] - 0.3
    clipped = [record["grad_norm"] > run.config["max_grad_norm"] for record in run.records]
    assert any(clipped) and not all(clipped)
    assert len({record["learning_rate"] for record in run.records}) == 5  # 4 steps of warmup, then constant
    assert not run.sharded and all(run.replicated.values())


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("tp_size, dp_size", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_accumulation_equals_one_batch(train: Train, zero_stage: int, tp_size: int, dp_size: int) -> None:
    grid = dict(tp_size=tp_size, dp_size=dp_size, zero_stage=zero_stage)
    assert_equal_runs(train("qwen2-tied", gradient_accumulation_steps=2, **grid), train("qwen2-tied"))


@pytest.mark.parametrize("tp_size, dp_size", [(2, 1), (1, 2), (2, 2)])
def test_padding(train: Train, lines: str, tp_size: int, dp_size: int) -> None:
    """Micro-batches with unequal numbers of targets: the mean of their means would not be the mean of the batch."""
    padded = dict(dataset_name=lines, packing=False)
    reference = train("qwen2-tied", **padded)
    assert len({record["tokens"] for record in reference.records}) > 10
    run = train("qwen2-tied", tp_size=tp_size, dp_size=dp_size, gradient_accumulation_steps=2, **padded)
    assert_equal_runs(run, reference)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_activation_checkpointing(train: Train, zero_stage: int) -> None:
    run = train("qwen2-tied", tp_size=2, dp_size=2, zero_stage=zero_stage, activation_checkpointing="full")
    assert_equal_runs(run, train("qwen2-tied"))


@pytest.mark.parametrize("optimizations", ["none", "block_all_reduce", "fused_loss", "fused_step"])
@pytest.mark.parametrize("model", ["qwen2-tied", "llama"])
def test_optimizations(train: Train, model: str, optimizations: str) -> None:
    """With none it is AutoTP, ZeRO and AdamW as they come; "auto", in all other tests, turns on all but compilation."""
    run = train(model, tp_size=2, dp_size=2, zero_stage=2, optimizations=optimizations)
    assert_equal_runs(run, train(model, zero_stage=2))
    assert_equal_runs(run, train(model, optimizations="none"))


@pytest.mark.skipif(not optimizations.compilers(on_gpu=False), reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.parametrize("settings", [
    dict(model="qwen3"),
    pytest.param(dict(model="qwen2-tied", activation_checkpointing="full", zero_stage=2), marks=pytest.mark.slow),
], ids=lambda settings: " ".join(map(str, settings.values())))  # fmt: skip
def test_compiled(train: Train, settings: dict[str, Any]) -> None:
    compiled = "compile,block_all_reduce,fused_loss,fused_step"
    run = train(**settings, tp_size=2, dp_size=2, optimizations=compiled)
    assert_equal_runs(run, train(settings["model"]))


def test_epochs(train: Train) -> None:
    """Both ways to end an epoch: by `debug_steps`, and with the last whole global batch."""
    epochs = dict(num_epochs=2, debug_steps=3)
    run, reference = train("qwen2-tied", tp_size=2, dp_size=2, **epochs), train("qwen2-tied", **epochs)
    assert_equal_runs(run, reference)
    assert [record["step"] for record in run.records] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in run.records] == [0, 0, 0, 1, 1, 1]
    assert run.losses()[:3] == pytest.approx(train("qwen2-tied").losses()[:3], rel=1e-5)


def test_epoch_leaves_out_the_incomplete_batch(train: Train, lines: str, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(Path(lines).read_text().splitlines(keepends=True)[:14]))
    settings = dict(num_epochs=2, debug_steps=0, dataset_name=str(short), packing=False)
    run, reference = train("qwen2-tied", tp_size=1, dp_size=2, **settings), train("qwen2-tied", **settings)
    assert_equal_runs(run, reference)
    assert [record["epoch"] for record in run.records] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("model", MODELS)
def test_replicated_weights_stay_identical(train: Train, model: str) -> None:
    run = train(model, tp_size=2, dp_size=2, zero_stage=1)
    assert all(run.replicated.values()) and not any(run.sharded.values())
    norms = ["input_layernorm", "post_attention_layernorm", "model.norm"] + ["q_norm", "k_norm"] * (model == "qwen3")
    for norm in norms:
        assert any(norm in name for name in run.replicated), f"{norm} was not compared"
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} <= {
        name.split(".")[-2] for name in run.sharded
    }


def test_replicated_weights_stay_identical_with_dropout(train: Train) -> None:
    run = train("qwen2-dropout", tp_size=2, dp_size=2)
    assert all(run.replicated.values()) and run.replicated
    assert run.losses()[1:] != pytest.approx(train("qwen2-tied").losses()[1:], rel=1e-4)  # so there was dropout


# The mistakes. A patch runs in every process before training and changes what `train_func` calls.


def _unseen(patch: Callable[..., None], names: dict[str, Any]) -> None:
    """Without the run's own comparison of whole weights, which would end it."""
    WholeWeights.compare = lambda self, why="": None
    patch(names)


def _shard_by_world_rank(names: dict[str, Any]) -> None:
    create = names["create_dataloader"]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def wrong(**settings: Any) -> Any:
        per_rank = settings["batch_size_per_gpu"] * settings["dp_size"] // world
        return create(**{**settings, "dp_rank": rank, "dp_size": world, "batch_size_per_gpu": per_rank})

    names["create_dataloader"] = wrong


def _shard_by_world_rank_unseen(names: dict[str, Any]) -> None:
    _shard_by_world_rank(names)
    setup = names["setup_model_with_autotp"]

    def unchecked(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        result[0].first_dataloader_check.remove()
        return result

    names["setup_model_with_autotp"] = unchecked


def _skip_all_reduces_of(function: str) -> None:
    begin = reducers.Collectives.begin

    def skipping(self: Any, part: Any) -> None:
        if sys._getframe(1).f_code.co_name != function:
            begin(self, part)

    reducers.Collectives.begin = skipping


def _skip_the_forward_all_reduce(names: dict[str, Any]) -> None:
    _skip_all_reduces_of("row_matmul")


def _skip_the_backward_all_reduce(names: dict[str, Any]) -> None:
    _skip_all_reduces_of("column_gradients")


def _make_gradients_infinite(names: dict[str, Any]) -> None:
    from deepspeed import DeepSpeedEngine

    backward = DeepSpeedEngine.backward
    DeepSpeedEngine.backward = lambda self, loss, **kwargs: backward(self, loss * float("inf"), **kwargs)


def _seed_by_world_rank(names: dict[str, Any]) -> None:
    from tp2d_helpers.model.engine import transformers

    set_seed = transformers.set_seed
    transformers.set_seed = lambda seed: set_seed(seed + int(os.environ["RANK"]))


def _take_the_mean_of_means(names: dict[str, Any]) -> None:
    batches = names["global_batches"]

    def unweighted(loader: Any) -> Any:
        for micro_batches, tokens in batches(loader):
            yield [{k: v for k, v in batch.items() if k != "num_items_in_batch"} for batch in micro_batches], tokens

    names["global_batches"] = unweighted


def test_data_by_world_rank_is_found(train: Train) -> None:
    """DeepSpeed looks at the first batch, and only there."""
    with pytest.raises(RuntimeError, match="Data inconsistency within the TP group"):
        train("qwen2-tied", tp_size=2, patch=_shard_by_world_rank)
    with pytest.raises(AssertionError, match="step 1: loss"):
        assert_equal_runs(train("qwen2-tied", tp_size=2, patch=_shard_by_world_rank_unseen), train("qwen2-tied"))


@pytest.mark.parametrize("patch, found", [
    (_skip_the_forward_all_reduce, "step 1: loss"), (_skip_the_backward_all_reduce, "step 1: grad_norm"),
])  # fmt: skip
def test_missing_all_reduce_is_found(train: Train, patch: Callable[..., None], found: str) -> None:
    """By the run itself, which compares the weights that all ranks hold whole, and by the comparison of runs."""
    with pytest.raises(RuntimeError, match=r"the ranks of a TP group differ in .*norm.weight.* a gradient was not"):
        train("qwen2-tied", tp_size=2, patch=patch)
    with pytest.raises(AssertionError, match=found):
        run = train("qwen2-tied", tp_size=2, patch=functools.partial(_unseen, patch))
        assert_equal_runs(run, train("qwen2-tied"))


def _forbid_waiting(names: dict[str, Any]) -> None:
    """A step that asks for the device's results, or waits for it to be done, fails; the first compares the batches."""
    import torch
    from deepspeed.accelerator import get_accelerator

    train_step = names["train_step"]

    def fail(*_: Any) -> None:
        raise AssertionError("the host waits for the device")

    def watched(*arguments: Any) -> Any:
        names["train_step"] = watched_from_now
        return train_step(*arguments)

    def watched_from_now(*arguments: Any) -> Any:
        with mock.patch.object(torch.Tensor, "item", fail), mock.patch.object(get_accelerator(), "synchronize", fail):
            return train_step(*arguments)

    names["train_step"] = watched


def test_no_step_waits_for_the_device(train: Train) -> None:
    run = train("qwen2-tied", tp_size=2, dp_size=2, gradient_accumulation_steps=2, patch=_forbid_waiting)
    assert_equal_runs(run, train("qwen2-tied"))


def test_infinite_gradients_end_the_run(train: Train) -> None:
    """The losses stay finite, as no step is taken: without this, such a run would go on and learn nothing."""
    with pytest.raises(RuntimeError, match="gradients of steps 1 to 5 are not finite"):
        train("qwen2-tied", patch=_make_gradients_infinite)


def test_unlike_initial_weights_are_found(train: Train, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A checkpoint without its embedding, which an untied model keeps whole on every rank: it is drawn at random."""
    whole = tiny_model("qwen2-untied")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    weights = safetensors.torch.load_file(whole / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    reference = train(tmp_path)
    assert reference.losses() != train("qwen2-untied").losses()
    assert_equal_runs(train(tmp_path, tp_size=2, dp_size=2), reference)
    with pytest.raises(RuntimeError, match=r"differ in model.embed_tokens.weight, .* not loaded, or drawn, alike"):
        train(tmp_path, tp_size=2, dp_size=2, patch=_seed_by_world_rank)
    run = train(tmp_path, tp_size=2, dp_size=2, patch=functools.partial(_unseen, _seed_by_world_rank))
    assert not run.replicated["model.embed_tokens.weight"]
    with pytest.raises(AssertionError, match="step 1: loss"):
        assert_equal_runs(run, reference)


def test_unweighted_mean_is_found(train: Train, lines: str) -> None:
    padded = dict(dataset_name=lines, packing=False)
    run = train("qwen2-tied", dp_size=2, gradient_accumulation_steps=2, patch=_take_the_mean_of_means, **padded)
    with pytest.raises(AssertionError, match="step 1: loss"):
        assert_equal_runs(run, train("qwen2-tied", **padded))


def _fail_on_rank_1(names: dict[str, Any]) -> None:
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("on rank 1")


def _die_on_rank_1(names: dict[str, Any]) -> None:
    if os.environ["RANK"] == "1":
        os._exit(1)


@pytest.mark.parametrize(
    "patch, message", [(_fail_on_rank_1, "ZeroDivisionError: on rank 1"), (_die_on_rank_1, "ended")]
)
def test_a_rank_that_fails_ends_the_run(train: Train, patch: Callable, message: str) -> None:
    """Rank 0 waits for rank 1, for minutes if it were let."""
    with pytest.raises(RuntimeError, match=f"(?s)^rank 1: .*{message}"):
        train("qwen2-tied", tp_size=2, patch=patch)
    assert not multiprocessing.active_children()
