"""LoRA at every grid: equal to peft in one process, in each loss, norm and weight; resumed, resized, exported."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grid
import peft
import pytest
import torch
from families import TYPES
from plain import plain_run
from tiny import tiny_shape
from transformers import AutoModelForCausalLM

from tp2d_helpers.checkpoint.adapters import Adapters
from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.config import ConfigError, make_config
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.lora import Adapter, adapter_parameters, kinds, targets
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.preflight.checks import check_lora
from tp2d_helpers.speed.mixtures import routers
from tp2d_helpers.training.metrics import read_metrics

LORA = dict(lora_rank=4, lora_alpha=8.0, debug_steps=8, learning_rate=1e-2)
FEW = dict(lora_targets="q_proj, down_proj")


@pytest.mark.parametrize("more", [{}, FEW], ids=["all-linear", "two"])
@pytest.mark.parametrize("model", ["qwen2-tied", "llama"])
def test_one_process_equals_peft(train: Callable[..., grid.Run], model: str, more: dict[str, Any]) -> None:
    """What is frozen stays as it was, and each adapter goes peft's way."""
    run = train(model, **LORA, **more)
    plain = plain_run(run.config)
    grid.assert_equal_runs(run, plain)
    begun = AutoModelForCausalLM.from_pretrained(run.config["model_name"], dtype=torch.float32)
    frozen = dict(begun.named_parameters(remove_duplicate=False))
    assert all(torch.equal(run.weights[name], weight) for name, weight in frozen.items())
    adapters = {name: weight for name, weight in run.weights.items() if name not in frozen}
    assert len(adapters) == 2 * 2 * (2 if more else 7)
    assert all(weight.abs().max() > 1e-3 for name, weight in adapters.items() if name.endswith(".B"))
    assert sum(map(torch.numel, adapters.values())) == adapter_parameters(begun, run.config)


GRIDS = [
    dict(tp_size=2),
    dict(tp_size=4),
    dict(dp_size=2, zero_stage=2),
    dict(tp_size=2, dp_size=2, gradient_accumulation_steps=2),
    dict(tp_size=2, dp_size=2, zero_stage=3),
    dict(tp_size=2, optimizations="none"),
    dict(tp_size=2, activation_checkpointing="full", optimizations="block_all_reduce"),
    dict(tp_size=2, packing=False),
]


@pytest.mark.parametrize("settings", GRIDS, ids=lambda settings: " ".join(f"{k}={v}" for k, v in settings.items()))
def test_every_grid_equals_one_process(train: Callable[..., grid.Run], settings: dict[str, Any]) -> None:
    """Qwen2, which has biases; divided, checkpointed, padded."""
    one = {name: value for name, value in settings.items() if name == "packing"}
    grid.assert_equal_runs(train("qwen2-tied", **LORA, **settings), train("qwen2-tied", **LORA, **one))


@pytest.mark.parametrize("settings", [dict(tp_size=2, dp_size=2), dict(tp_size=2, dp_size=2, zero_stage=3)], ids=str)
@pytest.mark.parametrize(("model", "more"), [("llama", {}), ("qwen3", FEW), ("mistral", {})])
def test_other_families(train: Callable[..., grid.Run], model: str, more: dict[str, Any], settings: dict) -> None:
    """An untied head, norms of heads beside frozen projections, a sliding window; and adapters on some layers alone."""
    grid.assert_equal_runs(train(model, **LORA, **more, **settings), train(model, **LORA, **more))


@pytest.mark.parametrize("settings", [dict(), dict(activation_checkpointing="full"), dict(zero_stage=3)], ids=str)
def test_dropout_is_the_same_at_every_tp_size(train: Callable[..., grid.Run], settings: dict[str, Any]) -> None:
    """Each rank draws for the whole width; without dropout the run would be another one."""
    one = train("llama", **LORA, lora_dropout=0.2)
    grid.assert_equal_runs(train("llama", **LORA, lora_dropout=0.2, tp_size=2, **settings), one)
    assert one.losses()[2:] != pytest.approx(train("llama", **LORA).losses()[2:], rel=1e-4)


