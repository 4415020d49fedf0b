"""The model card of an export: what was trained, on what, how, and what came of it, from the run's folder alone."""

from __future__ import annotations

import importlib.metadata
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tp2d_helpers.checkpoint.files import read_json, read_json_lines
from tp2d_helpers.config import Config
from tp2d_helpers.demo import BUILT, display_name

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Settings that have lines of their own, or don't decide what is trained.
LEFT_OUT = {"model_name", "dataset_name", "tp_size", "dp_size", "zero_stage", "precision", "use_gpu", "log_interval",
            "global_batch_size",  # handed on as 0: what three others give
            "eval_interval", "sample_prompts", "checkpoint_interval", "checkpoints_to_keep", "keep_checkpoints_by",
            "async_checkpoint", "trust_checkpoint", "trust_remote_code", "storage_path", "experiment_name",
            "trackers", "max_failures", "min_dp_size", "hang_timeout_seconds", "cluster_wait_seconds"}  # fmt: skip


def model_card(checkpoint: Path, model_name: str, part_of: str = "") -> ModelCard:
    """The card for the model of a checkpoint. It has no local path: of a file or folder it says the name.

    Args:
        checkpoint: a folder `checkpoint_<n>` in the run's folder. What isn't there isn't told.
        model_name: the model that training began with.
        part_of: the kind of that model, if its text model alone was trained.
    """
    manifest, settings = read_json(checkpoint / "rank_0.json"), run_settings(checkpoint)
    records = read_json_lines(checkpoint.parent / "metrics.jsonl")
    records = [record for record in records if record["step"] <= manifest.get("step", 0)]
    model, data = shown(model_name), shown(settings.get("dataset_name", ""))
    hub_dataset = data.partition(":")[0]  # without its split
    about = ModelCardData(
        base_model=hub_id(model_name),
        datasets=[hub_dataset] if HUB_ID.fullmatch(hub_dataset) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
    )
    sections = [
        f"# {settings.get('experiment_name', model)}",
        _what(model, data, bool(BUILT.search(model_name)), manifest, records),
        _text_alone(model, part_of, bool(settings.get("lora_rank"))) if part_of else "",
        _table("Results", _results(manifest, records)),
        _table("Grid", _grid(manifest)),
        _table("Settings", {name: shown(value) for name, value in settings.items() if _counts(name, value)}),
        _table("Versions", settings.get("versions", {})),
        "The licences of the model that training began with and of the data apply.",
    ]
    return ModelCard("---\n" + about.to_yaml() + "\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def hub_id(model_name: str) -> str | None:
    """A model's id on the hub; None for a folder."""
    return model_name if HUB_ID.fullmatch(model_name) and not Path(model_name).is_dir() else None


def run_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings that a checkpoint was trained by; empty if neither it nor its run's folder has them."""
    return read_json(checkpoint / "rank_0.json").get("settings") or read_json(checkpoint.parent / "config.json")


def _counts(name: str, value: Any) -> bool:
    return name in Config.model_fields and name not in LEFT_OUT and value != ""


def versions() -> dict[str, str]:
    """Of the libraries that the result of a run depends on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed", "ray")}


def shown(value: Any) -> Any:
    """A setting without local paths: of a model, file or folder the name, of the demo's cached models the shape."""
    if not isinstance(value, str):
        return value
    return ",".join(display_name(part) for part in value.split(","))


def _what(model: str, data: str, random: bool, manifest: dict[str, Any], records: list[dict[str, Any]]) -> str:
    begun = f"Trained from random weights in the shape {model!r}" if random else f"Trained from {model}"
    on = f" on {data}" if data else ""
    tokens = sum(record["tokens"] for record in records)
    seen = f" ({tokens:,} tokens)" if len(records) == manifest.get("step") else ""
    steps = f", for {manifest['step']:,} optimizer steps{seen}" if manifest else ""
    return f"{begun}{on}{steps}, by tensor parallelism (DeepSpeed AutoTP) and ZeRO under Ray Train."


def _text_alone(model: str, part_of: str, lora: bool) -> str:
    alone = f"The text model of {part_of} alone was trained, and is here; `AutoModelForCausalLM` loads it"
    adapter = f"The adapter fits what `load_model({model!r}, torch.bfloat16)` of `tp2d_helpers.model` loads"
    return f"{alone}. {adapter}." if lora else f"{alone}."


def _results(manifest: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, str]:
    metrics, found = manifest.get("metrics", {}), {}
    if records and records[0]["step"] == 1 and records[0]["loss"] is not None:
        found["training loss, first step"] = f"{records[0]['loss']:.4f}"
    if metrics.get("loss") is not None:
        found["training loss, last step"] = f"{metrics['loss']:.4f}"
    if (loss := metrics.get("eval_loss")) is not None:
        found["held-out loss (perplexity)"] = f"{loss:.4f} ({math.exp(loss):,.2f})"
    return found


def _grid(manifest: dict[str, Any]) -> dict[str, Any]:
    if not manifest:
        return {}
    grid = {"tensor parallel × data parallel": f"{manifest['tp_size']} × {manifest['dp_size']}"}
    return grid | {"ZeRO stage": manifest["zero_stage"], "precision": manifest.get("precision", "")}


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines]) if rows else ""
