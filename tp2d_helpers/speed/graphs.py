"""A micro-batch's forward and backward pass as one CUDA graph each.

However little a kernel has to do, the host takes microseconds to launch it, and a decoder layer has about 60 of them. A
graph is launched as one. It costs freedom (one shape, no question to the host) and memory that stays taken, so it is
for models and micro-batches that are too small to keep a GPU busy.
"""

from __future__ import annotations

import functools
import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import masking_utils
from transformers.modeling_outputs import CausalLMOutput

from tp2d_helpers.speed.agreement import everywhere, first_trouble

# Operations of a decoder layer, forward and backward, below which an H200 has done them before its host has launched
# them: 2.8 ms for a compiled layer (`constants.HOST_LAYER`), at 0.45 PFLOP/s of small matmuls. The planner goes by it.
# Hosts differ by a factor of two, so a run measures if it is below `DOUBT` times as many.
HOST_BOUND, DOUBT = 1.25e12, 6
# Of the time that passes take, the share spent launching them from which on the GPU waits for its host.
WAITS = 0.8
OFF = 0.1  # of their norm, from which on a replay's gradients are wrong: rounding in bf16 makes a tenth of that

_replayed = 0  # bytes that graphs use while they run, and that the allocator takes for free
_models: list[tuple[torch.nn.Module, Callable]] = []  # that replay graphs, each with its forward pass as it was


def host_bound(layer_parameters: float, tokens: int) -> bool:
    """Whether a GPU waits for its host at this micro-batch: 6 operations per token and parameter of a layer's shard."""
    return 6 * layer_parameters * tokens < HOST_BOUND


def may_be_host_bound(layer_parameters: float, tokens: int) -> bool:
    """Whether it takes a measurement to know."""
    return host_bound(layer_parameters, tokens / DOUBT)


def peak_memory() -> int:
    """Most bytes of GPU memory that this process has had allocated since the last reset, those of graphs included."""
    return torch.cuda.max_memory_allocated() + _replayed


class Loss(torch.nn.Module):
    """A model's loss as a function of tensors and nothing else: what a CUDA graph can be made of."""

    INPUTS = ("input_ids", "labels", "num_items_in_batch")

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.whole = model, model.forward

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """0-dim, from `INPUTS`: tokens and labels [samples, seq], and the number that the summed loss is divided by."""
        return self.whole(**dict(zip(self.INPUTS, tensors, strict=True)), use_cache=False).loss


def replay_passes(
    model: torch.nn.Module, shape: tuple[int, int], alone: bool, restart: Callable[[], None] = lambda: None
) -> str:
    """Let training on micro-batches of this shape replay graphs; all else (evaluation, padding) runs as before.

    That is, if the host is what a step waits for, on some rank. The graphs hold the addresses of the weights, which
    must stay where they are. Collective over the world: if a rank can't capture its passes, none replays them, as a
    graph hands out gradients in an order of its own. A gradient lasts until the next replay: several are added up
    elsewhere, as ZeRO does (`gradients.Sums`).

    Args:
        model: on a GPU, its weights trained by an engine.
        shape: (samples, seq).
        alone: whether the passes reduce nothing over other ranks, which would wait for one that ran out of memory.
        restart: called as a pass begins, forward and backward: a graph takes the same way in each replay, and what is
            reduced over ranks must not depend on what came before (`reducers.restart`).

    Returns:
        why it can't be done, the same on all ranks; "" if it is. Then call `release` before process groups end.
    """
    whole, device = model.forward, next(model.parameters()).device
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    sample = (ids, ids.clone(), torch.ones((), device=device))
    passes, weights, aliases = _passes(Loss(model.train()), sample, restart)
    replay, trouble = _captured(passes, (*sample, *aliases), model.config.get_text_config().vocab_size, alone)
    if trouble:
        restart()  # a capture that was cut off on one rank has left its reductions at another turn than its peers'
        _forget_graphs()
        return trouble

    @functools.wraps(whole)
    def forward(*args: Any, use_cache: bool | None = None, **batch: Any) -> Any:
        """The graphs' loss of a training batch of that shape, and no logits; the model's own output of all else."""
        tensors = tuple(batch.get(name) for name in Loss.INPUTS) if len(batch) == len(sample) and not args else ()
        alike = [getattr(tensor, "shape", None) for tensor in tensors] == [tensor.shape for tensor in sample]
        if not (alike and model.training and torch.is_grad_enabled()):
            restart()
            return whole(*args, use_cache=use_cache, **batch)
        return CausalLMOutput(loss=replay(*tensors, *weights).clone())  # the next replay writes it again

    model.forward = forward
    _models.append((model, whole))
    return ""


def release() -> None:
    """Free the graphs: NCCL waits to destroy a communicator until no graph holds one of its collectives."""
    if not _models:
        return
    for model, whole in _models:
        model.forward = whole
    _models.clear()
    _forget_graphs()


