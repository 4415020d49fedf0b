"""Is a divided model the same function as the whole one? Computed on the driver, before a GPU is taken.

The ranks of a TP group run as threads on the CPU, by the code that the workers run: this package's division, AutoTP's
layers and what the run's settings make of them (optimizations, recomputed layers, adapters), on a small model of the
same class with random weights. Its loss, and the gradient of every weight on every rank, must be those of one process.
So a model type that nobody has tried is not taken on trust, nor is one whose code comes with it. Left out are the
compiler, the head's division by vocabulary, and ZeRO, none of which depends on the class's code.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from deepspeed.module_inject import auto_tp
from deepspeed.module_inject import layers as autotp_layers

from tp2d_helpers.config import ConfigError, reason
from tp2d_helpers.model.autotp import replace_layers
from tp2d_helpers.model.cuts import Cut
from tp2d_helpers.model.divide import divide
from tp2d_helpers.model.lora import SUFFIX, Adapter, adapter_cut, add_adapters, join
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.rehearsal import Rehearsal, quiet
from tp2d_helpers.model.small import small_model
from tp2d_helpers.speed import reducers
from tp2d_helpers.speed.optimizations import change_layers, chosen_optimizations

SAMPLE = (2, 12)  # samples, tokens
LOSS, GRADIENT = 1e-5, 1e-3  # as shares; rounding in fp32 makes less than a tenth of either
ROUNDING = 1e-5  # of the largest gradient's size: what a gradient that is zero may be off by


@dataclass
class Meeting:
    """Where the threads meet: each brings a tensor and takes those of all."""

    size: int
    barrier: threading.Barrier = field(init=False)
    brought: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, in their order."""
        self.brought[rank] = tensor.detach().clone()
        self.barrier.wait()
        found = [self.brought[rank] for rank in range(self.size)]
        self.barrier.wait()
        return found


@dataclass
class Rank:
    """A rank's TP group: what stands in for PyTorch's process group, and for this package's collectives over it."""

    meeting: Meeting
    rank: int

    @property
    def group_name(self) -> str:
        """What the operators of `reductions` know it by."""
        return f"proof-{self.rank}"

    @property
    def group(self) -> Rank:
        """Itself: `reductions.register` asks."""
        return self

    def now(self, x: torch.Tensor) -> None:
        """All-reduce x in place."""
        x.copy_(torch.stack(self.meeting.exchange(self.rank, x)).sum(0))

    begin = now

    def finish(self) -> None:
        """All that has begun is done."""


class Communication:
    """The part of `deepspeed.comm` that AutoTP's layers use."""

    @staticmethod
    def get_world_size(group: Rank) -> int:
        """Ranks in a TP group."""
        return group.meeting.size

    @staticmethod
    def get_rank(group: Rank) -> int:
        """This rank in it."""
        return group.rank

    @staticmethod
    def all_reduce(tensor: torch.Tensor, group: Rank) -> None:
        """The sum, in place."""
        group.now(tensor)

    @staticmethod
    def all_gather_into_tensor(result: torch.Tensor, tensor: torch.Tensor, group: Rank) -> None:
        """The ranks' tensors, end to end in dimension 0."""
        result.copy_(torch.cat(group.meeting.exchange(group.rank, tensor)))


def prove(
    hf_config: transformers.PretrainedConfig, tp_size: int, needs: Rehearsal, settings: dict[str, Any] | None = None
) -> None:
    """Compare a small model of the class, trained as a run will train it, with the whole one. About a second or two.

    Args:
        needs: what `rehearse` found.
        settings: the run's (`Config.model_dump()`); without, its defaults on a CPU.

    Raises:
        ConfigError: with the weight or the loss that differs.
    """
    how, take = f"sharded by AutoTP at tp_size {tp_size}", "Take tp_size 1"
    if tp_size == 1:
        how, take = "trained so", "Take activation_checkpointing 'none', and lora_rank 0"
    kind, settings = f"model_name: {hf_config.model_type!r} can't be {how}: ", settings or {}
    try:
        with quiet(), _ranks_are_threads(tp_size) as ranks:
            whole = small_model(hf_config, tp_size).eval()
            plan = Plan.of(whole, tp_size)
            models = [_as_in_the_run(whole, plan, rank, needs, settings) for rank in ranks]
            with _adapting(whole, settings, Plan(1), None):
                pass
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(whole.config.get_text_config().vocab_size, SAMPLE, generator=draw)
            expected = _loss(whole, ids)
            with ThreadPoolExecutor(tp_size) as pool:
                losses = list(pool.map(_loss_on, ranks, models, [ids] * tp_size))
        trouble = _differences(whole, models, plan, expected, losses)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{kind}{reason(error).rstrip('.')}. {take}") from error
    if trouble:
        raise ConfigError(f"{kind}{trouble}, tried with random weights. {take}")


