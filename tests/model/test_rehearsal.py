"""What one pass without storage tells of a model: gradients, dropout, inputs of blocks, the loss; and runs heed it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TYPES
from grid import Run, assert_equal_runs, run_grid
from transformers import AutoConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tp2d_helpers.config import ConfigError, make_config
from tp2d_helpers.model import rehearsal
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.rehearsal import Rehearsal, rehearse
from tp2d_helpers.preflight.checks import check_model

Train = Callable[..., Run]
TINY = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            head_dim=8, vocab_size=2048, max_position_embeddings=256, pad_token_id=None)  # fmt: skip


def tiny(model_type: str, **shape: Any) -> PretrainedConfig:
    """The config of a tiny model."""
    return AutoConfig.for_model(model_type, **TINY | shape)


# Gradients of whole weights.


def test_weights_on_divided_activations_are_found() -> None:
    """Apertus' activation function has weights, which its plan does not name; of its norms of q and k it does."""
    found = rehearse(tiny("apertus"), 2).summed
    scales = [f"model.layers.{i}.mlp.act_fn.{name}" for i in range(2) for name in ("alpha_p", "alpha_n")]
    norms = [f"model.layers.{i}.self_attn.{name}_norm.weight" for i in range(2) for name in "qk"]
    assert sorted(found) == sorted(scales + norms)
    assert sorted(rehearse(tiny("qwen3"), 2).summed) == sorted(norms)
    assert rehearse(tiny("apertus"), 1) == Rehearsal()


def test_what_a_plan_says_of_gradients_is_not_needed() -> None:
    """Nor followed, where it is wrong: which are parts shows in the graph."""
    config, norm = tiny("qwen3"), "layers.*.input_layernorm"
    expected, plan = rehearse(config, 2).summed, config.base_model_tp_plan
    config.base_model_tp_plan = {k: v for k, v in plan.items() if "k_norm" not in k} | {
        norm: "replicated_with_grad_allreduce"
    }
    assert rehearse(config, 2).summed == expected


@pytest.mark.parametrize("changes, why", [
    ({"layers.*.self_attn.o_proj": "colwise"}, "same reduction dim|shapes cannot be multiplied"),
    ({"layers.*.mlp.gate_proj": "rowwise"}, "same reduction dim|shapes cannot be multiplied"),
    ({"layers.*.self_attn.v_proj": None}, "on activations that are divided and on some that are whole"),
    ({"layers.*.mlp.down_proj": None, "layers.*.mlp.up_proj": None}, "mlp.up_proj.weight .* is not covered"),
])  # fmt: skip
def test_a_wrong_plan_is_refused(changes: dict[str, str | None], why: str) -> None:
    config = tiny("llama")
    plan = {**config.base_model_tp_plan, **changes}
    config.base_model_tp_plan = {name: style for name, style in plan.items() if style}
    with pytest.raises(ConfigError, match=f"(?s)can't be sharded by AutoTP.*({why}).*ake tp_size 1"):
        rehearse(config, 2)


def test_whole_activations_among_divided_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradient lacks the sum over the ranks, and with it those of all weights before."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * x.mean(-1, keepdim=True))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(ConfigError, match="used on activations that are divided and on some that are whole"):
        rehearse(tiny("llama"), 2)


def _leave_sums_out(part: str, names: dict[str, Any]) -> None:
    whole = Plan.partition_config
    Plan.partition_config = lambda self, summed=(): whole(self, [name for name in summed if part not in name])


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("model_type, name", [("apertus", "mlp.act_fn.alpha_"), ("qwen3", "k_norm.weight")])
def test_weights_that_drift_apart_end_the_run(
    train: Train, family: Callable[..., Path], model_type: str, name: str, zero_stage: int
) -> None:
    """As soon as they have moved: the first step of a warm-up moves nothing."""
    with pytest.raises(RuntimeError, match=f"differ in .*{name}.*, which several of them hold: a gradient was"):
        train(family(model_type), tp_size=2, dp_size=2, zero_stage=zero_stage, patch=partial(_leave_sums_out, name))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_sums_at_every_stage(train: Train, family: Callable[..., Path], zero_stage: int) -> None:
    short = dict(debug_steps=8, warmup_steps=2)
    run = train(family("apertus"), tp_size=2, dp_size=2, zero_stage=zero_stage, **short)
    assert_equal_runs(run, train(family("apertus"), **short))


