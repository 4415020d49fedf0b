"""Does a model keep the documents of a sample apart, and by what? Tried on the CPU before a GPU is taken.

With packing "documents", a document's tokens must not depend on what else is in their sample. `transformers` does that
by a mask, made from positions that begin anew. State spaces, linear attention and convolutions know nothing of it, nor
does code that numbers the positions itself: here that shows, and they are refused.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.data.packing import cumulative_lengths, positions_of
from tp2d_helpers.model.rehearsal import quiet
from tp2d_helpers.model.sharding import meta_model
from tp2d_helpers.model.small import small_model
from tp2d_helpers.speed import documents
from tp2d_helpers.speed.agreement import first_trouble

SIZES = (6, 7)  # tokens of the two documents that are tried
TRIAL = "documents-trial"


def keep_documents_apart(model: torch.nn.Module) -> None:
    """Let a model use `documents.attend` on GPUs, where that is right; else a mask does it. Collective.

    Before DeepSpeed has the model: with ZeRO 3 it puts functions of its own in the place of PyTorch's.
    """
    if not torch.cuda.is_available():
        return
    old = torch.cuda.get_device_capability() < (8, 0)
    trouble = first_trouble(
        "flash attention needs an Ampere GPU or a newer one" if old else why_masked(model.config, model.dtype)
    )
    if not trouble:
        model.set_attn_implementation(documents.NAME)
    elif dist.get_rank() == 0:
        print(f"documents are kept apart by a mask: {trouble}", flush=True)


def why_masked(hf_config: transformers.PretrainedConfig, dtype: torch.dtype) -> str:
    """Why `documents.attend` can't take the place of a mask; "" if it can. By a pass without storage."""
    if dtype not in documents.HALF:
        return "flash attention computes in bf16 or fp16"
    trial = Trial()
    AttentionInterface.register(TRIAL, trial.attend)
    AttentionMaskInterface.register(TRIAL, trial.lengths)
    try:
        model = meta_model(copy.deepcopy(hf_config), dtype).train()
        if model.config.get_text_config()._attn_implementation != "sdpa":
            return f"the class has attention of its own ({model.config._attn_implementation})"
        model.set_attn_implementation(TRIAL)
        with quiet(), _numbered():
            ids = torch.zeros(1, sum(SIZES), dtype=torch.long, device="meta")
            model(input_ids=ids, position_ids=ids, use_cache=False)
    except Exception as error:
        return reason(error)
    return trial.trouble()


class Trial:
    """Stands in for `documents.attend` and notes what it is asked for."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}
        self.masked, self.attended = set(), set()  # the windows that masks are asked for, and attention
        self.handed_out = torch.zeros(len(SIZES) + 1, dtype=torch.int32, device="meta")

    def trouble(self) -> str:
        """What `documents.attend` can't do of that; "" if nothing."""
        if not self.attended:
            return "the class doesn't ask for an attention function"
        if self.masked != self.attended:
            return f"masks have windows of {self.masked}, attention of {self.attended}"
        return ", ".join(self.found)

    def lengths(self, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> torch.Tensor:
        """For `documents.lengths`."""
        self.masked.add(local_size)
        self.found.update({"a mask of its own": None} if use_vmap else {})
        return self.handed_out

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: Any, scaling: float | None = None, sliding_window: int | None = None, **more: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """For `documents.attend`."""
        self.attended.add(sliding_window)
        head = query.shape[-1]
        causal = more.get("is_causal") is not False and getattr(module, "is_causal", True)
        wrong = {
            "a mask of its own": attention_mask is not self.handed_out,
            "attention that is not causal": not causal,
            f"heads of {head}": head % 8 or head > documents.WIDEST or value.shape[-1] != head,
            f"attention in {query.dtype}": {query.dtype, key.dtype, value.dtype} - set(documents.HALF),
        }
        given = {name: None for name, it in more.items() if name not in documents.HARMLESS and _counts(it)}
        self.found.update({name: None for name, applies in wrong.items() if applies} | given)
        return query.new_empty(*query.transpose(1, 2).shape[:3], value.shape[-1]), None


def _counts(value: Any) -> bool:
    """Whether an argument asks for anything."""
    return isinstance(value, torch.Tensor) or bool(value)


def check_apart(hf_config: transformers.PretrainedConfig, precision: str, use_gpu: bool) -> str:
    """What keeps documents apart in this model, in words. About a second on a CPU.

    On random weights, changing the first of two documents must leave the second's logits as they are, and they must
    be those of the document by itself. If the run will use `documents.attend`, it must give the same.

    Raises:
        ConfigError: if not.
    """
    why = why_masked(hf_config, torch.float32 if precision == "fp32" else torch.bfloat16) if use_gpu else "CPU"
    refusal = (
        f"packing = 'documents': {hf_config.model_type!r} can't keep the documents of a sample apart ({{}}). "
        "Take packing = False, or True if documents may be looked at together"
    )
    try:
        with quiet(), _numbered():
            model = small_model(hf_config).eval()
            trouble, by_mask = _mixed(model)
            if not trouble and not why:
                model.set_attn_implementation(documents.NAME)
                trouble, by_kernel = _mixed(model)
                if not trouble and not _close(by_kernel, by_mask):
                    trouble = "flash attention gives other logits than a mask"
    except Exception as error:
        raise ConfigError(refusal.format(reason(error))) from error
    if trouble:
        raise ConfigError(refusal.format(trouble))
    return "by flash attention" if not why else "by a mask" + f" ({why})" * use_gpu


@torch.no_grad()
def _mixed(model: torch.nn.Module) -> tuple[str, torch.Tensor]:
    """(how a document's logits depend on another one in the sample, "" if they don't; its logits)."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    first, other, second = (torch.randint(vocabulary, (1, size), generator=draw) for size in (SIZES[0], *SIZES))
    position_ids = torch.from_numpy(positions_of(SIZES))[None]

    def logits(*parts: torch.Tensor) -> torch.Tensor:
        """[tokens, vocabulary] of the second document, which the parts, [1, size] each, end with."""
        ids = torch.cat(parts, 1)
        positions = position_ids[:, -ids.shape[1] :]
        documents.set_lengths(cumulative_lengths(positions))
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, -SIZES[1] :]

    try:
        found, changed, alone = logits(first, second), logits(other, second), logits(second)
    finally:
        documents.set_lengths(None)
    trouble = "" if _close(alone, found) else "by itself one has other logits"
    return trouble if _close(changed, found) else "changing one changes another's logits", found


def _close(logits: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether they differ by rounding alone, which of experts depends on all tokens given to one; zeros say nothing."""
    return bool(others.abs().max() > 0 and (logits - others).abs().max() <= 1e-5 * others.abs().max())


def _numbered() -> Any:
    """Positions are looked at, without a question to the device."""
    return mock.patch.object(masking_utils, "find_packed_sequence_indices", documents.number_documents)