def _as_in_the_run(
    whole: torch.nn.Module, plan: Plan, rank: Rank, needs: Rehearsal, settings: dict[str, Any]
) -> torch.nn.Module:
    """A rank's model, by the steps of `setup_model_with_autotp`; its head stays whole."""
    shared = {id(weight): torch.nn.Parameter(weight.detach()) for weight in whole.parameters()}  # no copies of weights
    model = copy.deepcopy(whole, shared)
    with _adapting(model, settings, plan, SimpleNamespace(tp_group=rank, tp_rank=rank.rank)):
        divide(model, plan, rank, rank.rank)
        if plan.tp_size > 1:
            autotp = replace_layers(model, plan, rank, head=False, summed=needs.summed)
            autotp.register_replicated_grad_hooks(model)
    names, _ = chosen_optimizations(settings, bool(settings.get("use_gpu")))
    recomputes = {"activation_checkpointing": "full"} if settings.get("activation_checkpointing") == "auto" else {}
    change_layers(model, names, settings | recomputes, needs.blocks)
    return model


@contextmanager
def _adapting(model: torch.nn.Module, settings: dict[str, Any], plan: Plan, mpu: Any) -> Iterator[None]:
    """With LoRA, hang adapters beside the model's layers; the body divides it. Both matrices are random here."""
    adapters = add_adapters(model, settings, plan, mpu) if settings.get("lora_rank") else {}
    yield
    if adapters:
        join(model, adapters)
    draw = torch.Generator().manual_seed(1)
    for adapter in adapters.values():
        B = 0.02 * torch.randn(adapter.wholes[1], generator=draw)
        adapter.B.data.copy_(adapter.cut.take(B, adapter.rank) if adapter.cut and not adapter.row else B)


def _loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The mean cross-entropy of the next token, after a backward pass."""
    model.config.use_cache = False
    logits = model(input_ids=ids)
    logits = logits[0] if isinstance(logits, tuple) else logits.logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    return loss.item()


def _loss_on(rank: Rank, model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The same on a thread; if it fails, the others don't wait for it."""
    try:
        return _loss(model, ids)
    except BaseException:
        rank.meeting.barrier.abort()
        raise


def _differences(
    whole: torch.nn.Module, models: list[torch.nn.Module], plan: Plan, expected: float, losses: list[float]
) -> str:
    """What is not as in one process, in words; "" if nothing."""
    if off := [loss for loss in losses if not abs(loss - expected) <= LOSS * abs(expected)]:
        return f"its loss would be {off[0]:.6f}, and is {expected:.6f} in one process"
    gradients = {name: weight.grad for name, weight in whole.named_parameters() if weight.grad is not None}
    of_head = {id(weight) for weight in whole.get_output_embeddings().parameters()}
    heads = {name for name, weight in whole.named_parameters() if id(weight) in of_head}
    largest, cuts = max(gradient.norm() for gradient in gradients.values()), plan.cuts | _cuts_of_adapters(whole, plan)
    if not largest > 0:
        return "no weight has a gradient"
    for name, gradient in gradients.items():
        cut = None if name in heads else cuts.get(name)
        for rank, model in enumerate(models):
            mine, wanted = model.get_parameter(name).grad, cut.take(gradient, rank) if cut else gradient
            if mine is None or not (mine - wanted).norm() <= GRADIENT * wanted.norm() + ROUNDING * largest:
                return f"the gradient of {name} would be another than in one process"
    return ""


def _cuts_of_adapters(whole: torch.nn.Module, plan: Plan) -> dict[str, Cut]:
    layers = [name.removesuffix(SUFFIX) for name, module in whole.named_modules() if isinstance(module, Adapter)]
    cuts = {layer: cut for layer in layers if (cut := adapter_cut(plan, layer))}
    return {f"{layer}{SUFFIX}.{'A' if cut.dim == 1 else 'B'}": cut for layer, cut in cuts.items()}


@contextmanager
def _ranks_are_threads(tp_size: int) -> Iterator[list[Rank]]:
    """Within it, AutoTP's layers and the operators of `reductions` communicate between threads."""
    meeting = Meeting(tp_size)
    ranks = [Rank(meeting, rank) for rank in range(tp_size)]
    parallel: Any = mock.Mock(is_parallel=lambda group: True)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(auto_tp, "print_dist"))
        for module in (autotp_layers, auto_tp):
            stack.enter_context(mock.patch.object(module, "dist", Communication))
        stack.enter_context(mock.patch.object(autotp_layers, "pg_utils", parallel))
        stack.enter_context(mock.patch.object(autotp_layers.TensorParallel_Layer, "keep_module_on_host", True))
        stack.enter_context(mock.patch.dict(reducers.REDUCERS, {rank.group_name: rank for rank in ranks}))
        yield ranks
