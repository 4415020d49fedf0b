"""The time of a step: hand-worked numbers, and the benchmark's results on GPUs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tp2d_helpers.demo import SHAPES
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.shard import AllReduces, Matmul, Shard
from tp2d_helpers.model.styles import COLUMN, ROW
from tp2d_helpers.planning import step_time as step_time_module
from tp2d_helpers.planning.constants import HOST_LAYER, HOST_STEP, Constants
from tp2d_helpers.planning.memory import ON_GPU, Setting, memory_per_gpu
from tp2d_helpers.planning.step_time import Network, StepTime, step_time
from tp2d_helpers.speed import cross_entropy, optimizations
from tp2d_helpers.speed.devices import Device, device_named

GIB = 2**30
RESULTS = Path(__file__).resolve().parents[2] / "ci/benchmark/results"
LAYER = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 16), (8, 16), (16, 8)]
NAMES = [*(f"attn.{name}" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
STYLES = [COLUMN, COLUMN, COLUMN, ROW, COLUMN, COLUMN, ROW]
MATMULS = [Matmul(name, *sides, style) for name, sides, style in zip(NAMES, LAYER, STYLES, strict=True)]
SUMS = AllReduces(forward=2 * 2, blocks=2 * 2, columns=2 * 5)
SHARD = Shard(2, 8, 8, 4, heads=2, vocabulary=32, parameters=1000, tied=False, normed_heads=False,
              layer_matmuls=(*MATMULS, *MATMULS), all_reduces=SUMS)  # fmt: skip

SIMPLE = Device("simple", memory=1.0, memory_bandwidth=100.0, link_bandwidth=10.0, peak=1000.0)


def model(name: str) -> ModelFacts:
    return ModelFacts.of_shape(SHAPES[name])


# Every device at its datasheet's speed, and a host that takes no time.
IDEAL = Constants(matmuls=1, attention=1, memory=1, links=1, network=1, hidden=0, latency=0, host=0)


def ideal_time(*arguments: Any, **changes: float) -> StepTime:
    return step_time(SHARD, *arguments, constants=replace(IDEAL, **changes))


def test_work_by_hand() -> None:
    """3 tokens, 2 micro-batches, tp 1: products with their traffic, attention, the optimizer and its norm."""
    found = ideal_time(Setting(seq_length=3, gradient_accumulation_steps=2, optimizations=ON_GPU), SIMPLE)
    matmuls = [*LAYER, *LAYER, (8, 32)]
    work = sum(3 * 2 * 3 * k * n for k, n in matmuls) / 1000
    traffic = sum(3 * 2 * (3 * k + k * n + 3 * n) for k, n in matmuls) / 100
    assert found.matmuls == pytest.approx(2 * (work + traffic))
    assert found.attention == pytest.approx(2 * 3 * 6 * 2 * 8 * 3 / 1000)
    passes = 2 * 2 * (30 * 8 + 8 * 12 + 12 * 16) + 8 * 32
    sums = (2 + 4 + 4) * 1000  # bf16 gradients are added to sums in fp32
    assert found.element_wise == pytest.approx(2 * (3 * passes + sums) / 100)
    assert found.optimizer == pytest.approx((28 + 7 + 4) * 1000 / 100)
    assert found.tp_communication == found.dp_communication == found.host == 0
    assert found.total == pytest.approx(sum(vars(found).values()))


def test_chunks_of_logits_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a head of 8 × 32 in fp32, read and written 3 times, then made one in bf16."""
    for module in (step_time_module, cross_entropy):
        monkeypatch.setattr(module, "ROWS", 10)
    chunks, whole = (
        ideal_time(Setting(seq_length=30, optimizations=ON_GPU, whole_logits=whole), SIMPLE).total
        for whole in (False, True)
    )
    assert chunks - whole == pytest.approx(8 * 32 * (3 * 8 + 4 + 2) / 100)


