"""The memory of a run: hand-worked numbers, and the peaks that H200 GPUs showed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tp2d_helpers.config import make_config
from tp2d_helpers.demo import SHAPES
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.norms import Norms
from tp2d_helpers.model.shard import AllReduces, Matmul, Shard
from tp2d_helpers.planning import memory
from tp2d_helpers.planning.memory import (
    ON_GPU,
    Setting,
    activation_bytes,
    logit_bytes,
    memory_per_gpu,
)
from tp2d_helpers.speed import cross_entropy, optimizations
from tp2d_helpers.speed.devices import device_named
from tp2d_helpers.speed.layers import compile_layers

GIB = 2**30
# 2 layers; widths 8 (hidden), 8 (query), 4 (key-value), 16 (MLP) of this rank; 2 heads, 32 tokens ids, 1000 parameters.
MLP = tuple(Matmul(f"{layer}.mlp.{name}_proj", 8, 16) for layer in range(2) for name in ("gate", "up", "down"))
SHARD = Shard(2, 8, 8, 4, heads=2, vocabulary=32, parameters=1000, tied=False, normed_heads=False,
              layer_matmuls=MLP, all_reduces=AllReduces())  # fmt: skip
COMPILED = frozenset({"compile", "fused_loss"})


def shard(name: str, tp_size: int) -> Shard:
    return ModelFacts.of_shape(SHAPES[name]).shard(tp_size)


def test_shard_of_a_model() -> None:
    """Llama-3-8B at tp 4: 32 heads and 8 key-value heads of 128; the parameters of test_traffic.py."""
    found = shard("llama-3-8b", 4)
    assert (found.layers, found.hidden, found.query, found.key_value) == (32, 4096, 1024, 256)
    assert (found.mlp_in, found.mlp_out, found.gathered) == (2 * 3584, 3584, 0)
    assert (found.heads, found.vocabulary, found.tied) == (8, 32064, False)
    assert found.all_reduces == AllReduces(forward=32 * 2, blocks=32 * 2, columns=32 * 5)
    whole = 128_256 * 4096 + 65 * 4096
    assert found.parameters == (8_030_261_248 - whole) // 4 + whole


@pytest.mark.parametrize("settings, kept", [
    ({}, 8 * 8 + 2 * 8 + 2 * 4 + 4 * 16),  # two norms keep three tensors each
    (dict(optimizations=ON_GPU), 2 * 8 + 2 * 8 + 2 * 4 + 2 * 16),
    (dict(activation_checkpointing="full", tp_size=2), 8 - 4),  # no log-sums
])  # fmt: skip
def test_activations_by_hand(settings: dict[str, Any], kept: int) -> None:
    """6 tokens, 2 layers: 2 bytes for each element, 4 for each head's log-sum; four hidden states at the last norm."""
    setting = Setting(batch_size_per_gpu=2, seq_length=3, **settings)
    assert activation_bytes(SHARD, setting)[0] == 6 * 2 * (2 * kept + 4 * 2) + 6 * 2 * 4 * 8


@pytest.mark.parametrize("names, norms, joined, windows", [
    (frozenset(), (4 * 4 - 2 * 3) * 8, 8 + 4, 5 + 2 * (8 - 4)), (ON_GPU, 8, 8 + 4, 0),
])  # fmt: skip
def test_what_a_class_keeps_besides_by_hand(names: frozenset[str], norms: int, joined: int, windows: int) -> None:
    """Four norms in fp32, of which two are of what the blocks made; a matrix for q, k, v; a window of 4 of 5 tokens."""
    setting, norm = Setting(seq_length=5, optimizations=names), Norms(4, 4, 2)
    usual, mask = activation_bytes(SHARD, setting)[0], 5 * 5 * 2
    head = 5 * 2 * 8
    assert activation_bytes(replace(SHARD, norms=norm), setting)[0] == usual + head + 2 * 5 * 2 * norms
    assert activation_bytes(replace(SHARD, joined=True), setting)[0] == usual + 2 * 5 * 2 * joined
    kept, added = activation_bytes(replace(SHARD, masked=0.5, window=4), setting)
    assert kept == usual + 2 * 0.5 * 5 * 2 * windows and added == activation_bytes(SHARD, setting)[1] + mask
    assert activation_bytes(replace(SHARD, masked=0.5, window=5), setting) == activation_bytes(SHARD, setting)


def test_full_checkpointing_by_hand() -> None:
    """Kept: a hidden state per layer. Added: a layer's other activations, and their gradients."""
    kept, added = activation_bytes(SHARD, Setting(seq_length=6, activation_checkpointing="full"))
    assert kept == 6 * 2 * 2 * 8 + 6 * 2 * 4 * 8
    again, gradients = 7 * 8 + 2 * 8 + 2 * 4 + 4 * 16, 4 * 8 + 2 * 8 + 2 * 4 + 3 * 16
    assert added == 6 * (2 * again + 4 * 2) + 6 * (2 * gradients + 4 * 2)


