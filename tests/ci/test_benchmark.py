"""The benchmark's own parts: intervals of a trace, jobs, the line-up, what it reads of the published template."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from transformers import AutoModelForCausalLM

from tp2d_helpers.demo import SHAPES, build_model

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = ROOT / "ci/benchmark"
sys.path.insert(0, str(BENCHMARK))

import fsdp2  # noqa: E402
import inputs  # noqa: E402
import lineup  # noqa: E402
import results  # noqa: E402
import template  # noqa: E402
from jobs import Job  # noqa: E402
from plot import caption, draw, entries  # noqa: E402
from run import parse  # noqa: E402
from timeline import exposed, kind, layer, length, on_gpu, reduce, split, summarize, uncovered, union  # noqa: E402


def test_union() -> None:
    assert union([(5, 7), (0, 2), (1, 3), (7, 8), (9, 9)]) == [(0, 3), (5, 8)]
    assert union([(0, 10), (2, 3)]) == [(0, 10)]
    assert union([]) == []
    assert length([(0, 2), (1, 3), (5, 6)]) == 4


def test_exposed() -> None:
    assert exposed([(0, 10)], [(2, 4), (3, 6)]) == 6
    assert exposed([(0, 1), (0, 1)], []) == 1
    assert exposed([(2, 3)], [(0, 5)]) == 0


def test_intervals_against_counting() -> None:
    generator = random.Random(0)
    for _ in range(200):
        a, b = ([sorted(generator.sample(range(30), 2)) for _ in range(generator.randrange(6))] for _ in "ab")
        covered = [{t for begin, end in intervals for t in range(begin, end)} for intervals in (a, b)]
        assert length(map(tuple, a)) == len(covered[0])
        assert exposed(map(tuple, a), map(tuple, b)) == len(covered[0] - covered[1])
        left = uncovered(map(tuple, a), map(tuple, b))
        assert left == union(left) and {t for begin, end in left for t in range(begin, end)} == covered[0] - covered[1]


def kernel(name: str, ts: float, dur: float, category: str = "kernel") -> dict[str, Any]:
    """An event of a Chrome trace, in microseconds."""
    return dict(ph="X", cat=category, name=name, ts=ts, dur=dur)


def test_summary_of_a_trace() -> None:
    found = summarize(
        [
            kernel("gemm", 1000, 3000),
            kernel("ncclDevKernel_AllReduce", 3000, 2500),
            kernel("Memcpy PtoP (Device -> Device)", 5500, 1500),
            kernel("gemm", 8000, 1000),
            kernel("Memset", 8500, 1500, "gpu_memset"),
            kernel("aten::mm", 0, 99999, "cpu_op"),
            dict(ph="M", name="process_name"),
        ]
    )
    expected = dict(window_ms=9, compute_ms=5, communication_ms=4, communication_exposed_ms=3,
                    communication_hidden_ms=1, idle_ms=1, kernels=5)  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert dict(name="gemm", ms=4, calls=2) in found["top_kernels"]
    assert summarize([kernel("aten::mm", 0, 5, "cpu_op")]) == {"kernels": 0}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_64x6_nn>", "matmul"),
        ("ampere_sgemm_128x64_tn", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*)", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("Memcpy PtoP (Device -> Device)", "communication"),
        ("c10d::symmetric_memory::wait_signal_kernel(unsigned int**)", "communication"),
        ("triton_poi_fused_add_7", "other"),
        ("_adamw", "other"),
    ],
)
def test_kind_of_a_kernel(name: str, expected: str) -> None:
    assert kind(name) == expected


def step(layers: int) -> list[dict[str, Any]]:
    """A trace, in microseconds: forward, layers of 10 ms (attention 2, gemm 5, an all-reduce whose last 2 are exposed,
    1 idle); backward, layers of 20, nothing but 4 of attention and 16 of gemm."""
    forward = [
        event
        for start in range(0, layers * 10000, 10000)
        for event in (
            kernel("flash_fwd_kernel", start, 2000),
            kernel("gemm", start + 2000, 5000),
            kernel("ncclDevKernel_AllReduce", start + 5000, 4000),
        )
    ]
    first = layers * 10000
    backward = [
        event
        for start in range(first, first + layers * 20000, 20000)
        for event in (kernel("flash_bwd_kernel", start, 4000), kernel("gemm", start + 4000, 16000))
    ]
    return forward + backward


def test_reduced_trace() -> None:
    found = reduce(step(3))
    assert found["totals_ms"] == dict(matmul=63, attention=18, other=0, exposed=6, hidden=6)
    assert (found["window_ms"], found["idle_ms"]) == (90, 3)
    parts = dict(matmul=[[2, 7]], attention=[[0, 2]], other=[], exposed=[[7, 9]], hidden=[[5, 7]])
    assert found["forward"] == {"ms": 10} | parts
    assert found["backward"] == dict(ms=20, matmul=[[4, 20]], attention=[[0, 4]], other=[], exposed=[], hidden=[])
    with pytest.raises(ValueError, match="no two layers' attention forward"):
        layer(on_gpu(step(1)), backward=False)


def test_what_overlaps_is_counted_once() -> None:
    found = split([("_adamw", (0, 10)), ("gemm", (2, 4)), ("flash_fwd", (3, 6)), ("ncclDevKernel", (5, 12))])
    assert found == dict(
        matmul=[(2, 4)], attention=[(4, 6)], other=[(0, 2), (6, 10)], exposed=[(10, 12)], hidden=[(5, 10)]
    )  # fmt: skip


SCRIPT = """
import json, os, sys, time
job = json.load(open(sys.argv[1]))
while not os.path.exists(job["go"]):
    time.sleep(0.01)
