"""Head and loss in chunks of positions: equal to whole logits, on every grid and whatever is done to the logits."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import Run, assert_equal_runs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from tp2d_helpers.data.dataset import IGNORED
from tp2d_helpers.speed import cross_entropy, loss, optimizations
from tp2d_helpers.speed.cross_entropy import worth_chunks
from tp2d_helpers.speed.logits import Logits, delay_logits
from tp2d_helpers.speed.loss import fuse_loss, loss_from_logits

Train = Callable[..., Run]
SHORT = dict(debug_steps=6, warmup_steps=2)
SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
             head_dim=4, vocab_size=50, pad_token_id=None, attention_dropout=0.0)  # fmt: skip
TYPES = {
    "llama": {}, "phi": {}, "qwen2": dict(tie_word_embeddings=True), "gemma2": dict(final_logit_softcapping=30.0),
    "cohere": dict(logit_scale=0.25), "granite": dict(logits_scaling=4.0),
}  # fmt: skip


def in_chunks(names: dict[str, Any], passes: int = 1) -> None:
    """For `train(patch=)`: chunks of up to 43 positions. A run with a training pass without them fails."""
    cross_entropy.ROWS, loss.worth_chunks = 43, lambda *_: True
    calls, whole, step = [], cross_entropy.HeadLoss.forward, names["train_step"]
    cross_entropy.HeadLoss.forward = staticmethod(lambda *args: (calls.append(1), whole(*args))[1])

    def train_step(engine: Any, micro_batches: list[dict]) -> Any:
        calls.clear()
        found = step(engine, micro_batches)
        assert len(calls) == passes * len(micro_batches)
        return found

    names["train_step"] = train_step


def in_whole(names: dict[str, Any]) -> None:
    """The opposite."""
    in_chunks(names, passes=0)


@pytest.mark.parametrize("model, grid", [
    ("qwen2-tied", dict(tp_size=2)), ("qwen2-tied", dict(tp_size=2, dp_size=2)),
    ("llama", dict(tp_size=4, zero_stage=2)), ("llama", dict(dp_size=2)),
], ids=str)  # fmt: skip
def test_equals_whole_logits(train: Train, model: str, grid: dict[str, Any]) -> None:
    """With a tied head the gradient of its weight is added to the embedding's."""
    assert_equal_runs(train(model, patch=in_chunks, **grid, **SHORT), train(model, optimizations="none", **SHORT))


@pytest.mark.parametrize("kind, shape", [
    ("ministral3", dict(intermediate_size=177, vocab_size=2049)),
    ("gemma2", dict(head_dim=16, query_pre_attn_scalar=16)),
    ("phi", dict(partial_rotary_factor=0.5)),
], ids=["uneven vocabulary", "softcapping", "bias"])  # fmt: skip
def test_heads(train: Train, family: Callable[..., Path], kind: str, shape: dict[str, Any]) -> None:
    model = family(kind, **shape)
    run = train(model, patch=in_chunks, tp_size=2, optimizations="fused_loss", **SHORT)
    assert_equal_runs(run, train(model, optimizations="none", **SHORT))


@pytest.mark.parametrize("settings", [
    dict(dp_size=2, gradient_accumulation_steps=2, packing=False), dict(packing="documents", tp_size=2),
    dict(eval_samples=4, eval_interval=2, sample_prompts="A lemon", tp_size=2),
    dict(activation_checkpointing="full", tp_size=2),
    dict(lora_rank=4, lora_alpha=8, tp_size=2), dict(lora_rank=4, lora_alpha=8),
], ids=lambda settings: next(iter(settings.items())))  # fmt: skip
def test_settings(train: Train, settings: dict[str, Any]) -> None:
    """Padded samples, documents, evaluation and continued prompts, checkpointing, a head that isn't trained."""
    kept = {
        name: v for name, v in settings.items() if name not in ("tp_size", "dp_size", "gradient_accumulation_steps")
    }
    run = train("qwen2-tied", patch=in_chunks, **settings, **SHORT)
    assert_equal_runs(run, train("qwen2-tied", **kept, **SHORT))


