"""Samples → the batches of one DP rank, in an order that the seed alone decides.

An epoch is one permutation of the samples, cut into global batches; only then is a global batch dealt out to
micro-batches and DP ranks. So optimizer step k sees the same samples on any (tp, dp) grid with the same global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from tp2d_helpers import startup
from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.dataset import Packing, load_samples
from tp2d_helpers.data.packing import collate
from tp2d_helpers.data.tokens import SOURCE


class GlobalBatchSampler(Sampler[list[int]]):
    """The micro-batches of one DP rank, cut from global batches that every rank computes alike.

    Epoch e is `randperm(samples)` seeded by (seed, e). Step k takes entries [k·G, (k+1)·G) with
    G = micro_batch × dp_size × accumulation, reshaped to [accumulation, dp_size, micro_batch]; rank d takes [:, d].
    The samples after the last whole global batch are left out of the epoch: none is repeated to fill it up, as
    `DistributedSampler` would do.
    """

    def __init__(
        self, samples: int, micro_batch: int, accumulation: int, dp_rank: int, dp_size: int, seed: int
    ) -> None:
        self.samples, self.dp_rank, self.seed = samples, dp_rank, seed
        self.shape = (accumulation, dp_size, micro_batch)
        self.global_batch = accumulation * dp_size * micro_batch
        self.steps_per_epoch = samples // self.global_batch
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch, and the step in it to begin with (to resume in the middle)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self.order, self.start_step = torch.randperm(self.samples, generator=generator), start_step

    def global_batch_of(self, step: int) -> torch.Tensor:
        """Sample indices of optimizer step `step`, [accumulation, dp_size, micro_batch]."""
        return self.order[step * self.global_batch : (step + 1) * self.global_batch].view(self.shape)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.steps_per_epoch):
            yield from self.global_batch_of(step)[:, self.dp_rank].tolist()

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start_step) * self.shape[0]


def create_dataloader(
    model_name: str,
    dataset_name: str,
    seq_length: int,
    batch_size_per_gpu: int,
    dp_rank: int,
    dp_size: int,
    seed: int = 42,
    dataset_percentage: float = 10.0,
    gradient_accumulation_steps: int = 1,
    packing: Packing = True,
    debug_steps: int = 0,
    eval_samples: int = 0,
    eval_dataset_name: str = "",
    **source: Any,
) -> DataLoader:
    """Build the loader of one DP rank. It yields micro-batches; accumulation of them make a step.

    Ranks of one TP group pass the same `dp_rank` and get the same batches. A batch holds `input_ids` and `labels`,
    int64 [batch_size_per_gpu, seq_length]. No attention mask is needed: padding is on the right, where causal
    attention never looks from a real token, and its labels are ignored. With packing "documents" it also holds
    `position_ids` of the same shape, by which attention keeps documents apart, and their `cumulative_lengths`.

    Args:
        debug_steps: end an epoch after this many optimizer steps (0: after all of them).
        eval_samples: hold out so many samples for `evaluate`, of documents that training does not see.
        eval_dataset_name, source: see `load_samples`.

    Raises:
        ConfigError: if the dataset is smaller than one global batch, or can't be tokenised.
    """
    dataset = load_samples(
        model_name, dataset_name, seq_length, packing, eval_samples, eval_dataset_name, dataset_percentage,
        progress=False, **source,
    )  # fmt: skip
    accumulation, samples = gradient_accumulation_steps, dataset.samples
    sampler = GlobalBatchSampler(samples, batch_size_per_gpu, accumulation, dp_rank, dp_size, seed)
    if not sampler.steps_per_epoch:
        raise ConfigError(f"{samples} samples are fewer than one global batch of {sampler.global_batch}")
    sampler.steps_per_epoch = min(sampler.steps_per_epoch, debug_steps or sampler.steps_per_epoch)
    startup.mark("data")
    # With a generator of its own: the loader draws a number at each start, which a resumed run would have more of.
    options = dict(pin_memory=torch.cuda.is_available(), generator=torch.Generator())
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **options)


def global_batches(loader: DataLoader) -> Iterator[tuple[list[dict[str, torch.Tensor]], int]]:
    """Group the loader's micro-batches by optimizer step.

    Yields:
        (micro_batches, tokens): this rank's micro-batches of one step, and the real tokens of the global batch. Each
        micro-batch also holds `num_items_in_batch`, a float: the targets of the global batch over its number of
        micro-batches. Hugging Face models divide the summed loss by it, so that the plain mean over micro-batches and
        DP ranks, which is what DeepSpeed takes of the gradients, is the mean over all targets, however they spread.
        Every rank knows the lengths and targets of all samples, so this costs no communication.

    Raises:
        ValueError: if the epoch ends before the step to begin with: a loop over its steps would come round for ever.
    """
    sampler, dataset = loader.batch_sampler, loader.dataset
    lengths, targets_of = torch.from_numpy(dataset.lengths), torch.from_numpy(dataset.targets)
    accumulation, dp_size, _ = sampler.shape
    if sampler.start_step >= sampler.steps_per_epoch:
        raise ValueError(f"no step is left: {sampler.start_step} are done of an epoch of {sampler.steps_per_epoch}")
    batches = iter(loader)
    for step in range(sampler.start_step, sampler.steps_per_epoch):
        samples = sampler.global_batch_of(step)
        targets = targets_of[samples].sum() / (accumulation * dp_size)
        tokens = int(lengths[samples].sum())
        yield [{**next(batches), "num_items_in_batch": targets} for _ in range(accumulation)], tokens


def data_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that `create_dataloader` takes."""
    names = (*SOURCE, "seq_length", "packing", "batch_size_per_gpu", "gradient_accumulation_steps", "dp_size", "seed",
             "debug_steps", "eval_samples", "eval_dataset_name")  # fmt: skip
    return {name: config[name] for name in names}