@pytest.mark.parametrize("model_type, shape, tolerance", [
    ("llama", {}, 0.007),
    ("qwen3", dict(head_dim=16), 0.03),  # norms of heads
    ("mixtral", dict(num_local_experts=4), 0.04),  # and the router's probabilities
    ("qwen3_moe", dict(head_dim=16, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=64), 0.06),
    ("gemma3_text", dict(head_dim=16, sliding_window=64, hidden_size=256), 0.03),  # four norms in fp32, and of heads
    ("gemma3_text", dict(head_dim=16, sliding_window=16, hidden_size=256), 0.03),  # windows by a mask
    ("glm4", dict(head_dim=16, partial_rotary_factor=1.0, hidden_size=256), 0.12),  # four norms; one matrix, rotated
    ("olmo2", dict(hidden_size=256), 0.03),  # norms of what the blocks made alone
    ("phi3", {}, 0.08),  # one matrix for q, k, v
    ("starcoder2", {}, 0.03),  # layer norms
])  # fmt: skip
@pytest.mark.parametrize("optimizations, backend", [((), None), (("compile",), "aot_eager_decomp_partition")])
def test_activations_are_what_autograd_keeps(
    model_type: str, shape: dict[str, int], tolerance: float, optimizations: tuple[str, ...], backend: str | None
) -> None:
    """A third layer keeps what the formula says, up to the norms' fp32 numbers, two per token.

    The backend decides what is kept as the default one does, and compiles nothing.
    """
    usual = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=8,
                 num_key_value_heads=4, vocab_size=64, pad_token_id=None)  # fmt: skip
    hf_config = AutoConfig.for_model(model_type, **usual | shape)
    ids = torch.randint(64, (2, 48))
    setting = Setting(batch_size_per_gpu=2, seq_length=48, optimizations=frozenset(optimizations))
    kept, expected = [], []
    for layers in (2, 3):
        kept.append(bytes_kept(hf_config, ids, layers, backend))
        expected.append(activation_bytes(ModelFacts.of(hf_config).shard(1), setting)[0])
    assert kept[1] - kept[0] == pytest.approx(expected[1] - expected[0], rel=tolerance)


def bytes_kept(hf_config: Any, ids: torch.Tensor, layers: int, backend: str | None) -> int:
    """What the forward pass of a decoder in bf16 leaves for the backward pass, its weights apart."""
    hf_config.num_hidden_layers = layers
    whole = AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16)
    model = whole.model
    if backend:
        compile_layers(whole, backend)
    weights, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("settings, per_logit", [
    ({}, 10), (dict(tp_size=2), 14), (dict(optimizations=ON_GPU), 4), (dict(optimizations={"fused_loss"}), 15),
    (dict(tp_size=2, width=4), 16),
])  # fmt: skip
def test_logits_by_hand(settings: dict[str, Any], per_logit: int) -> None:
    assert logit_bytes(SHARD, Setting(seq_length=6, **settings)) == 6 * 32 * per_logit


@pytest.mark.parametrize("settings, expected", [
    ({}, 32 * (4 * 8 + 10 * 4) + 2 * 8 * 20),  # a chunk's logits are more than the weight's gradient in bf16
    (dict(lora_rank=1), 32 * 10 * 4 + 2 * 8 * 20),
    (dict(optimizations=frozenset({"fused_loss"})), 32 * (4 * 8 + 10 * 15) + 2 * 8 * 20),
    (dict(zero_stage=3), 20 * 32 * 4), (dict(whole_logits=True), 20 * 32 * 4), (dict(seq_length=18), 18 * 32 * 4),
])  # fmt: skip
def test_chunks_of_logits_by_hand(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: int) -> None:
    """20 tokens in chunks of 10. Of 18, there would be no less with chunks."""
    for module in (memory, cross_entropy):
        monkeypatch.setattr(module, "ROWS", 10)
    assert logit_bytes(SHARD, Setting(**{"seq_length": 20, "optimizations": ON_GPU, **settings})) == expected


