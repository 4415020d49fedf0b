"""Draw results of `run.py`: speed and memory of each candidate, side by side.

    python ci/benchmark/plot.py results.json [more.json …] --out results.png [--shape qwen2.5-0.5b] [--all]

A figure shows candidates of one shape, those of the first file's `shape` unless `--shape` names another, the fastest
settings of each or (`--all`) every one that was measured.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

OURS, PEERS = "#0b6e4f", "#b6bfc9"
TEXT = 12  # points
TITLES = {
    "ours": "this notebook",
    "ours_text": "this notebook",
    "ours_text_dp": "this notebook, data parallel only",
    "ours_1x512": "this notebook, a small step",
    "fsdp2_sp": "FSDP2 + DTensor, sequence parallel",
    "fsdp2_tp": "FSDP2 + DTensor, tensor parallel",
    "fsdp2_async": "FSDP2 + DTensor, async TP",
    "fsdp2_dp": "FSDP2, data parallel only",
    "dp_zero1": "this notebook, ZeRO 1 without TP",
    "dp_zero3": "this notebook, ZeRO 3 without TP",
    "template_settings": "AutoTP, published template's settings",
    "template": "published template, as it is",
}


def entries(reports: list[dict[str, Any]], shape: str, everything: bool = False) -> list[dict[str, Any]]:
    """What was measured at a shape, the fastest first: of each candidate and precision the fastest settings, or all."""
    found = [
        entry | {"speed": speed(entry)}
        for report in reports
        for entry in report["candidates"]
        if entry["status"] == "ok" and entry.get("step_ms") and entry["settings"]["shape"] == shape
    ]
    found.sort(key=lambda entry: -entry["speed"])
    first: dict[Any, dict[str, Any]] = {}
    for entry in found:
        kind = entry["label"] if everything else entry["settings"].get("precision", "bf16")
        first.setdefault((entry["name"], entry["grid"], kind), entry)
    return list(first.values())


def speed(entry: dict[str, Any]) -> float:
    """Tokens/s per GPU, padding not counted."""
    return entry["useful_tokens_per_second"] / processes(entry)


def processes(entry: dict[str, Any]) -> int:
    """GPUs that the candidate used."""
    return entry["settings"]["tp"] * entry["settings"]["dp"]


def caption(entry: dict[str, Any]) -> str:
    """Lines for a bar: what it is, its grid and micro-batch, and what sets it apart from the others."""
    settings = entry["settings"]
    lines = [
        TITLES.get(entry["name"], entry["name"]),
        f"tp {settings['tp']} × dp {settings['dp']}, micro-batch {settings['micro_batch']} × {settings['seq']:,}",
    ]
    optimizations, notes = settings["optimizations"], []
    if "precision" in settings:  # results of before have no such key
        notes.append(settings["precision"])
    if settings["kind"] == "ours" and optimizations != "auto":
        notes.append("optimizations: " + optimizations.replace(",", ", "))
    if settings["activation_checkpointing"] != "none":
        notes.append(f"activation checkpointing: {settings['activation_checkpointing']}")
    if settings["kind"] == "fsdp2" or "precision" in settings:
        reduced = "" if settings["sync"] == "last" else ", reduced after every micro-batch"
        notes.append(f"{settings.get('gradients', 'fp32')} gradients{reduced}")
    if is_eager(settings):
        notes.append("eager, not compiled")
    return "\n".join([*lines, *textwrap.wrap("; ".join(notes), 50, break_on_hyphens=False)])


def is_eager(settings: dict[str, Any]) -> bool:
    """Whether a job runs without torch.compile even on GPUs: stage 3 and the template do."""
    if settings["kind"] == "fsdp2":
        return False
    asked = settings["optimizations"] == "auto" or "compile" in settings["optimizations"].split(",")
    return settings["kind"] != "ours" or settings["zero"] == 3 or not asked


def draw(reports: list[dict[str, Any]], path: Path, shape: str = "", everything: bool = False) -> None:
    """Write the figure as a PNG.

    Raises:
        ValueError: if nothing was measured at the shape.
    """
    shape = shape or reports[0]["shape"]
    shown = entries(reports, shape, everything)
    if not shown:
        raise ValueError(f"no measurement at the shape {shape!r}")
    captions = [caption(entry) for entry in shown]
    height = 1.4 + sum(0.22 * len(words.splitlines()) + 0.18 for words in captions)
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(12, height), width_ratios=[8, 5], layout="constrained"
    )
    draw_bars(left, shown, [entry["speed"] for entry in shown])
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    left.set_yticks(range(len(shown)), captions, fontsize=TEXT)
    left.invert_yaxis()
    left.set_title("tokens/s per GPU, padding not counted", fontsize=TEXT + 1)
    for place, entry in enumerate(shown):
        padded = entry["useful_tokens_per_second"] < 0.99 * entry["tokens_per_second_per_gpu"] * processes(entry)
        mfu = f"   MFU {100 * entry['mfu']:.1f} %" if entry.get("mfu") and not padded else ""
        write(left, entry["speed"], place, f"{entry['speed']:,.0f}{mfu}", entry["speed"] / shown[0]["speed"], entry)
    draw_memory(right, shown)
    for axes in (left, right):
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks([])  # each bar has its number
        axes.margins(x=0)
    first = reports[0]
    note = ", compiled unless noted" if first.get("device") == "cuda" else ""
    figure.suptitle(f"{shape} on {first['gpus']} × {first.get('gpu') or 'CPU process'}{note}", fontsize=TEXT + 2)
    diamond = Line2D([], [], color="black", marker="D", linestyle="", label="peak while the model is set up")
    marks = [Patch(color=OURS, label="this notebook"), Patch(color=PEERS, label="peers"), diamond]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False, fontsize=TEXT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def draw_bars(axes: Any, shown: list[dict[str, Any]], values: list[float]) -> None:
    """A bar per candidate in the colour of its side."""
    colours = [OURS if entry["settings"]["kind"] == "ours" else PEERS for entry in shown]
    axes.barh(range(len(shown)), values, color=colours, height=0.62)


def write(axes: Any, value: float, place: int, words: str, share: float, entry: dict[str, Any]) -> None:
    """Write the number of a bar inside at its end, or beside it where it is too short."""
    inside, ours = share > 0.5, entry["settings"]["kind"] == "ours"
    axes.annotate(
        words, (value, place), xytext=(-8 if inside else 8, 0), textcoords="offset points", va="center",
        ha="right" if inside else "left", color="white" if inside and ours else "black", fontsize=TEXT,
    )  # fmt: skip


def draw_memory(axes: Any, shown: list[dict[str, Any]]) -> None:
    """Peak in training as bars, the peak before it as diamonds."""
    axes.set_title("peak memory per GPU, GiB", fontsize=TEXT + 1)
    peaks = [entry.get("peak_gib") or 0 for entry in shown]
    draw_bars(axes, shown, peaks)
    for place, (entry, peak) in enumerate(zip(shown, peaks, strict=True)):
        if not peak:
            write(axes, 0, place, "not measured", 0, entry)
            continue
        write(axes, peak, place, f"{peak:.1f}", peak / max(peaks), entry)
        if (before := entry.get("init_peak_gib")) is not None:
            axes.plot(before, place, "D", color="black", markersize=7, markeredgecolor="white")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="")
    parser.add_argument("--all", action="store_true", help="all settings of each candidate, not only the fastest")
    options = parser.parse_args()
    draw([json.loads(path.read_text()) for path in options.results], options.out, options.shape, options.all)


if __name__ == "__main__":
    main()
