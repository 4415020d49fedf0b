"""What a job found, as an entry of the results file, and the entries as a Markdown table."""

from __future__ import annotations

import datetime
import statistics
from typing import Any

from lineup import OURS, labels

FORMULA = (
    "MFU = (6·N + 6·L·h·s) · tokens/s / GPUs / peak FLOP/s; N: weights of all matmuls that a token meets, the output "
    "head included, the embedding not; L layers, h hidden size, s sequence length. With LoRA, 4·N + 6·A in place of "
    "6·N; A: parameters of the adapters"
)


def now() -> str:
    """The date and time of a report, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def summary(settings: dict[str, Any], found: dict[str, Any], error: str | None) -> dict[str, Any]:
    """The entry of a job in the results: medians over the steps after the warm-up. Tokens/s are of all GPUs."""
    gpus, warmup = settings["tp"] * settings["dp"], settings["warmup"]
    entry: dict[str, Any] = dict(
        name=settings["name"], label=labels(settings), ours=settings["name"] in OURS,
        status="failed" if error else "ok", error=error, grid=f"{settings['tp']} × {settings['dp']}",
        settings=settings,
    )  # fmt: skip
    entry |= {key: value for key, value in found.items() if key != "step_ms"}
    if len(times := found.get("step_ms", [])) > warmup:
        ms = statistics.median(times[warmup:])
        rate = found["tokens"][-1] / ms * 1e3
        flops, peak = found.get("flops_per_token"), found.get("peak_flops")
        entry |= dict(
            status="ok",
            step_ms=ms,
            all_step_ms=times,
            tokens_per_step=found["tokens"][-1],
            tokens_per_second_per_gpu=rate / gpus,
            useful_tokens_per_second=rate * sum(found["useful_tokens"][warmup:]) / sum(found["tokens"][warmup:]),
            mfu=flops * rate / gpus / peak if flops and peak else None,
        )
    if None in found.get("grad_norms", []):  # the optimizer leaves such steps out: fast, and in vain
        entry |= dict(status="failed", error="gradients that are not finite")
    return entry


def best(candidates: list[dict[str, Any]]) -> dict[str, str]:
    """The label of each candidate's fastest entry."""
    fastest: dict[str, dict[str, Any]] = {}
    for entry in candidates:
        rate = entry.get("tokens_per_second_per_gpu", 0.0) if entry["status"] == "ok" else 0.0
        if rate > fastest.get(entry["name"], {}).get("tokens_per_second_per_gpu", 0.0):
            fastest[entry["name"]] = entry
    return {name: entry["label"] for name, entry in fastest.items()}


def number(entry: dict[str, Any], key: str, form: str = ",.0f", factor: float = 1.0) -> str:
    """A value for the table, empty if there is none."""
    value = entry.get(key)
    return "" if value is None else format(value * factor, form)


def row(entry: dict[str, Any]) -> str:
    """A line of the Markdown table."""
    error = f"{entry['status']}: {entry['error']}" if entry.get("error") else ""
    cells = [
        entry["name"], entry.get("label", ""), entry.get("grid", ""), number(entry, "tokens_per_step"),
        number(entry, "step_ms", ",.1f"), number(entry, "tokens_per_second_per_gpu"),
        number(entry, "useful_tokens_per_second"), number(entry, "mfu", ".1f", 100), number(entry, "peak_gib", ".1f"),
        number(entry, "init_peak_gib", ".1f"), number(entry, "state_gib", ".1f"), number(entry, "setup_seconds"),
        error.replace("|", "/"),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def table(report: dict[str, Any]) -> str:
    """All candidates as a Markdown table."""
    head = ["candidate", "settings", "tp × dp", "tokens/step", "ms/step", "tokens/s/GPU", "useful tokens/s, all GPUs",
            "MFU %", "peak GiB", "at init", "states GiB", "setup s", "note"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + [row(entry) for entry in report["candidates"]])