rank = int(os.environ["RANK"])
{action}
"""


@pytest.mark.parametrize(
    "action, limit, error, found",
    [
        ('if rank == 0: open(job["result"], "w").write(json.dumps({"port": open(job["go"]).read()}))', 20, None, True),
        ('if rank == 1: open(job["result"] + ".error", "w").write("OutOfMemoryError: of 80 GiB"); sys.exit(1)\n'
         "time.sleep(60)", 20, "OutOfMemoryError: of 80 GiB", False),
        ('if rank == 1: sys.exit("no such device")\ntime.sleep(60)', 20, "no such device", False),
        ("time.sleep(60)", 0.5, "stopped at its time limit of 0 s", False),
    ],
    ids=["well", "noted", "log", "late"],
)  # fmt: skip
def test_job(tmp_path: Path, action: str, limit: float, error: str | None, found: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(action=action))
    job = Job(str(script), {}, 2, tmp_path / "job")
    assert all(process.poll() is None for process in job.processes), "they wait for their turn"
    job.release()
    assert job.wait(limit) == error
    assert all(process.poll() is not None for process in job.processes)
    assert bool(job.found()) == found


def options(*arguments: str) -> Any:
    """A command line, with what `run.py` derives from it on a GPU."""
    parsed = parse([*arguments, "--out", "x.json"])
    parsed.small_shape = "qwen2.5-0.5b"
    parsed.small = lineup.scaled(parsed.small_shape, on_gpu=True)
    return parsed


def test_line_up_takes_as_many_tokens_per_step() -> None:
    command = options("--shape", "qwen2-7b", "--optimizations", "none,compile+fused_loss", "--micro-batch", "2,4")
    tokens = set()
    for name in ("ours", "fsdp2_sp", "fsdp2_tp", "fsdp2_async", "fsdp2_dp", "dp_zero1", "dp_zero3"):
        for job in lineup.jobs(name, command):
            tokens.add(job["micro_batch"] * job["accumulation"] * job["dp"] * job["seq"])
            assert job["tp"] * job["dp"] == 2
    assert tokens == {16 * 4096}
    ours = lineup.jobs("ours", command)
    assert [(job["optimizations"], job["micro_batch"]) for job in ours] == [
        ("none", 2), ("none", 4), ("compile,fused_loss", 2), ("compile,fused_loss", 4)
    ]  # fmt: skip
    assert len({lineup.labels(job) for job in ours}) == len(ours)
    with pytest.raises(SystemExit, match="a global batch of 16 is no multiple of 3"):
        lineup.jobs("ours", options("--micro-batch", "3"))


def entry(name: str, speed: float, **changes: Any) -> dict[str, Any]:
    """What `results.summary` makes of a job whose step takes 65536 tokens."""
    settings = lineup.jobs(name, options("--shape", "qwen2-7b"))[0] | changes
    times = [9e9, 9e9, 9e9] + [settings["seq"] * 16 / speed * 500] * 5
    found = dict(step_ms=times, tokens=[65536] * 8, useful_tokens=[65536] * 8, flops_per_token=4e10, peak_flops=989e12,
                 losses=[1.0] * 8, peak_gib=speed / 100, init_peak_gib=20.0, setup_seconds=3.0)  # fmt: skip
    return results.summary(settings, found, None)


def test_results() -> None:
    fast, slow = entry("ours", 12000), entry("ours", 8000, micro_batch=2)
    assert fast["tokens_per_second_per_gpu"] == pytest.approx(12000)
    assert fast["useful_tokens_per_second"] == pytest.approx(24000)
    assert fast["mfu"] == pytest.approx(4e10 * 12000 / 989e12)
    failed = results.summary(slow["settings"], {"setup_seconds": 1.0}, "OutOfMemoryError: x | y")
    assert failed["status"] == "failed" and "step_ms" not in failed
    vain = results.summary(fast["settings"] | {"micro_batch": 8}, dict(grad_norms=[1.0, None]), None)
    assert vain["status"] == "failed" and vain["error"] == "gradients that are not finite"
    assert results.best([slow, fast, failed, vain | {"tokens_per_second_per_gpu": 1e9}]) == {"ours": fast["label"]}
    text = results.table({"candidates": [fast, failed, dict(name="torchtitan", status="not run", error="no")]})
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_figure(tmp_path: Path) -> None:
    shown = [entry("ours", 12000), entry("ours", 8000, micro_batch=2), entry("fsdp2_sp", 11000)]
    report = dict(shape="qwen2-7b", gpus=2, gpu="NVIDIA H200", candidates=[*shown, dict(name="x", status="not run")])
    assert [e["speed"] for e in entries([report], "qwen2-7b")] == pytest.approx([12000, 11000])
    assert len(entries([report], "qwen2-7b", everything=True)) == 3
    draw([report], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no measurement"):
        draw([report], tmp_path / "figure.png", shape="demo")


def test_captions_say_what_sets_a_candidate_apart() -> None:
    lines = ["this notebook", "tp 2 × dp 1, micro-batch 4 × 4,096", "bf16; fp32 gradients"]
    assert caption(entry("ours", 1)).splitlines() == lines
    assert caption(entry("fsdp2_sp", 1)).splitlines()[2] == "bf16; fp32 gradients"
    each = caption(entry("fsdp2_sp", 1, sync="each", gradients="bf16"))
    assert " ".join(each.splitlines()[2:]) == "bf16; bf16 gradients, reduced after every micro-batch"
    assert caption(entry("fsdp2_sp", 1, precision="fp8")).splitlines()[2] == "fp8; fp32 gradients"
    assert "eager, not compiled" in caption(entry("dp_zero3", 1))
    assert "eager, not compiled" in caption(entry("template_settings", 1))
    assert "eager" not in caption(entry("dp_zero1", 1)) + caption(entry("ours", 1, optimizations="compile,fused_loss"))
    none = " ".join(caption(entry("ours", 1, optimizations="none")).splitlines())
    assert "optimizations: none; fp32 gradients; eager" in none


def test_kept_figure_shows_the_kept_results(tmp_path: Path) -> None:
    kept = BENCHMARK / "results"
    draw([json.loads((kept / "h200x2.json").read_text())], tmp_path / "figure.png")
    with Image.open(kept / "h200x2.png") as old, Image.open(tmp_path / "figure.png") as new:
        assert old.size == new.size
        different = np.abs(np.asarray(old.convert("RGB"), int) - np.asarray(new.convert("RGB"), int)).max(axis=2) > 64
    assert different.sum() <= 20, "results/h200x2.png is stale: draw it anew by plot.py"


def test_text_is_short_documents() -> None:
    rows = inputs.short_documents(500)
    assert len(set(rows)) == 500
    assert all("\n" not in row and 80 <= len(row) <= 1200 for row in rows)


def test_template_is_watched_from_outside(tmp_path: Path) -> None:
    """Its engine is called three times; the times between, the positions and the losses are written."""

    class Engine(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return SimpleNamespace(loss=torch.tensor(2.0))

    names: dict[str, Any] = {"setup_model_with_autotp": lambda: (Engine(), None, None, 0, 0)}
    job = dict(raw=str(tmp_path / "raw.json"), dp=2)
    template.instrument(names, job)
    engine, *_ = names["setup_model_with_autotp"]()
    for real in (3, 4, 5):
        engine(input_ids=torch.ones(1, 8), attention_mask=(torch.arange(8) < real)[None])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        names["save_checkpoint"](engine, 0, 3, 2.0)
    finally:
        dist.destroy_process_group()
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert (raw["useful"], raw["positions"], raw["losses"]) == ([3, 4, 5], [8, 8, 8], [2.0] * 3)
    assert len(raw["begins"]) == 3


@pytest.mark.parametrize("shape", ["qwen2-7b", "phi-4-mini", "gemma-3-4b", "qwen3-30b-a3b"])
def test_peer_without_tp_computes_the_model(tmp_path: Path, shape: str) -> None:
    """Given a model's weights, its first loss and gradients are that model's: no buffer is lost on the way."""
    small = dict(hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, num_experts=8,
                 num_attention_heads=8, num_key_value_heads=4, head_dim=8, vocab_size=2048, sliding_window=16,
                 query_pre_attn_scalar=8)  # fmt: skip
    fields = {name: small.get(name, value) for name, value in SHAPES[shape].items()} | dict(pad_token_id=None)
    build_model(fields, tmp_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(2048, (2, 64))
    expected = model(ids, labels=ids).loss
    expected.backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        job = lineup.jobs("fsdp2_dp", options("--gpus", "1", "--seq", "64"))[0]
        peer = fsdp2.Peer(job | dict(model=str(tmp_path)), 0)
        assert torch.isfinite(peer.step([dict(input_ids=ids, labels=ids)]))
        for name, weight in peer.model.named_parameters():
            weight.data.to_local().copy_(model.get_parameter(name).data)
        loss = peer.loss(ids, ids)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for name, weight in peer.model.named_parameters():
            torch.testing.assert_close(weight.grad.full_tensor(), model.get_parameter(name).grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    """The command on two processes: peers train alike, our engine trains as data parallelism does."""
    out = tmp_path / "results.json"
    command = ["--shape", "demo", "--layers", "2", "--seq", "64", "--global-batch", "4", "--micro-batch", "2",
               "--peer-micro-batch", "2", "--steps", "5", "--warmup", "2", "--scratch", str(tmp_path / "scratch"),
               "--only", "ours,fsdp2_sp,fsdp2_tp,dp_zero1,template", "--profile", "ours"]  # fmt: skip
    subprocess.run([sys.executable, str(BENCHMARK / "run.py"), *command, "--out", str(out)], check=True, timeout=400)
    found = {entry["name"]: entry for entry in json.loads(out.read_text())["candidates"]}
    assert found["template"]["error"] == "no notebook was named (--template)"
    assert all(found[name]["status"] == "ok" for name in found if name != "template"), found
    assert found["fsdp2_sp"]["losses"] == pytest.approx(found["fsdp2_tp"]["losses"], rel=1e-5)
    assert found["ours"]["losses"] == pytest.approx(found["dp_zero1"]["losses"], rel=1e-5)
    assert found["ours"]["profile"]["update_ms"] > 0