def _drop_hook(kind: str, names: dict[str, Any]) -> None:
    """A mistake: the gradient of the whole matrix of the column-wise (A) or row-wise (B) adapters is not summed."""
    setup = names["setup_model_with_autotp"]

    def without(*args: Any, **kwargs: Any) -> Any:
        built = setup(*args, **kwargs)
        for module in built[0].module.modules():
            if isinstance(module, Adapter) and module.cut and module.row is (kind == "B"):
                getattr(module, kind)._backward_hooks.clear()
        built[0].whole_weights.weights = {}  # which would stop the run
        return built

    names["setup_model_with_autotp"] = without


@pytest.mark.parametrize("kind", ["A", "B"])
def test_a_missing_sum_is_found(train: Callable[..., grid.Run], kind: str) -> None:
    """The comparison sees it."""
    run = train("llama", **LORA, tp_size=2, patch=partial(_drop_hook, kind))
    with pytest.raises(AssertionError):
        grid.assert_equal_runs(run, train("llama", **LORA))
    drifted = [name for name, same in run.replicated.items() if not same]
    assert drifted and all(name.endswith(f"_lora.{kind}") for name in drifted)


@pytest.fixture(scope="module")
def kept(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., grid.Run]:
    """kept(name, after, **settings): 8 steps, with checkpoints at 4 and 8; after run `after`, from its checkpoint 4."""
    storage = tmp_path_factory.mktemp("lora")

    def run(name: str, after: str = "", **settings: Any) -> grid.Run:
        defaults = dict(model_name=str(tiny_model("qwen2-tied")), dataset_name="demo", use_gpu=False, tp_size=1,
                        dp_size=1, batch_size_per_gpu=4, seq_length=64, checkpoint_interval=4, precision="fp32",
                        trust_checkpoint=True, storage_path=str(storage), experiment_name=name)  # fmt: skip
        config = make_config(**{**defaults, **LORA, **settings})
        if after:
            shutil.copytree(storage / after, config.run_dir)
            shutil.rmtree(config.run_dir / "checkpoint_00000008")
        answers = grid.run_grid(config.model_dump(), after=grid.final_weights)
        records = read_metrics(config.run_dir / "metrics.jsonl")
        return grid.Run(config.model_dump(), records, answers[0][0], {}, {}, {})

    return run


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_resumed_in_mid_epoch_and_on_another_grid(kept: Callable[..., grid.Run], zero_stage: int) -> None:
    """On the same grid bit for bit; a checkpoint has the adapters, not the model."""
    half = dict(tp_size=2, dp_size=2, batch_size_per_gpu=2, zero_stage=zero_stage)
    whole = kept(f"whole{zero_stage}", **half)
    again = kept(f"again{zero_stage}", after=f"whole{zero_stage}", **half)
    assert again.losses() == whole.losses()
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())
    folder = Path(whole.config["storage_path"], f"whole{zero_stage}", "checkpoint_00000008")
    model = sum(weight.nbytes for name, weight in whole.weights.items() if "_lora" not in name)
    assert sum(path.stat().st_size for path in folder.rglob("*_model_states.pt")) < model / 4
    grid.assert_equal_runs(kept(f"one{zero_stage}", after=f"whole{zero_stage}", zero_stage=zero_stage), whole)
    four = kept(f"four{zero_stage}", after=f"one{zero_stage}", tp_size=4, zero_stage=zero_stage)
    grid.assert_equal_runs(four, whole)