def _captured(
    passes: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], vocabulary: int, alone: bool
) -> tuple[Callable[..., torch.Tensor] | None, str]:
    """(graphs of the passes, "") or (None, why there are none), which is the same on all ranks. Collective."""
    waits, trouble = _tried(_waits_for_host, passes, inputs, alone)
    if trouble := first_trouble(trouble):
        return None, trouble
    if not any(everywhere(waits)):
        return None, "a step waits for the GPU, not for its host"
    replay, trouble = _tried(_graphed, passes, inputs, alone)
    if trouble := first_trouble(trouble):
        return None, trouble
    off, trouble = _tried(functools.partial(_compared, replay, vocabulary), passes, inputs, alone)
    trouble = first_trouble(trouble or off)
    return (None if trouble else replay), trouble


class _Restart(torch.autograd.Function):
    """The loss as it is; `restart` is called as its backward pass begins."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, restart: Callable[[], None]) -> torch.Tensor:
        """The loss."""
        ctx.restart = restart
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Its gradient."""
        ctx.restart()
        return gradient, None


def _passes(
    loss: Loss, sample: tuple[torch.Tensor, ...], restart: Callable[[], None]
) -> tuple[Callable[..., torch.Tensor], tuple, list]:
    """(`loss` of the sample's tensors and, after them, aliases of the weights; the weights; their aliases).

    The engine's hooks tie the weights themselves to the default stream, which can't be captured.
    """
    names, weights = zip(*loss.named_parameters(), strict=True)
    aliases = [torch.nn.Parameter(weight.detach(), weight.requires_grad) for weight in weights]

    def passes(*tensors: torch.Tensor) -> torch.Tensor:
        """The loss."""
        restart()
        swapped = dict(zip(names, tensors[len(sample) :], strict=True))
        return _Restart.apply(torch.func.functional_call(loss, swapped, tensors[: len(sample)]), restart)

    return passes, weights, aliases


def _tried(attempt: Callable, passes: Callable, inputs: tuple[torch.Tensor, ...], alone: bool) -> tuple[Any, str]:
    """(what it returns, "") or (None, why it failed)."""
    try:
        return attempt(passes, inputs), ""
    except RuntimeError as error:  # a model that asks the GPU for a number before it goes on, or no memory left
        if isinstance(error, torch.OutOfMemoryError) and not alone:
            raise
        return None, str(error).splitlines()[0]


def _waits_for_host(passes: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> bool:
    """Whether to launch the passes takes about as long as they take: measured, after two that compile and warm up."""
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        begin.record()
        loss = passes(*inputs)
        torch.autograd.grad(loss, [tensor for tensor in inputs if tensor.requires_grad], allow_unused=True)
        launched = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
    return launched > WAITS * begin.elapsed_time(end) / 1000


def _graphed(passes: Callable[..., torch.Tensor], sample: tuple[torch.Tensor, ...]) -> Callable[..., torch.Tensor]:
    stream, pool, tracing = torch.cuda.current_stream(), torch.cuda.graph_pool_handle(), masking_utils.is_tracing
    masking_utils.is_tracing = lambda *_: False  # before 5.20, transformers takes a mask for what is captured
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # the aliases' isn't the default one
            replay = torch.cuda.make_graphed_callables(passes, sample, allow_unused_input=True, pool=pool)
    finally:
        masking_utils.is_tracing = tracing
        torch.cuda.set_stream(stream)  # one that failed leaves its own
    torch.cuda.empty_cache()  # what the passes took that were made to warm up
    global _replayed
    segments = [found for found in torch.cuda.memory_snapshot() if tuple(found["segment_pool_id"]) == tuple(pool)]
    _replayed = sum(segment["total_size"] - segment["allocated_size"] for segment in segments)
    return replay


def _compared(
    replay: Callable[..., torch.Tensor], vocabulary: int, passes: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
) -> str:  # fmt: skip
    """In words, if replays of random tokens give other gradients than the passes that the graphs were made of.

    Not bit for bit: attention's backward pass adds in any order, and graphs may reduce over ranks in another way.
    """
    ids, _, count, *weights = inputs
    draw, trained = torch.Generator(ids.device).manual_seed(0), [weight for weight in weights if weight.requires_grad]
    for _ in range(2):  # what one replay leaves must not reach the next
        given = torch.randint(vocabulary, ids.shape, generator=draw, device=ids.device)
        found = []
        for function in (passes, replay):
            with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
                torch.manual_seed(0)  # for dropout
                loss = function(given, given, count, *weights)  # a sum, which fp16 has the range for
                found.append(torch.autograd.grad(loss, trained, allow_unused=True))
        pairs = [(now, then) for then, now in zip(*found, strict=True) if then is not None]
        error = torch.stack([(now.float() - then).norm() for now, then in pairs]).norm().item()
        norm = torch.stack([then.float().norm() for _, then in pairs]).norm().item()
        del found, pairs
        if not norm > 0:
            return "the gradients of its passes are zero, and no replay can be compared with them"
        if not error <= OFF * norm:  # nor if it isn't a number
            return f"the gradients of its replays are off by {error / norm:.0%}"
    if ids.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return ""


def _forget_graphs() -> None:
    """Give back the memory of graphs that nothing refers to."""
    global _replayed
    _replayed = 0
    gc.collect()
    torch.cuda.empty_cache()