@pytest.mark.skipif(not optimizations.compilers(on_gpu=False), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled(train: Train, family: Callable[..., Path]) -> None:
    """With what comes between head and loss."""
    model = family("gemma2", head_dim=16, query_pre_attn_scalar=16)
    run = train(model, patch=in_chunks, tp_size=2, optimizations="compile,fused_loss", **SHORT)
    assert_equal_runs(run, train(model, optimizations="none", **SHORT))


def test_stage_3_takes_whole_logits(train: Train) -> None:
    """It has gathered the head's weight only while the head is called."""
    run = train("llama", patch=in_whole, tp_size=2, dp_size=2, zero_stage=3, **SHORT)
    assert_equal_runs(run, train("llama", patch=in_chunks, **SHORT))


# One process


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 or 7 of 63 positions."""
    monkeypatch.setattr(cross_entropy, "ROWS", 8)


def models(kind: str, dtype: torch.dtype = torch.float32, from_logits: bool = False) -> tuple[Any, Any]:
    """(a model as `transformers` has it, the same with its loss in chunks), in training."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **TYPES[kind])).train()
    for weight in plain.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    ours = copy.deepcopy(plain).to(dtype)
    if from_logits:
        loss_from_logits(ours)
    fuse_loss(ours, compiled=False)
    return plain, ours


def batch() -> dict[str, torch.Tensor]:
    """3 samples of 21 tokens, of which 6 are no targets."""
    ids = torch.randint(50, (3, 21), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 3:9] = IGNORED
    return dict(input_ids=ids, labels=labels)


def differences(ours: torch.nn.Module, plain: torch.nn.Module, scale: float = 1.0) -> list[float]:
    """Of each weight's gradient, in its norm."""
    pairs = zip(ours.parameters(), plain.parameters(), strict=True)
    return [((p.grad.float() / scale - q.grad).norm() / q.grad.norm()).item() for p, q in pairs]


@pytest.mark.parametrize("count", [None, 17])
@pytest.mark.parametrize("kind", TYPES)
def test_loss_and_gradients(chunks: None, kind: str, count: int | None) -> None:
    """Of a loss that is multiplied by something, twice over: gradients are added."""
    plain, ours = models(kind)
    for model in (plain, ours):
        for factor in (2.0, 0.5):
            output = model(**batch(), num_items_in_batch=count and torch.tensor(count), use_cache=False)
            (factor * output.loss).backward()
        model.loss = output.loss.item()
    assert output.logits.made is None
    assert ours.loss == pytest.approx(plain.loss, rel=1e-6)
    assert max(differences(ours, plain)) < 1e-5


def test_loss_from_logits(chunks: None) -> None:
    """Of a class that is not given the labels."""
    plain, ours = models("cohere", from_logits=True)
    for model in (plain, ours):
        output = model(**batch(), use_cache=False)
        output.loss.backward()
    assert output.logits.made is None and max(differences(ours, plain)) < 1e-5


@pytest.mark.parametrize("dtype, scale, count", [(torch.bfloat16, 1.0, 57), (torch.float16, 2.0**16, 10**6)], ids=str)
def test_low_precision(chunks: None, dtype: torch.dtype, scale: float, count: int) -> None:
    """As near to fp32 as whole logits are. A millionth is no number in fp16, until the loss is scaled."""
    plain, ours = models("llama", dtype)
    fp32 = copy.deepcopy(plain)
    plain = plain.to(dtype)
    for model in (fp32, plain, ours):
        output = model(**batch(), num_items_in_batch=torch.tensor(float(count)), use_cache=False)
        ((1 if model is fp32 else scale) * output.loss).backward()
    for wrong, usual in zip(differences(ours, fp32, scale), differences(plain, fp32, scale), strict=True):
        assert wrong < 1.5 * usual


class Sizes(TorchDispatchMode):
    """Notes how large the tensors with storage are that operations make, and how many logits there are at once."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.chunks, self.at_once = set(), weakref.WeakSet(), 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """The operation itself."""
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.found.add(result.numel())
            if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and result.shape[-1] == 50:
                self.chunks.add(result)
                self.at_once = max(self.at_once, len(self.chunks))
        return result


def test_nothing_is_whole_and_the_device_is_asked_nothing(chunks: None) -> None:
    """The largest is the hidden states' gradient. On the meta device there are no numbers to answer with."""
    for device in ("cpu", "meta"):
        model, labels = models("phi")[1].to(device), batch()["labels"].to(device)
        hidden = torch.rand(3, 21, 16, device=device, requires_grad=True)
        with Sizes() as sizes:
            model.loss_function(model.lm_head(hidden), labels).backward()
        assert hidden.grad.shape == hidden.shape and model.lm_head.bias.grad.shape == (50,)
        assert device == "meta" or (max(sizes.found), sizes.at_once) == (63 * 16, 1)


def test_whoever_reads_logits_finds_them(chunks: None) -> None:
    """With their gradient, and what is written into them counts in the loss."""
    plain, ours = models("gemma2")
    expected, output = (model(**batch(), use_cache=False).logits for model in (plain, ours))
    assert isinstance(output, Logits) and (output.shape, output.dtype, output.device) == (
        expected.shape, expected.dtype, expected.device
    )  # fmt: skip
    for logits, model in ((expected, plain), (output, ours)):
        logits[..., 7] = -1.0
        (logits.square().mean() + model.loss_function(0.5 * logits, batch()["labels"], 50)).backward()
    assert torch.equal(output + 0, expected) and max(differences(ours, plain)) < 1e-5
    assert not isinstance(ours.eval()(**batch()).logits, Logits)
    with torch.no_grad():
        assert not isinstance(ours.train()(**batch()).logits, Logits)


def test_a_head_of_its_own_is_left_alone() -> None:
    class Scaled(torch.nn.Linear):
        pass

    assert delay_logits(Scaled(4, 8)) == "its head is a Scaled" and delay_logits(None) == "its head is a NoneType"


def test_where_chunks_save_memory() -> None:
    """The fp32 gradient of a weight with 8,192 columns is as large as 8,192 positions' logits and gradients in bf16."""
    assert not worth_chunks(4096 + 896, 896, True) and worth_chunks(8192, 896, True)
    assert not worth_chunks(12288, 8192, True) and worth_chunks(16384, 8192, True) and worth_chunks(8192, 8192, False)