@pytest.mark.parametrize("grid_of", [dict(tp_size=2, dp_size=2, batch_size_per_gpu=2), dict(tp_size=2, zero_stage=3)])
def test_exports(kept: Callable[..., grid.Run], tmp_path: Path, grid_of: dict[str, Any]) -> None:
    """Merged by transformers and as an adapter by peft: both give the logits of the model that was trained."""
    run = kept(f"export{len(grid_of)}", **grid_of)
    base = run.config["model_name"]
    checkpoint = Path(run.config["storage_path"], run.config["experiment_name"], "checkpoint_00000008")
    settings = make_config(**run.config)
    (settings.run_dir / "config.json").write_text(settings.model_dump_json())
    folder = export_checkpoint(checkpoint, base, tmp_path / "export")
    trained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for layer in targets(trained, "all-linear"):
        A, B = run.weights[f"{layer}_lora.A"], run.weights[f"{layer}_lora.B"]
        trained.get_submodule(layer).weight.data += LORA["lora_alpha"] / LORA["lora_rank"] * B @ A
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        wanted, before = trained(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
        assert model.peft_config["default"].target_modules == {
            name.rpartition(".")[2] for name in targets(trained, "all-linear")
        }
        adapted = model(ids).logits
    assert (wanted - before).abs().max() > 0.05
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(adapted, wanted, rtol=0, atol=1e-5)


def test_conv1d_at_tp_1(family: Callable[..., Path], train: Callable[..., grid.Run], tmp_path: Path) -> None:
    """GPT-2's matrices are [in, out]: equal to peft, and merged right."""
    model = family("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0,
                   attn_pdrop=0.0)  # fmt: skip
    run = train(model, **LORA, checkpoint_interval=8)
    grid.assert_equal_runs(run, plain_run(run.config))
    settings = make_config(**run.config)
    (settings.run_dir / "config.json").write_text(settings.model_dump_json())
    folder = export_checkpoint(settings.run_dir / "checkpoint_00000008", str(model), tmp_path / "export")
    base, ids = AutoModelForCausalLM.from_pretrained(model), torch.arange(20)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, folder / "adapter")(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)


MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "glm4_moe", "dots1", "ernie4_5_moe"]


