"""Attention that keeps the documents of a sample apart, by a kernel for sequences of any lengths.

`transformers` masks what belongs to another document (`masking_utils`): a mask of seq × seq, which flash attention
can't take. `torch.nn.attention.varlen.varlen_attn` takes all documents of a micro-batch end to end, and is told where
each begins. That is what `transformers` hands to this module's attention function in place of a mask.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

NAME = "documents"  # of the attention function, for `set_attn_implementation`
HALF = (torch.bfloat16, torch.float16)  # what flash attention computes in
WIDEST = 256  # head
# What attention functions are given that changes nothing here, whatever it is.
HARMLESS = {"position_ids", "position_embeddings", "use_cache", "past_key_values", "cache_position", "layer_idx",
            "num_items_in_batch", "return_dict", "logits_to_keep", "is_causal"}  # fmt: skip

_lengths: torch.Tensor | None = None  # of the micro-batch whose forward pass is under way


def set_lengths(cumulative_lengths: torch.Tensor | None) -> None:
    """Say where the documents of the next forward pass begin; see `packing.cumulative_lengths`."""
    global _lengths
    if cumulative_lengths is not None:  # as many as a micro-batch happens to have: nothing is compiled again for that
        torch._dynamo.maybe_mark_dynamic(cumulative_lengths, 0)
    _lengths = cumulative_lengths


def lengths(batch_size: int, q_length: int, device: torch.device, **_: Any) -> torch.Tensor:
    """A mask function of `transformers`: int32 [documents + 1]. Unless told otherwise, a sample is a document."""
    if _lengths is not None:
        return _lengths
    return torch.arange(0, (batch_size + 1) * q_length, q_length, dtype=torch.int32, device=device)


def number_documents(position_ids: torch.Tensor) -> torch.Tensor:
    """int64 [samples, seq], the number of each position's document, from positions that begin at 0 in each.

    As `masking_utils.find_packed_sequence_indices`, without the question to the GPU whether there are several.
    """
    return (position_ids == 0).cumsum(-1)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of `transformers`: causal, within documents.

    Args:
        query, key, value: [samples, heads, seq, head], of which key and value may have fewer heads.
        attention_mask: what `lengths` returns.
        sliding_window: how many positions each sees, its own included.

    Returns:
        ([samples, seq, heads, head], None)
    """
    samples, _, seq, _ = query.shape
    parts = [tensor.transpose(1, 2).flatten(0, 1).contiguous() for tensor in (query, key, value)]
    window = (sliding_window - 1 if sliding_window else -1, 0)  # positions to the left, and to the right
    compute = _kernel() if query.is_cuda else masked
    output = compute(*parts, attention_mask, attention_mask, seq, seq, scale=scaling, window_size=window)
    return output.unflatten(0, (samples, seq)), None


@functools.cache
def _kernel() -> Callable[..., torch.Tensor]:
    """PyTorch's function. Up to 2.11 it takes fewer heads of keys and values unasked."""
    from torch.nn.attention.varlen import varlen_attn  # imports a compiler

    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if asks else varlen_attn


def masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative_lengths: torch.Tensor,
    *_: Any,
    scale: float | None,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What `varlen_attn` computes, by a mask of tokens × tokens: for checks, where there is no GPU."""
    places = torch.arange(len(query), device=query.device)
    document = torch.searchsorted(cumulative_lengths, places, right=True)
    distance = places[:, None] - places
    seen = (document[:, None] == document) & (distance >= 0)
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=gqa)
    return output[0].transpose(0, 1)


def skip_search_for_packed_samples(model: torch.nn.Module) -> None:
    """Tell `transformers` that to attention a sample is one sequence, unless the batch has position ids.

    It would look for places where positions start again, and for that ask the GPU in each forward pass, though it
    numbered them itself; and where it can't ask, in a graph, use a mask in place of flash attention's own. A batch of
    packed documents says where they begin, in `cu_seq_lens_q`.
    """
    search, whole = masking_utils.find_packed_sequence_indices, model.forward

    @functools.wraps(whole)
    def forward(*args: Any, cu_seq_lens_q: torch.Tensor | None = None, **batch: Any) -> Any:
        """The model's own output."""
        given = batch.get("position_ids") is not None or len(args) > 2
        find = search if given else lambda position_ids: None
        masking_utils.find_packed_sequence_indices = find if cu_seq_lens_q is None else number_documents
        set_lengths(cu_seq_lens_q)
        return whole(*args, **batch)

    model.forward = forward


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lengths)
