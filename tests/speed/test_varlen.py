"""Attention within documents by variable-length flash attention equals that by a mask, forward and backward.

The kernel needs a GPU. On a CPU a stand-in is registered for it, so that what surrounds the operator is tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from tp2d_helpers.data.packing import cumulative_lengths, positions_of
from tp2d_helpers.speed import documents
from tp2d_helpers.speed.layers import checkpoint_layers, decoder_layers

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, vocab_size=256)  # fmt: skip


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No other test sees what is put in the place of functions."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", masking_utils.find_packed_sequence_indices)
    torch._dynamo.reset()
    yield
    documents.set_lengths(None)
    torch._dynamo.reset()


def model_of(window: int | None, varlen: bool, **shape: Any) -> transformers.PreTrainedModel:
    """A Mistral with seeded weights, which keeps documents apart by a mask or by the kernel."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mistral", **{**SHAPE, **shape}, sliding_window=window)
    model = AutoModelForCausalLM.from_config(config).train()
    if varlen:
        model.set_attn_implementation(documents.NAME)
    documents.skip_search_for_packed_samples(model)
    return model


def batch_of(*rows: list[int]) -> dict[str, torch.Tensor]:
    """Samples of documents of these sizes."""
    positions = torch.stack([torch.from_numpy(positions_of(sizes)) for sizes in rows])
    ids = torch.randint(256, positions.shape, generator=torch.Generator().manual_seed(len(rows[0])))
    return dict(input_ids=ids, position_ids=positions, cu_seq_lens_q=cumulative_lengths(positions))


def seen(tokens: int, lengths: torch.Tensor, window_size: list[int]) -> torch.Tensor:
    """bool [tokens, tokens], written out for each pair."""
    documents_of = torch.bucketize(torch.arange(tokens), lengths, right=True).tolist()
    reach = window_size[0] if window_size[0] >= 0 else tokens
    rows = [[documents_of[i] == documents_of[j] and 0 <= i - j <= reach for j in range(tokens)] for i in range(tokens)]
    return torch.tensor(rows)


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """The calls of the stand-in: attention and its gradients as in a textbook, for the private operators of PyTorch."""
    documents._kernel()  # registers them
    done: list[str] = []

    def chances(query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor, scale: float, window: list[int]) -> Any:
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        return scores.masked_fill(~seen(len(query), lengths, window), -math.inf).softmax(-1)

    def forward(q: Any, k: Any, v: Any, lengths: Any, _: Any, *sizes: Any) -> Any:
        """Of query, key, value, where documents begin, the longest ones, is_causal, scale, window_size."""
        done.append("forward")
        assert sizes[2] == (sizes[4] == [-1, 0])
        groups = q.shape[1] // k.shape[1]
        p = chances(q, k.repeat_interleave(groups, 1), lengths, sizes[3], sizes[4])
        output = torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(groups, 1)).contiguous()
        return output, q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(
        gradient: Any, q: Any, k: Any, v: Any, _: Any, lse: Any, lengths: Any, *sizes: Any
    ) -> tuple[torch.Tensor, ...]:
        """Of the same, with the output's gradient."""
        done.append("backward")
        groups, scale = q.shape[1] // k.shape[1], sizes[5]
        k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
        p = chances(q, k, lengths, scale, sizes[6])
        dp = torch.einsum("qhd,khd->hqk", gradient, v)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, gradient)
        dk, dv = (tensor.unflatten(1, (-1, groups)).sum(2) for tensor in (dk, dv))
        return torch.einsum("hqk,khd->qhd", ds, k).contiguous(), dk.contiguous(), dv.contiguous()

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)
    yield done


