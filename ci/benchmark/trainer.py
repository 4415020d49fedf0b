"""What the measuring loop needs of a candidate, and the candidates that are DeepSpeed engines of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tp2d_helpers.data.dataloader import create_dataloader, global_batches
from tp2d_helpers.data.dataset import IGNORED
from tp2d_helpers.data.packing import cumulative_lengths
from tp2d_helpers.model.engine import setup_model_with_autotp
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.model.lora import adapter_parameters
from tp2d_helpers.planning.traffic import state_bytes
from tp2d_helpers.train import train_step

ROOT = Path(__file__).resolve().parents[2]
Batch = dict[str, torch.Tensor]


@dataclass
class Trainer:
    """A model on its devices, ready to train."""

    config: transformers.PretrainedConfig
    dp_rank: int
    step: Callable[[list[Batch]], torch.Tensor]  # one optimizer step; this rank's mean loss, on its device
    update: tuple[Any, str]  # an object and the name of its method that ends with the optimizer's update
    norm: Callable[[], torch.Tensor | float | None]  # of the newest step's gradients, before clipping
    state_bytes: float  # weights, masters and moments on this rank: what must be there before the first step
    adapters: int = 0  # parameters of LoRA's, which alone are trained


def engine_trainer(job: dict[str, Any], rank: int) -> Trainer:
    """This package's engine, with the settings of the job."""
    config = dict(
        model_name=job["model"], tp_size=job["tp"], dp_size=job["dp"], zero_stage=job["zero"],
        batch_size_per_gpu=job["micro_batch"], gradient_accumulation_steps=job["accumulation"],
        seq_length=job["seq"], activation_checkpointing=job["activation_checkpointing"],
        precision="fp8" if job["precision"] == "fp8" else "auto",
        gradient_dtype=job["gradients"] if torch.cuda.is_available() and not job["lora_rank"] else "auto",
        packing="documents" if job.get("packing") == "documents" else True,
        optimizations=job["optimizations"], learning_rate=job.get("learning_rate", 1e-5), weight_decay=0.01,
        max_grad_norm=1.0, seed=42,
        lora_rank=job["lora_rank"], lora_alpha=32.0, lora_dropout=0.0, lora_targets="all-linear",
    )  # fmt: skip
    engine, *_, dp_rank = setup_model_with_autotp(
        job["model"], job["tp"], job["dp"], rank, job["tp"] * job["dp"], config
    )
    engine.train()
    model = ModelFacts.read(job["model"])
    shard = model.shard(job["tp"])
    trained = shard.adapters(job["lora_rank"]) if job["lora_rank"] else shard.parameters
    held = state_bytes(trained, job["dp"], job["zero"])
    frozen = 2 * shard.parameters if job["lora_rank"] else 0
    return Trainer(
        config=model.config,
        dp_rank=dp_rank,
        step=lambda micro_batches: train_step(engine, micro_batches),
        update=(engine, "step"),
        norm=engine.get_global_grad_norm,
        state_bytes=frozen + held["weights"] + held["masters and moments"],
        adapters=adapter_parameters(model.meta, config),
    )


def batches(job: dict[str, Any], trainer: Trainer) -> Iterator[tuple[list[Batch], int]]:
    """Endless (micro-batches of this rank for one optimizer step, real tokens of the global batch)."""
    return text_batches(job, trainer.dp_rank) if job["text"] else random_batches(job, trainer)


def random_batches(job: dict[str, Any], trainer: Trainer) -> Iterator[tuple[list[Batch], int]]:
    """Tokens drawn from the whole vocabulary; sample i of step k is the same on every grid.

    With the job's packing "documents", the same tokens are taken for documents of about an eighth of a sample.
    """
    accumulation, dp, micro_batch, seq = job["accumulation"], job["dp"], job["micro_batch"], job["seq"]
    generator = torch.Generator().manual_seed(0)
    shape = (accumulation, dp, micro_batch, seq)
    targets = torch.tensor(float(micro_batch * (seq - 1)))
    while True:
        ids = torch.randint(trainer.config.vocab_size, shape, generator=generator)[:, trainer.dp_rank]
        ids = ids.pin_memory() if torch.cuda.is_available() else ids
        # As the notebook's loader: with it, the mean over micro-batches is the mean over all targets.
        found = [dict(input_ids=x, labels=x, num_items_in_batch=targets) for x in ids]
        if job.get("packing") == "documents":
            positions = document_positions(shape, generator)
            parts = zip(found, positions[:, trainer.dp_rank], strict=True)
            found = [batch | as_documents(batch["labels"], at) for batch, at in parts]
            count = (positions != 0).sum() / (accumulation * dp)
            found = [batch | {"num_items_in_batch": count} for batch in found]
        yield found, ids.numel() * dp


def document_positions(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """int64 of this shape: positions in documents that end after any token, an eighth of a sample long on average."""
    seq = shape[-1]
    begins = torch.rand(shape, generator=generator) < 8 / seq
    begins[..., 0] = True
    places = torch.arange(seq).expand(shape)
    return places - places.where(begins, 0).cummax(-1).values


def as_documents(labels: torch.Tensor, positions: torch.Tensor) -> Batch:
    """What a micro-batch of documents has besides its tokens."""
    batch = dict(labels=labels.where(positions > 0, IGNORED), position_ids=positions.contiguous())
    batch["cu_seq_lens_q"] = cumulative_lengths(positions)
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if torch.cuda.is_available() else batch


def text_batches(job: dict[str, Any], dp_rank: int) -> Iterator[tuple[list[Batch], int]]:
    """Packed text by the package's own loader, epoch after epoch."""
    loader = create_dataloader(
        job["model"], job["text"], job["seq"], job["micro_batch"], dp_rank, job["dp"], dataset_percentage=100.0,
        gradient_accumulation_steps=job["accumulation"],
    )  # fmt: skip
    epoch = 0
    while True:
        loader.batch_sampler.set_epoch(epoch)
        yield from global_batches(loader)
        epoch += 1