def test_communication_by_hand() -> None:
    """4 all-reduces per layer and one for the head, of 3 × 8 numbers in bf16; without blocks 7. DP: 3 passes.

    Blocks let what fits hide behind the gradients of the column-wise weights.
    """
    blocks = ideal_time(Setting(tp_size=2, seq_length=3, optimizations=ON_GPU), SIMPLE)
    each, behind = 2 * 3 * 8 / 10, 2 * 2 * 3 * sum(k * n for k, n in [*LAYER[:3], *LAYER[4:6]]) / 1000
    assert behind < 4 * each and blocks.tp_communication == pytest.approx((2 * 4 + 1) * each - behind)
    many = Setting(tp_size=2, seq_length=4096, optimizations=ON_GPU)
    together = ideal_time(replace(many, optimizations=ON_GPU - {"peer_copies"}), SIMPLE).tp_communication
    halves = together - ideal_time(many, SIMPLE).tp_communication  # of 2 layers' forward sums
    assert halves == pytest.approx(2 * 2 / 2 * 2 * 4096 * 8 / 10)
    every = ideal_time(Setting(tp_size=2, seq_length=3), SIMPLE)
    assert every.tp_communication == pytest.approx((2 * 7 + 1) * each)
    replicas = ideal_time(Setting(dp_size=4, seq_length=3), SIMPLE)
    assert replicas.dp_communication == pytest.approx(3 / 4 * (4 + 2) * 1000 / 10)
    outside = ideal_time(Setting(dp_size=4, seq_length=3), SIMPLE, Network(gpus_per_node=2, bandwidth=5))
    assert outside.dp_communication == pytest.approx(2 * replicas.dp_communication)


def test_what_zero_hides() -> None:
    """The gradients' reduction behind the backward pass; the gather after the step, and stage 3, behind nothing."""
    found = ideal_time(Setting(dp_size=4, seq_length=3), replace(SIMPLE, link_bandwidth=1e3), hidden=1.0)
    gather = 3 / 4 * 2 * 1000 / 1e3
    assert found.dp_communication == pytest.approx(gather)
    graphs = Setting(dp_size=4, seq_length=3, optimizations=frozenset({"cuda_graph"}))
    shown = ideal_time(graphs, replace(SIMPLE, link_bandwidth=1e3), hidden=1.0)
    assert shown.dp_communication == pytest.approx(3 * gather)  # and the sums in fp32, which no backward pass hides
    third = ideal_time(Setting(dp_size=4, seq_length=3, zero_stage=3), replace(SIMPLE, link_bandwidth=1e3))
    assert third.dp_communication == pytest.approx((2 + 2) * gather)  # two gathers, and sums of twice their width


def test_the_host_is_the_floor() -> None:
    """What a host that is 10⁶ times slower takes to launch is what the step takes, whatever the GPU does."""
    setting = Setting(seq_length=3, gradient_accumulation_steps=3)
    compiled = replace(setting, optimizations=ON_GPU - {"cuda_graph"})
    graphs = replace(setting, optimizations=ON_GPU)
    for asked, kind in ((setting, "eager"), (compiled, "compiled"), (graphs, "graph")):
        seconds = 1e6 * (3 * 2 * HOST_LAYER[kind] + HOST_STEP)
        assert ideal_time(asked, SIMPLE, host=1e6).total == pytest.approx(seconds)


def test_recomputation_costs_a_forward_pass() -> None:
    """A third more of the layers' matmuls, none of the head's, and two more all-reduces per layer."""
    setting = Setting(tp_size=2, seq_length=3)
    plain = ideal_time(setting, SIMPLE)
    full = ideal_time(replace(setting, activation_checkpointing="full"), SIMPLE)
    forward = [2 * (2 * 3 * k * n / 1000 + 2 * (3 * k + k * n + 3 * n) / 100) for k, n in LAYER]
    assert full.matmuls - plain.matmuls == pytest.approx(sum(forward))
    assert full.tp_communication - plain.tp_communication == pytest.approx(2 * 2 * 2 * 3 * 8 / 10)


# Measured runs

