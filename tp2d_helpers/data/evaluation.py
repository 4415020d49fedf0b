"""The loss on held-out samples: one number that is the same on every grid, to compare runs by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from tp2d_helpers import heartbeat
from tp2d_helpers.data.dataset import IGNORED
from tp2d_helpers.data.packing import collate

if TYPE_CHECKING:
    import deepspeed


def held_out_batches(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """This DP rank's batches of the samples after the training's: the held-out ones.

    All ranks get equally many batches of the training's size. Places beyond the last sample repeat it, with all labels
    ignored, so that they add nothing.
    """
    dataset, sampler = loader.dataset, loader.batch_sampler
    _, dp_size, micro_batch = sampler.shape
    for number, first in enumerate(range(sampler.samples, len(dataset), dp_size * micro_batch), start=1):
        begin = first + sampler.dp_rank * micro_batch
        places = range(begin, begin + micro_batch)
        batch = collate([dataset[min(place, len(dataset) - 1)] for place in places])
        batch["labels"][[place >= len(dataset) for place in places]] = IGNORED
        heartbeat.mark(f"evaluation, batch {number}")
        yield batch


def evaluate(engine: deepspeed.DeepSpeedEngine, loader: DataLoader, dp_group: dist.ProcessGroup) -> float:
    """Mean loss per target over all held-out samples. Collective: every rank calls it.

    The ranks add up losses and targets, and divide once, so the result does not depend on how the samples were dealt
    out. Perplexity is its exponential.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # of losses, of targets
    engine.eval()
    with torch.no_grad():
        for batch in held_out_batches(loader):
            batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
            targets = (batch["labels"][:, 1:] != IGNORED).sum()
            # Hugging Face models divide the summed loss by this: by 1 they return the sum.
            one = torch.ones((), device=engine.device)
            sums += torch.stack([engine(**batch, num_items_in_batch=one, use_cache=False).loss, targets])
    engine.train()
    dist.all_reduce(sums, group=dp_group)
    return (sums[0] / sums[1]).item()