# Dropout.


@pytest.mark.parametrize("settings, divided", [
    (dict(attention_dropout=0.1), True), (dict(residual_dropout=0.1), False), (dict(embedding_dropout=0.1), False),
])  # fmt: skip
def test_where_dropout_is(settings: dict[str, float], divided: bool) -> None:
    assert rehearse(tiny("starcoder2", **settings), 2).divided_dropout is divided


def test_dropout_on_both_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dropout .* Set one of them to 0 in the model's config.json"):
        rehearse(tiny("starcoder2", attention_dropout=0.1, residual_dropout=0.1), 2)
    rehearse(tiny("starcoder2", attention_dropout=0.1, residual_dropout=0.1), 1)


def _draw(engine: Any, tp_group: Any, dp_group: Any) -> list[float]:
    return torch.rand(4).tolist()


@pytest.mark.parametrize("settings, streams", [
    (dict(attention_dropout=0.1), [0, 1, 2, 3]), (dict(residual_dropout=0.1), [0, 0, 1, 1]),
])  # fmt: skip
def test_random_numbers_of_a_run(
    family: Callable[..., Path], tmp_path: Path, settings: dict[str, float], streams: list[int]
) -> None:
    """Each rank drops other heads' places, but the ranks of a TP group the same of what all of them have."""
    config = make_config(
        model_name=str(family("starcoder2", **settings)), dataset_name="demo", use_gpu=False, tp_size=2, dp_size=2,
        seq_length=64, debug_steps=2, storage_path=str(tmp_path), experiment_name="run",
    )  # fmt: skip
    drawn = run_grid(config.model_dump(), after=_draw)
    assert [drawn.index(numbers) for numbers in drawn] == [streams.index(stream) for stream in streams]
    wider = config.change(tp_size=2, dp_size=1, batch_size_per_gpu=2, num_epochs=2)
    resumed = run_grid(wider.model_dump(), after=_draw)  # of a universal checkpoint: the streams begin anew
    assert (resumed[0] != resumed[1]) is (streams[0] != streams[1]) and resumed[0] not in drawn


@pytest.mark.parametrize("settings", [dict(attention_dropout=0.1), dict(residual_dropout=0.1)])
def test_whole_weights_stay_the_same_with_dropout(
    train: Train, family: Callable[..., Path], settings: dict[str, float]
) -> None:
    run = train(family("starcoder2", **settings), tp_size=2, dp_size=2, debug_steps=8)
    assert run.replicated and all(run.replicated.values()) and all(run.copies.values())
    assert run.losses() != pytest.approx(train(family("starcoder2"), debug_steps=8).losses(), rel=1e-5)


# Blocks.


def _halve_in_the_mlp(names: dict[str, Any]) -> None:
    """The MLP's column-wise layers take something other than what the MLP takes."""
    LlamaMLP.forward = lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x / 2)) * self.up_proj(x / 2))