def test_state_and_buffers_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 parameters in bf16 at ZeRO 1 and dp 2: their gradients are summed in fp32."""
    small = Setting(dp_size=2, seq_length=1)
    found = memory_per_gpu(SHARD, small)  # at DeepSpeed's step: half the sums again, flat
    assert (found.weights, found.gradients, found.optimizer, found.buffers) == (2000, 4000, 6000, 2000)
    large = memory_per_gpu(SHARD, Setting(dp_size=2, seq_length=2000))
    assert (large.gradients, large.buffers, large.logits) == (4000, 0, 2000 * 32 * 10)
    assert large.total == 2000 + 4000 + 6000 + large.logits + large.activations
    low = memory_per_gpu(SHARD, Setting(dp_size=2, seq_length=2000, gradient_dtype="bf16"))
    assert large.total - low.total == 2000
    bf16 = memory_per_gpu(SHARD, Setting(dp_size=2, seq_length=2000, master_weights="bf16"))
    assert low.total - bf16.total == 3000  # its gradients are bf16, too
    second = memory_per_gpu(SHARD, Setting(dp_size=2, seq_length=2000, zero_stage=2))
    assert (second.gradients, second.buffers) == (2000, 4000)  # what travels is less than three buckets
    monkeypatch.setattr(memory, "BUCKET", 100)
    assert memory_per_gpu(SHARD, Setting(dp_size=2, seq_length=2000, zero_stage=2)).buffers == 4 * 3 * 100


def test_one_gradient_of_one_replica_stays_as_it_is() -> None:
    alone = memory_per_gpu(SHARD, Setting(seq_length=2000, optimizations=frozenset({"fused_step"})))
    assert alone.gradients == 0  # at the loss, the fullest moment
    for summed in (dict(gradient_accumulation_steps=2), dict(dp_size=2)):
        assert memory_per_gpu(SHARD, Setting(seq_length=2000, **summed)).gradients == 4000


def test_the_one_pass_step_needs_no_copy() -> None:
    usual, fused = (
        memory_per_gpu(shard("llama-3-8b", 2), Setting(tp_size=2, seq_length=64, optimizations=frozenset(names)))
        for names in ((), ("fused_step",))
    )
    parameters = shard("llama-3-8b", 2).parameters
    assert usual.buffers == 4 * parameters and fused.buffers == 0


def test_zero_divides() -> None:
    """Masters and moments from stage 1, gradients from 2, weights at 3."""
    found = [memory_per_gpu(shard("llama-3-8b", 1), Setting(dp_size=8, zero_stage=stage)) for stage in range(4)]
    assert [part.optimizer for part in found[:2]] == [12 * 8_030_261_248, 12 * 8_030_261_248 / 8]
    assert found[3].weights == found[2].weights / 8
    assert [part.total for part in found] == sorted((part.total for part in found), reverse=True)


@pytest.mark.parametrize("names", [frozenset(), frozenset({"fused_loss", "fused_step"})])
def test_what_checkpointing_saves(names: frozenset[str]) -> None:
    setting = dict(tp_size=2, batch_size_per_gpu=8, seq_length=4096, optimizations=names)
    totals = [
        memory_per_gpu(shard("llama-3-8b", 2), Setting(**setting, activation_checkpointing=mode)).total
        for mode in ("none", "full")
    ]
    assert totals[0] > 1.5 * totals[1]


def test_setting_of_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizations are those that the engine chooses, where there is a compiler."""
    monkeypatch.setattr(optimizations, "compilers", lambda on_gpu: True)
    config = make_config(tp_size=4, dp_size=3, batch_size_per_gpu=2, seq_length=128, use_gpu=True, zero_stage=2)
    setting = Setting.of(config.model_dump())
    assert (setting.tp_size, setting.dp_size, setting.zero_stage, setting.width) == (4, 3, 2, 2)
    assert (setting.tokens, setting.global_tokens) == (256, 768)
    assert setting.activation_checkpointing == "none"
    assert setting.optimizations == ON_GPU - {"peer_copies"}
    assert Setting.of(config.change(tp_size=2).model_dump()).optimizations == ON_GPU
    assert Setting.of(config.change(tp_size=1).model_dump()).optimizations == ON_GPU - {"peer_copies"}
    on_cpu = Setting.of(config.change(use_gpu=False).model_dump())
    assert on_cpu.width == 4 and "compile" not in on_cpu.optimizations
    assert Setting.of(config.change(precision="fp32").model_dump()).width == 4
    assert Setting.of(config.change(zero_stage=3).model_dump()).optimizations == {"fused_loss", "fused_step"}
    assert Setting.of({"optimizations": "compile,fused_loss"}).optimizations == COMPILED
    assert Setting.of({"optimizations": "none"}).optimizations == frozenset()


@pytest.mark.parametrize("grid, peak", [({}, 31.0), (dict(tp_size=2), 19.2), (dict(dp_size=2), 28.2)])
def test_measured_peaks(grid: dict[str, int], peak: float) -> None:
    """GiB in tensors on H200, torch 2.11, without optimizations, and with DeepSpeed's gradient buckets."""
    setting = Setting(batch_size_per_gpu=8, seq_length=1024, gradient_dtype="bf16", **grid)
    buckets = 2 * 500_000_000 * setting.dp_size
    found = (memory_per_gpu(shard("qwen2.5-0.5b", setting.tp_size), setting).total + buckets) / GIB
    assert found == pytest.approx(peak, rel=0.06)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_defaults_fit_a_t4(tp_size: int) -> None:
    """Qwen2.5-0.5B by the notebook's micro-batch of 4 × 256, and by 4 × 512."""
    for seq_length in (256, 512):
        setting = Setting(tp_size=tp_size, dp_size=2, batch_size_per_gpu=4, seq_length=seq_length, precision="fp16",
                          optimizations=ON_GPU)  # fmt: skip
        found = memory_per_gpu(shard("qwen2.5-0.5b", tp_size), setting).total / GIB
        assert found < 0.9 * device_named("T4").memory
