"""The candidates of a benchmark, as jobs for `candidate.py` and `template.py`."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

TEMPLATE_SEQ = 2048  # of the template's settings at the large shape
DEFAULT = ("ours", "fsdp2_sp", "template_settings", "dp_zero1", "ours_text", "template", "fsdp2_tp", "dp_zero3",
           "ours_1x512")  # fmt: skip
ALSO = ("ours_lora", "fsdp2_lora", "fsdp2_async", "fsdp2_dp", "ours_text_dp", "torchtitan")  # by name only
SMALL = ("template", "ours_text", "ours_text_dp", "ours_1x512")  # at the small shape
OURS = ("ours", "ours_lora", "ours_text", "ours_text_dp", "ours_1x512")


def labels(job: dict[str, Any]) -> str:
    """A name for tables and figures that tells jobs of one candidate apart."""
    parts = [f"micro-batch {job['micro_batch']} × {job['seq']}"]
    if job["kind"] == "ours" and job["optimizations"] != "auto":
        parts.append(job["optimizations"])
    if job.get("lora_rank"):
        parts.append(f"LoRA rank {job['lora_rank']}")
    if job["activation_checkpointing"] != "none":
        parts.append(f"checkpointing {job['activation_checkpointing']}")
    if job.get("packing") == "documents":
        parts.append("whole documents packed")
    if job["sync"] != "last":
        parts.append("reduced at each micro-batch")
    if job.get("precision", "bf16") != "bf16":
        parts.append(job["precision"])
    if job["kind"] == "fsdp2" or (job["kind"] == "ours" and "precision" in job and not job.get("lora_rank")):
        parts.append(f"gradients in {job.get('gradients', 'fp32')}")  # results of before have no such key
    return ", ".join(parts)


def jobs(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The jobs of a candidate: one per micro-batch size (and set of optimizations, for ours).

    The accumulation makes up the rest of the global batch, so that all candidates take as many tokens per optimizer
    step; the template's settings have no accumulation, and the small shape has batches of its own.
    """
    gpus = options.gpus
    job: dict[str, Any] = dict(
        name=name, kind="ours", tp=gpus, dp=1, zero=1, seq=options.seq, optimizations="auto", sync="last",
        precision="bf16", gradients="bf16", lora_rank=0,
        activation_checkpointing="none", sequence_parallel=False, async_tp=False, text="",
        shape=options.shape, steps=options.steps, warmup=options.warmup, profile=name in options.profile,
    )  # fmt: skip
    if name.endswith("_lora"):
        job |= dict(lora_rank=options.lora_rank)
    if name in ("ours", "ours_lora"):
        tp = options.tp or gpus // (options.dp or 1)
        job |= dict(tp=tp, dp=gpus // tp, activation_checkpointing=options.activation_checkpointing)
        kinds = itertools.product(
            options.optimizations, options.packing, options.precision, options.gradients, options.micro_batch
        )
        names = ("optimizations", "packing", "precision", "gradients")
        return [
            batch(job | dict(zip(names, kind, strict=True)), size, options.global_batch, options.accumulation)
            for *kind, size in kinds
        ]
    if name.startswith("fsdp2"):
        job |= dict(kind="fsdp2", sequence_parallel=name in ("fsdp2_sp", "fsdp2_async"), async_tp=name == "fsdp2_async")
        data_parallel = name in ("fsdp2_dp", "fsdp2_lora")
        job |= dict(tp=1, dp=gpus) if data_parallel else {}
        return [
            batch(job | dict(sync=sync, gradients=gradients, precision=precision), size, options.global_batch)
            for sync in options.fsdp2_sync
            for precision in options.precision
            for gradients in (["bf16"] if name == "fsdp2_lora" else options.gradients)
            for size in (options.data_parallel_micro_batch if data_parallel else options.peer_micro_batch)
        ]
    if name.startswith("dp_zero"):
        job |= dict(tp=1, dp=gpus, zero=int(name[-1]))
        return [batch(job, size, options.global_batch) for size in options.data_parallel_micro_batch]
    if name == "template_settings":
        seq = min(TEMPLATE_SEQ, options.seq)
        return [job | dict(kind=name, micro_batch=1, accumulation=1, seq=seq)]
    return [small_job(job | dict(shape=options.small_shape, text="text"), options.small)]


def small_job(job: dict[str, Any], small: dict[str, int]) -> dict[str, Any]:
    """The job of a candidate at the small shape: one micro-batch of one sample as in the template, or a full GPU."""
    if job["name"] in ("template", "ours_1x512"):
        job |= dict(micro_batch=1, accumulation=1, seq=small["template_seq"], steps=20, warmup=5)
        return job | ({"kind": "template"} if job["name"] == "template" else {})
    if job["name"] == "ours_text_dp":
        job |= dict(tp=1, dp=job["tp"])
    return job | {key: small[key] for key in ("micro_batch", "accumulation", "seq")}


def batch(job: dict[str, Any], size: int, total: int, accumulation: int = 0) -> dict[str, Any]:
    """The job at a micro-batch of `size` samples and a global batch of `total`, unless `accumulation` is given."""
    if not accumulation and total % (size * job["dp"]):
        raise SystemExit(f"{job['name']}: a global batch of {total} is no multiple of {size} × {job['dp']} samples")
    return job | dict(micro_batch=size, accumulation=accumulation or total // (size * job["dp"]))


def scaled(small_shape: str, on_gpu: bool) -> dict[str, int]:
    """Batches for the small shape: on a GPU those that fill it, on a CPU such that a test takes seconds."""
    if on_gpu and small_shape != "demo":
        return dict(micro_batch=32, accumulation=2, seq=2048, template_seq=512)
    return dict(micro_batch=2, accumulation=2, seq=64, template_seq=64)