SECONDS, PEAK, PEAK_NEAR = 0.20, 0.08, 0.022  # how far off an estimate may be
HOST_BOUND = 1.0  # where a step waits for its host: hosts differ by a factor of two (`calibrate` measures one)
PEAKS_NEAR = ("gemma-3-4b", "phi-4-mini")  # whose classes keep more than most; and with LoRA
SECONDS_OF = {"gemma-3-4b": 0.35}  # heads of 256 and windows: its attention is slower than what was fitted


def measured() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(report, entry) of each run of this package's engine, ZeRO's plain data parallelism included."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        if device_named(str(report.get("gpu"))):
            entries = report.get("candidates", [])  # a timeline has none
            found += [(report, e) for e in entries if e.get("settings", {}).get("kind") == "ours" and "step_ms" in e]
    return found


def predicted(report: dict[str, Any], entry: dict[str, Any]) -> tuple[float, float]:
    """(milliseconds per step, peak GiB) of an entry."""
    job = entry["settings"]
    shape = dict(SHAPES[job["shape"]])
    if report["layers"] != "all" and job["shape"] == report["shape"]:
        shape["num_hidden_layers"] = report["layers"]
    setting = Setting.of(
        dict(tp_size=job["tp"], dp_size=job["dp"], zero_stage=job["zero"], batch_size_per_gpu=job["micro_batch"],
             gradient_accumulation_steps=job["accumulation"], seq_length=job["seq"],
             activation_checkpointing=job["activation_checkpointing"], optimizations=job["optimizations"],
             lora_rank=job.get("lora_rank", 0), gradient_dtype=job["gradients"] if "precision" in job else "bf16",
             whole_logits="precision" not in job, precision=job.get("precision", "bf16"))
    )  # fmt: skip
    if "precision" not in job and setting.tp_size > 1:  # when "auto" left graphs out
        setting = replace(setting, optimizations=setting.optimizations - {"cuda_graph"})
    shard = ModelFacts.of_shape(shape).shard(setting.tp_size)
    seconds = step_time(shard, setting, device_named(report["gpu"])).total
    peak = memory_per_gpu(shard, setting).total
    if "precision" not in job and setting.zero_stage < 3:  # by DeepSpeed's own buckets, before `sum_gradients`
        peak += 2 * min(500_000_000, setting.trained(shard) if setting.lora_rank else math.inf) * (1 + (job["dp"] > 1))
    kept = "compile" in setting.optimizations and job["activation_checkpointing"] == "none"
    if kept and report["date"] < "2026-11-28 14" and setting.precision != "fp8":  # before compiled layers kept less
        masks = shard.masked * (setting.seq_length + 2 * (shard.query - shard.key_value))
        peak += setting.tokens * setting.width * shard.layers * (2 * shard.hidden + shard.mlp_out + masks)
    return seconds * 1e3, peak / GIB


def test_measured_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of the engine that the benchmark left: its peak memory and its time."""
    monkeypatch.setattr(optimizations, "compilers", lambda on_gpu: True)  # there, whatever is here
    rows = measured()
    if not rows:
        pytest.skip(f"no results of GPUs in {RESULTS.relative_to(RESULTS.parents[2])}")
    lines, wrong = [], 0
    for report, entry in rows:
        (milliseconds, peak), job = predicted(report, entry), entry["settings"]
        time_off, peak_off = milliseconds / entry["step_ms"] - 1, peak / entry["peak_gib"] - 1
        waits = job["micro_batch"] * job["seq"] <= 512
        limit = HOST_BOUND if waits else SECONDS_OF.get(job["shape"], SECONDS)
        near = job.get("lora_rank") or job["shape"] in PEAKS_NEAR
        bad = abs(time_off) > limit or abs(peak_off) > (PEAK_NEAR if near else PEAK)
        wrong += bad
        lines.append(
            f"{'WRONG ' * bad}{job['shape']}, {entry['grid']}, {entry['label']}, ZeRO {job['zero']}: "
            f"{entry['step_ms']:.0f} ms, predicted {milliseconds:.0f} ({time_off:+.1%}); "
            f"{entry['peak_gib']:.1f} GiB, predicted {peak:.1f} ({peak_off:+.1%})"
        )
    assert not wrong, "\n".join(lines)