@pytest.mark.parametrize("kind", MIXTURES)
def test_adapters_of_mixtures_in_peft(family: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Any adapters, all layers': peft gives the logits of the merged weights, with no weight too many or too few."""
    base = str(family(kind, **TYPES[kind]))
    facts, draw = ModelFacts.read(base), torch.Generator().manual_seed(0)
    drawn, layers = {}, targets(facts.meta, "all-linear")
    if kind == "qwen2_moe":  # what is in a checkpoint counts: an older version's "all-linear" took routers, too
        layers |= targets(facts.meta, "shared_expert_gate")
    for layer, (inputs, outputs) in layers.items():
        drawn |= {f"{layer}_lora.A": torch.randn(4, inputs, generator=draw) / 8}
        drawn |= {f"{layer}_lora.B": torch.randn(outputs, 4, generator=draw) / 8}
    facts.config.dtype = torch.float32
    shards = {name: (matrix.shape, [matrix]) for name, matrix in drawn.items()}
    adapters = Adapters(facts, Plan(1), [shards], make_config(model_name=base, **LORA).model_dump())
    assert adapters.targets == layers
    adapters.save(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    begun, ids = copy.deepcopy(merged), torch.arange(40).view(2, 20)
    for name, parameter in merged.named_parameters():
        parameter.data = adapters.merge(name, begun)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(adapter keys|did not match)")
        wanted, before = merged(ids).logits, begun(ids).logits
        adapted = peft.PeftModel.from_pretrained(begun, tmp_path / "adapter")(ids).logits
    assert (wanted - before).abs().max() > 0.05
    torch.testing.assert_close(adapted, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["phimoe", "glm4_moe"])
def test_mixtures_at_tp_1_and_2(train: Callable[..., grid.Run], family: Callable[..., Path], kind: str) -> None:
    """Phi-3.5-MoE, whose router is a linear layer that returns a tuple, and layers with experts beside some without."""
    model = family(kind, **TYPES[kind])
    run = train(model, **LORA)
    grid.assert_equal_runs(run, plain_run(run.config))
    grid.assert_equal_runs(train(model, **LORA, tp_size=2), run)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("kind", MIXTURES)
def test_targets_of_mixtures(kind: str) -> None:
    """Experts and routers stay frozen, whatever they are to their class, and preflight says so."""
    model = ModelFacts.of_shape(tiny_shape(kind, **TYPES[kind]))
    dense = MLP if kind in ("qwen2_moe", "glm4_moe", "dots1", "ernie4_5_moe") else []
    assert {*kinds(targets(model.meta, "all-linear"))} == {*ATTENTION, *dense}
    ((_, _, row),) = check_lora(make_config(lora_rank=8), model)
    assert row.endswith("; experts and routers stay frozen")
    with pytest.raises(ConfigError, match=r"called gate_up_proj \(a mixture's experts are none\); .* of q_proj"):
        check_lora(make_config(lora_rank=8, lora_targets="q_proj,gate_up_proj"), model)


def test_routers_by_name() -> None:
    """One that is a linear layer like any other can be asked for; one that returns more than a product is refused."""
    model = ModelFacts.of_shape(tiny_shape("qwen2_moe", **TYPES["qwen2_moe"]))
    ((_, _, row),) = check_lora(make_config(lora_rank=8, lora_targets="shared_expert_gate"), model)
    assert row.endswith("on shared_expert_gate; experts stay frozen")
    model = ModelFacts.of_shape(tiny_shape("phimoe", **TYPES["phimoe"]))
    with pytest.raises(ConfigError, match=r"lora_targets = 'router': no adapter can stand beside a PhimoeTopKRouter"):
        check_lora(make_config(lora_rank=8, lora_targets="router"), model)


@pytest.mark.parametrize("kind, found", [
    ("qwen2_moe", {"shared_expert_gate"}), ("phimoe", {"router"}), ("jamba", {"router"}), ("hunyuan_v1_moe", {"wg"}),
    ("jetmoe", {"layer"}), ("afmoe", {"gate"}), ("qwen3_next", {"shared_expert_gate"}), ("glm4_moe", set()),
    ("llama", set()), ("falcon", set()), ("stablelm", set()), ("recurrent_gemma", set()),
])  # fmt: skip
def test_routers(kind: str, found: set[str]) -> None:
    """Whatever they are called; and none where nothing is routed. Qwen3-Next's shared expert is as wide as 512."""
    hybrid = dict(jamba=dict(expert_layer_period=1, expert_layer_offset=0), hunyuan_v1_moe=dict(num_experts=4),
                  recurrent_gemma=dict(num_hidden_layers=3))  # fmt: skip
    model = ModelFacts.of_shape(tiny_shape(kind, **(hybrid | TYPES).get(kind, {}))).meta
    assert {*kinds(name for name, module in model.named_modules() if module in routers(model))} == found


def test_targets_that_are_not_there(tiny_model: Callable[[str], Path]) -> None:
    """The names that there are."""
    model = ModelFacts.read(str(tiny_model("llama")))
    names = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    with pytest.raises(ConfigError, match=f"no linear layer of the decoder is called query, lm_head; .*{names}"):
        targets(model.meta, "q_proj,query,lm_head")


def test_preflight_says_what_is_trained(tiny_model: Callable[[str], Path]) -> None:
    """A row with LoRA, none without; and a dropout that the ranks can't draw is refused."""
    model = ModelFacts.read(str(tiny_model("qwen2-tied")))
    config = make_config(lora_rank=8, lora_targets="q_proj,o_proj")
    each = 8 * 2 * (64 + 64)
    assert check_lora(config, model) == [
        ("LoRA", f"{2 * each:,} parameters are trained, {200 * each / model.parameters:.2g} % of the model's",
         "rank 8, alpha 32, on q_proj, o_proj")]  # fmt: skip
    assert check_lora(make_config(), model) == []
    dropout = ModelFacts.read(str(tiny_model("qwen2-dropout")))
    with pytest.raises(
        ConfigError, match=r"lora_dropout = 0\.1: at tp_size 2 the model has dropout on attention heads"
    ):
        check_lora(config.change(lora_dropout=0.1), dropout)
    check_lora(config.change(lora_dropout=0.1, tp_size=1), dropout)


def test_the_planner_counts_what_is_trained(tiny_model: Callable[[str], Path]) -> None:
    """The adapters of all ranks, as they are."""
    model = ModelFacts.read(str(tiny_model("llama")))
    config = make_config(lora_rank=8).model_dump()
    assert model.shard(1).adapters(8) == adapter_parameters(model.meta, config)
    halves = 0
    for name, (inputs, outputs) in targets(model.meta, "all-linear").items():
        row = name.endswith(("o_proj", "down_proj"))
        halves += 8 * (inputs // 2 + outputs if row else inputs + outputs // 2)
    assert model.shard(2).adapters(8) == halves
