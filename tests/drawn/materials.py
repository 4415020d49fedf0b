"""What a drawn combination is trained with, a model and data; and what `preflight` says of its settings."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import grid
import tiny
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from transformers import AutoModelForCausalLM, PretrainedConfig

from tp2d_helpers.cache import build_once, cache_dir
from tp2d_helpers.checkpoint.run_folder import last_step
from tp2d_helpers.checkpoint.settings import continue_run, record_run
from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.demo import demo_documents, train_tokenizer
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.preflight import checks
from tp2d_helpers.preflight.batch import choose_batch, fit_batch
from tp2d_helpers.preflight.data import check_data
from tp2d_helpers.preflight.folder import check_checkpoints
from tp2d_helpers.preflight.plan import settle
from tp2d_helpers.speed.optimizations import chosen_optimizations
from tp2d_helpers.training.schedule import check_schedule
from tp2d_helpers.training.trackers import check_trackers

RESOURCES = {"CPU": 64.0}  # of Ray's


@functools.lru_cache(maxsize=4)
def model_of(shape: str, chats: bool) -> str:
    """The folder of a model that transformers can train. Raises whatever shows that it can't."""
    fields = json.loads(shape)
    folder = tiny.family(**fields)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(24).view(2, 12)
    found = model(input_ids=ids, labels=ids, use_cache=False).loss
    found.backward()
    if not torch.isfinite(found):
        raise ValueError("its loss is not finite")
    return str(_speaker(folder) if chats else folder)


def _speaker(model: Path) -> Path:
    """The model with ChatML's tokens and template."""

    def build(folder: Path) -> None:
        """A copy, and another tokenizer."""
        shutil.copytree(model, folder, dirs_exist_ok=True)
        fast = train_tokenizer(demo_documents())
        fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        fast.chat_template = (grid.ROOT / "tests" / "data" / "templates" / "chatml.jinja").read_text()
        fast.save_pretrained(folder)

    return build_once(model.with_name(f"{model.name}-chatml"), build)


@functools.cache
def data_of(kind: str) -> str:
    """The demo's text, or a file of texts or chats from two words to more than a sample."""
    if kind == "demo":
        return kind
    draw, words = random.Random(0), " ".join(demo_documents()[:20]).split()

    def text(most: int) -> str:
        """Few words more often than many."""
        begin = draw.randrange(len(words) - most)
        return " ".join(words[begin : begin + int(2 * (most / 2) ** draw.random())])

    def chat() -> list[dict[str, str]]:
        """Of one to three answers."""
        turns = [
            {"role": role, "content": text(20)} for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")
        ]
        return [{"role": "system", "content": "Be brief."}] * (draw.random() < 0.3) + turns

    rows = [{"messages": chat()} if kind == "chats" else {"text": text(100)} for _ in range(200)]
    path = cache_dir() / f"drawn-{kind}.jsonl"
    if not path.exists():
        scratch = Path(tempfile.mkdtemp(dir=cache_dir())) / path.name
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))
        scratch.rename(path)
    return str(path)


def _once(function: Callable) -> Callable:
    """It is asked of the same model at the same tp_size for each grid that is drawn for it. Errors are kept, too."""
    found: dict[tuple[str, int, str], Any] = {}

    def ask(hf_config: PretrainedConfig, tp_size: int = 1, *more: Any) -> Any:
        names = ("optimizations", "zero_stage", "activation_checkpointing", "lora_rank", "lora_targets")
        asked = [settings.get(name) for settings in more if isinstance(settings, dict) for name in names]
        key = hf_config.to_json_string(use_diff=False), tp_size, str(asked)
        if key not in found:
            try:
                found[key] = function(hf_config, tp_size, *more)
            except ConfigError as error:
                found[key] = error
        if isinstance(found[key], ConfigError):
            raise found[key]
        return found[key]

    return ask


REHEARSE, PROVE = _once(checks.rehearse), _once(checks.prove)


def accept(settings: dict[str, Any]) -> Config:
    """What `preflight` checks and settles once it is connected, for workers on CPUs, nothing of the cluster.

    Raises:
        ConfigError: if it refuses.
    """
    with mock.patch.object(CPU_Accelerator, "is_fp16_supported", lambda self: True):  # as `run_grid` has it
        given, _ = settle(make_config(**settings), RESOURCES)
        checks.check_resilience(given)
        config = fit_batch(continue_run(given.change(precision=checks.settled_precision(given, RESOURCES))))
        checks.check_precision(given, RESOURCES)
    model = ModelFacts.read(config.model_name, config.trust_remote_code)
    with mock.patch.multiple(checks, rehearse=REHEARSE, prove=PROVE):
        checks.check_lora(config, model)
        checks.check_model(config, model)
    config, _ = choose_batch(config, model, RESOURCES)
    steps, data, *_ = check_data(config, model)
    config = config.change(packing=data.packing)
    chosen_optimizations(config.model_dump(), config.use_gpu)
    check_schedule(config, last_step(config, steps))
    check_trackers(config)
    check_checkpoints(config, given, data.identity, steps)
    record_run(config, data.identity, chats=data.mask is not None)
    return config