def trained(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The logits of each batch, and the gradients of all of them together."""
    found = []
    for batch in batches:
        logits = model(**batch, use_cache=False).logits.float()
        (logits * torch.linspace(-1, 1, logits.shape[-1], device=logits.device)).mean().backward()
        found.append(logits.detach())
    return [*found, *(parameter.grad.float() for parameter in model.parameters())]


# Four micro-batches of as many documents each as there happen to be.
MICRO_BATCHES = [([10, 20, 2], [5, 27]), ([32], [32]), ([5, 5, 5, 5, 12], [1, 31]), ([4] * 8, [16, 16])]


@pytest.mark.parametrize("window, compiled, checkpointing, forwards", [
    (7, False, False, 12), (None, True, False, 12), (7, False, True, 24),
])  # fmt: skip
def test_the_operator_in_a_model(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, window: int | None, compiled: bool, checkpointing: bool,
    forwards: int,
) -> None:  # fmt: skip
    """Equal to the mask; compiled once for any number of documents; computed again with a checkpointed layer."""
    batches = [batch_of(*rows) for rows in MICRO_BATCHES]
    expected = trained(model_of(window, varlen=False), batches)
    assert not calls
    monkeypatch.setattr(documents, "masked", documents._kernel())
    model = model_of(window, varlen=True)
    if checkpointing:
        checkpoint_layers(model)
    counters.clear()
    for layer in decoder_layers(model) if compiled else []:
        layer.compile(dynamic=False, backend="aot_eager")
    for ours, theirs in zip(trained(model, batches), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert calls.count("forward") == forwards and calls.count("backward") == 12
    assert counters["stats"]["unique_graphs"] == int(compiled)


# On a GPU.


def error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    """Relative to each tensor's size (2-norms)."""
    return [((ours - true).norm() / true.norm()).item() for ours, true in zip(found, truth, strict=True)]


@ON_GPU
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("compiled, checkpointing", [(False, False), (True, False), (True, True)])
def test_the_kernel_in_bf16(head_dim: int, window: int | None, compiled: bool, checkpointing: bool) -> None:
    """As near to fp32 as the mask is in bf16: within 1.5 times its error, in logits and every gradient."""
    shape = dict(hidden_size=8 * head_dim, num_attention_heads=8, num_key_value_heads=2, head_dim=head_dim)
    rows = [([300, 150, 62], [512]), ([100] * 5 + [12], [500, 12]), ([7] * 73 + [1], [256, 256])]
    batches = [{name: t.cuda() for name, t in batch_of(*sizes).items()} for sizes in rows]
    found = {}
    for name, dtype, varlen in (("truth", torch.float32, False), ("mask", torch.bfloat16, False),
                                ("kernel", torch.bfloat16, True)):  # fmt: skip
        torch._dynamo.reset()
        model = model_of(window, varlen, **shape).to("cuda", dtype)
        if name == "kernel" and checkpointing:
            checkpoint_layers(model)
        for layer in decoder_layers(model) if compiled and dtype != torch.float32 else []:
            layer.compile(dynamic=False)
        counters.clear()
        found[name] = trained(model, batches)
        assert counters["stats"]["unique_graphs"] <= 1
    for ours, theirs in zip(error(found["kernel"], found["truth"]), error(found["mask"], found["truth"]), strict=True):
        assert ours <= 1.5 * theirs + 1e-3
        assert ours < 0.1


@ON_GPU
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 1, 64])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (6, 1)])
def test_the_kernel_by_itself(head_dim: int, window: int | None, heads: tuple[int, int]) -> None:
    """Output and gradients, against the mask in fp32 on the same numbers: 1 % of the largest, as bf16 rounds."""
    draw = torch.Generator("cuda").manual_seed(0)
    lengths = torch.tensor([0, 1, 130, 131, 400, 512, 512 + 256, 1024], dtype=torch.int32, device="cuda")
    size = dict(generator=draw, device="cuda")
    q, k, v = (torch.randn(2, n, 512, head_dim, **size).bfloat16() for n in (heads[0], heads[1], heads[1]))
    gradient = torch.randn(2, 512, heads[0], head_dim, **size)
    found = []
    for dtype, on_gpu in ((torch.bfloat16, True), (torch.float32, False)):
        inputs = [tensor.to(dtype).detach().requires_grad_() for tensor in (q, k, v)]
        if on_gpu:
            output, _ = documents.attend(None, *inputs, lengths, scaling=0.1, sliding_window=window)
        else:
            flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in inputs]
            reach = (window - 1 if window else -1, 0)
            output = documents.masked(*flat, lengths, scale=0.1, window_size=reach).view_as(gradient)
        output.backward(gradient.to(dtype))
        found.append([output, *(tensor.grad for tensor in inputs)])
    for ours, true in zip(*found, strict=True):
        assert (ours.float() - true).abs().max() <= 0.01 * true.abs().max().clamp(min=1)  # of a window of 1, 0


@ON_GPU
def test_no_question_to_the_gpu() -> None:
    """Neither by the search for documents nor by attention."""
    model = model_of(None, varlen=True, hidden_size=256, head_dim=64).to("cuda", torch.bfloat16)
    batches = [{name: t.cuda() for name, t in batch_of(*rows).items()} for rows in MICRO_BATCHES]
    trained(model, batches[:1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            model(**batch, use_cache=False).logits.float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