def test_blocks_whose_layers_share_no_input(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = {f"model.layers.{i}.self_attn" for i in range(2)}
    assert rehearse(tiny("llama"), 2).blocks == attention | {f"model.layers.{i}.mlp" for i in range(2)}
    short = dict(debug_steps=8, patch=_halve_in_the_mlp)
    assert_equal_runs(train("llama", tp_size=2, dp_size=2, **short), train("llama", **short))
    monkeypatch.setattr(LlamaMLP, "forward", LlamaMLP.forward)
    _halve_in_the_mlp({})
    assert rehearse(tiny("llama"), 2).blocks == attention


# The loss.

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class Mine(LlamaForCausalLM):
    config_class = MineConfig

    def forward(self, input_ids, labels=None):
        return super().forward(input_ids, labels=labels, use_cache=False)
"""


@pytest.fixture
def remote(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """remote(code): Llama's weights, with a class of its own whose forward takes tokens and labels alone."""

    def folder(code: str) -> Path:
        for file in tiny_model("llama").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        config |= dict(model_type="mine", architectures=["Mine"])
        config |= dict(auto_map={"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "mine.py").write_text(code)
        return tmp_path

    return folder


def test_a_class_that_takes_no_number_of_targets(train: Train, remote: Callable[[str], Path]) -> None:
    """Its own mean over each micro-batch would be another loss; at tp 2 it would be one of half the vocabulary."""
    model, reference = remote(CODE), train("llama")
    facts = ModelFacts.read(str(model), trust_remote_code=True)
    config = make_config(model_name=str(model), tp_size=2, dp_size=1, use_gpu=False, seq_length=64)
    assert check_model(config.change(trust_remote_code=True), facts)[1].endswith("loss computed from the logits")
    for grid in (
        dict(dp_size=2, gradient_accumulation_steps=2),
        dict(tp_size=2),
        dict(tp_size=2, optimizations="none"),
    ):
        assert_equal_runs(train(model, trust_remote_code=True, **grid), reference)


ADDED = (
    CODE.replace("        return super", "        output = super")
    + """
        output.loss = None if labels is None else output.loss + 0.1
        return output
"""
)
SMOOTHED = (
    CODE.split("    def forward")[0]
    + """
    def __init__(self, config):
        super().__init__(config)
        self.loss_function = lambda *args, **kwargs: ForCausalLMLoss(*args, **kwargs) + 0.1
"""
)


@pytest.mark.parametrize("code", [ADDED, "from transformers.loss.loss_utils import ForCausalLMLoss\n" + SMOOTHED])
def test_a_class_with_another_loss_is_refused(remote: Callable[[str], Path], code: str) -> None:
    model = remote(code)
    facts = ModelFacts.read(str(model), trust_remote_code=True)
    config = make_config(model_name=str(model), tp_size=1, dp_size=1, use_gpu=False, seq_length=64)
    with pytest.raises(ConfigError, match=r"'mine' has a loss of its own: .* the mean cross-entropy .* turn that off"):
        check_model(config.change(trust_remote_code=True), facts)


def test_an_auxiliary_loss_is_refused() -> None:
    """It is a mean over a micro-batch's tokens, which no number of targets makes one over the step's."""
    shape = dict(num_local_experts=4, num_experts_per_tok=2)
    assert not rehearse(tiny("mixtral", **shape)).own_loss
    with pytest.raises(ConfigError, match=r"'mixtral' adds its routers' loss .*set it to false"):
        rehearse(tiny("mixtral", **shape, output_router_logits=True))


def test_a_class_that_asks_for_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried with storage; one that is too large for that is refused."""
    config = tiny("jetmoe", kv_channels=8, num_local_experts=2)
    assert rehearse(config) == Rehearsal()
    monkeypatch.setattr(rehearsal, "LARGEST", 1000)
    with pytest.raises(ConfigError, match=r"'jetmoe' must be tried on the CPU .* parameters are too many"):
        rehearse(config)


# Logits in chunks.


@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_type_takes_its_logits_in_chunks(tp_size: int) -> None:
    for kind, more in TYPES.items():
        shape = TINY | more
        if kind == "falcon":  # which works it out
            del shape["head_dim"]
        assert (kind, rehearse(AutoConfig.for_model(kind, **shape), tp_size).whole_logits) == (kind, "")


CLONED = """        output.logits = output.logits.clone()
        return output
"""


def test_what_needs_whole_logits_is_said(train: Train, remote: Callable[[str], Path]) -> None:
    """And computed as ever."""
    model, reference = remote(CODE.replace("return super", "output = super") + CLONED), train("llama")
    facts = ModelFacts.read(str(model), trust_remote_code=True)
    config = make_config(model_name=str(model), tp_size=2, dp_size=1, use_gpu=False, seq_length=64)
    found = check_model(config.change(trust_remote_code=True), facts)[1]
    assert "logits computed whole (its class calls clone on the way to its loss)" in found
    assert_equal_runs(train(model, trust_remote_code=True, tp_size=2), reference)
