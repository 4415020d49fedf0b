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
from matplotlib.ticker import MaxNLocator

OURS, PEERS = "#0b6e4f", "#9aa5b1"
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
    """What was measured at a shape, the fastest first; of each candidate the fastest settings, or all of them."""
    found = [
        entry | {"speed": speed(entry)}
        for report in reports
        for entry in report["candidates"]
        if entry["status"] == "ok" and entry.get("step_ms") and entry["settings"]["shape"] == shape
    ]
    found.sort(key=lambda entry: -entry["speed"])
    first: dict[Any, dict[str, Any]] = {}
    for entry in found:
        first.setdefault((entry["name"], entry["grid"], entry["label"] if everything else ""), entry)
    return list(first.values())


def speed(entry: dict[str, Any]) -> float:
    """Tokens/s per GPU, padding not counted."""
    return entry["useful_tokens_per_second"] / processes(entry)


def processes(entry: dict[str, Any]) -> int:
    """GPUs that the candidate used."""
    return entry["settings"]["tp"] * entry["settings"]["dp"]


def caption(entry: dict[str, Any]) -> str:
    """Lines for a bar: what it is, and its settings."""
    settings = textwrap.fill(f"tp × dp {entry['grid']}, {entry['label'].replace(',', ', ').replace('  ', ' ')}", 44)
    return f"{TITLES.get(entry['name'], entry['name'])}\n{settings}"


def draw(reports: list[dict[str, Any]], path: Path, shape: str = "", everything: bool = False) -> None:
    """Write the figure as a PNG.

    Raises:
        ValueError: if nothing was measured at the shape.
    """
    shape = shape or reports[0]["shape"]
    shown = entries(reports, shape, everything)
    if not shown:
        raise ValueError(f"no measurement at the shape {shape!r}")
    size = (13, 2 + 0.68 * len(shown))
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=size, width_ratios=[3, 2], layout="constrained")
    places = range(len(shown))
    colours = [OURS if entry["settings"]["kind"] == "ours" else PEERS for entry in shown]
    left.barh(places, [entry["speed"] for entry in shown], color=colours, height=0.62)
    left.set_yticks(places, [caption(entry) for entry in shown], fontsize=10)
    left.invert_yaxis()
    left.set_title("tokens/s per GPU (padding not counted)", fontsize=12)
    for place, entry in enumerate(shown):
        padded = entry["useful_tokens_per_second"] < 0.99 * entry["tokens_per_second_per_gpu"] * processes(entry)
        mfu = f"   MFU {100 * entry['mfu']:.1f} %" if entry.get("mfu") and not padded else ""
        left.annotate(f" {entry['speed']:,.0f}{mfu}", (entry["speed"], place), va="center", fontsize=10)
    draw_memory(right, shown)
    most, memory = max(e["speed"] for e in shown), max([e.get("peak_gib") or 0 for e in shown] + [1e-9])
    left.set_xlim(0, most * 1.6)  # room for the numbers beside the bars
    right.set_xlim(0, memory * 1.25)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    first = reports[0]
    figure.suptitle(f"{shape} on {first['gpus']} × {first.get('gpu') or 'CPU process'}", fontsize=13)
    diamond = Line2D([], [], color="black", marker="D", linestyle="", label="peak while the model is set up")
    marks = [Patch(color=OURS, label="this notebook"), Patch(color=PEERS, label="peers"), diamond]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_memory(axes: Any, shown: list[dict[str, Any]]) -> None:
    """Peak in training as bars, the peak before it as diamonds."""
    axes.set_title("peak memory per GPU, GiB", fontsize=12)
    for place, entry in enumerate(shown):
        peak, before = entry.get("peak_gib"), entry.get("init_peak_gib")
        if peak is None:
            axes.annotate(" not measured", (0, place), va="center", fontsize=10, color="#555555")
            continue
        axes.barh(place, peak, color=OURS if entry["settings"]["kind"] == "ours" else PEERS, height=0.62)
        axes.annotate(f" {peak:.1f}", (max(peak, before or 0), place), va="center", fontsize=10,
                      xytext=(6, 0), textcoords="offset points")  # fmt: skip
        if before is not None:
            axes.plot(before, place, "D", color="black", markersize=6, markeredgecolor="white")


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
