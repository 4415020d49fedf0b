"""What the model makes of the user's prompts while it trains: written by the engine that trains it, to `samples.jsonl`.

Each token is that of the highest logit; of equal ones, the lowest id. So in fp32 the text is the same on every grid,
and that of `generate(do_sample=False)` after the export. In bf16 grids round differently, and close calls may differ.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.module_inject.layers import VocabParallelLinear
from torch.utils.data import DataLoader

from tp2d_helpers import heartbeat
from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chat_tokens import asking, stop_token
from tp2d_helpers.data.packing import cumulative_lengths
from tp2d_helpers.data.text_tokens import TextEncoder
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.training.metrics import append, keep_until, read_metrics

NEW_TOKENS = 24  # that a prompt is continued by, at most
FILE = "samples.jsonl"


def encode_prompts(settings: dict[str, Any], chats: bool) -> dict[str, list[int]]:
    """The tokens of each of the `sample_prompts`: of a user's turn if the data is chats, else of the text as it is.

    Args:
        settings: as `Config.model_dump()` gives them.

    Raises:
        ConfigError: if one and what is generated don't fit in a sample, it has no tokens, or the chat template refuses.
    """
    names = [line for line in settings["sample_prompts"].splitlines() if line.strip()]
    if not names:
        return {}
    tokenizer, encoded = _tokenizer(settings), {}
    for prompt in names:
        ids = encoded[prompt] = _encode(tokenizer, prompt, chats, settings["chat_date"])
        if not 0 < len(ids) <= settings["seq_length"] - NEW_TOKENS:
            raise ConfigError(
                f"sample_prompts: {prompt[:40]!r} has {len(ids)} tokens; must have at least 1, and with the "
                f"{NEW_TOKENS} that are generated fit in seq_length, which is {settings['seq_length']}"
            )
    return encoded


def _tokenizer(settings: dict[str, Any]) -> transformers.PreTrainedTokenizerBase:
    return load_tokenizer(settings["model_name"], settings["trust_remote_code"], settings["chat_template"])


def _encode(tokenizer: transformers.PreTrainedTokenizerBase, prompt: str, chats: bool, date: str) -> list[int]:
    """As the data is: a document's beginning, or a conversation that asks for an answer."""
    encoder = TextEncoder(tokenizer)
    if not chats:
        return [*encoder.begin, *next(encoder.places([prompt])).ids.tolist()]
    try:
        text = asking(tokenizer, prompt, date)
    except BadRow as error:
        raise ConfigError(f"sample_prompts: {prompt[:40]!r}: {error}") from error
    return next(encoder.places([text])).ids.tolist()


class Samples:
    """Continues the prompts of a run and writes the texts. Without prompts it does nothing."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, loader: DataLoader, config: dict[str, Any], run_dir: Path, done: int
    ) -> None:
        """Begin after `done` steps: texts of later steps, left by a run that was cut off, are dropped."""
        self.engine, self.path = engine, Path(run_dir, FILE)
        self.shape = config["batch_size_per_gpu"], config["seq_length"]
        self.apart = loader.dataset.packing == "documents"
        chats = loader.dataset.mask is not None
        self.prompts = encode_prompts(config, chats)
        self.tokenizer = _tokenizer(config) if self.prompts else None
        self.turn_end = stop_token(self.tokenizer) if self.prompts and chats else None
        if dist.get_rank() == 0 and self.path.exists():
            keep_until(self.path, done)

    def write(self, step: int) -> None:
        """Continue the prompts and add the texts to the file: `step`, `prompt`, `text`. Collective over the world."""
        if not self.prompts:
            return
        heartbeat.mark(f"samples of step {step}")
        answers = generate(self.engine, list(self.prompts.values()), self.shape, self.apart)
        if dist.get_rank() == 0:
            texts = [self._text(answer) for answer in answers]
            append(self.path, [dict(step=step, prompt=p, text=t) for p, t in zip(self.prompts, texts, strict=True)])

    def _text(self, answer: list[int]) -> str:
        settings = getattr(self.engine.module, "generation_config", None)
        stops = getattr(settings, "eos_token_id", None)
        stops = {self.tokenizer.eos_token_id, self.turn_end, *(stops if isinstance(stops, list) else [stops])}
        tokens = itertools.takewhile(lambda token: token not in stops, answer)
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


@torch.no_grad()
def generate(
    engine: deepspeed.DeepSpeedEngine, prompts: list[list[int]], shape: tuple[int, int], apart: bool = False
) -> list[list[int]]:
    """The `NEW_TOKENS` that follow each prompt, the same on all ranks of a TP group. Collective over the world.

    Every forward pass has the shape and arguments of the evaluation's, so that nothing is compiled again. A token never
    sees what stands to its right. No text ends early: with ZeRO 3, all ranks gather weights equally often.

    Args:
        shape: (samples, seq) of a micro-batch.
        apart: whether batches are of packed documents; here each is a sample of its own.
    """
    found: list[list[int]] = []
    unused = torch.ones((), device=engine.device)
    positions = torch.arange(shape[1]).repeat(shape[0], 1)
    packed = dict(position_ids=positions, cu_seq_lens_q=cumulative_lengths(positions)) if apart else {}
    packed = {name: tensor.to(engine.device) for name, tensor in packed.items()}
    engine.eval()
    for first in range(0, len(prompts), shape[0]):
        part = prompts[first : first + shape[0]]
        tokens = torch.zeros(shape, dtype=torch.long, device=engine.device)
        for row, prompt in zip(tokens, part, strict=False):
            row[: len(prompt)] = torch.tensor(prompt)
        rows = torch.arange(len(part), device=engine.device)
        ends = torch.tensor([len(prompt) for prompt in part], device=engine.device)
        for new in range(NEW_TOKENS):
            logits = engine(input_ids=tokens, **packed, num_items_in_batch=unused, use_cache=False).logits
            tokens[rows, ends + new] = highest(logits[rows, ends + new - 1], engine.module.get_output_embeddings())
        found += [row[end:][:NEW_TOKENS] for row, end in zip(tokens.tolist(), ends.tolist(), strict=False)]
    engine.train()
    return found


def highest(logits: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
    """The id of the highest logit, the lowest of equal ones. Collective over the TP group if the head is divided.

    Args:
        logits: [samples, V/t], of this rank's part of the vocabulary.
        head: the model's last layer.
    """
    parallel = isinstance(head, VocabParallelLinear)
    first, group = (head.vocab_start_index, head.mp_group) if parallel else (0, None)
    top = logits.amax(-1, keepdim=True)
    if parallel:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    ids = first + torch.arange(logits.shape[-1], device=logits.device)
    lowest = torch.where(logits == top, ids, torch.iinfo(torch.long).max).amin(-1)
    if parallel:
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=group)
    return torch.where(lowest == torch.iinfo(torch.long).max, 0, lowest)  # NaN equals nothing


def read_samples(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The texts of a run so far, in order: `step`, `prompt`, `text`."""
    return read_metrics(Path(run_dir, FILE))
