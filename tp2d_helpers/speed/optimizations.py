"""Which optimizations a run uses, and their application to its engine."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Collection
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from tp2d_helpers import startup
from tp2d_helpers.config import OPTIMIZATIONS
from tp2d_helpers.speed import documents, frozen, graphs, layers, reducers
from tp2d_helpers.speed.agreement import everywhere, first_trouble
from tp2d_helpers.speed.float8 import compute_in_fp8
from tp2d_helpers.speed.loss import fuse_loss
from tp2d_helpers.speed.loss_scale import change_scale_after_step
from tp2d_helpers.speed.optimizer import FusedZeroOptimizer, fuse_step

STAGE_3_CANNOT = {"compile", "block_all_reduce", "peer_copies", "cuda_graph"}


def chosen_optimizations(config: dict[str, Any], on_gpu: bool) -> tuple[set[str], str]:
    """(names of `OPTIMIZATIONS` that a run uses, why one that was asked for is left out).

    "auto" takes all that help: on CPUs, compilation costs a minute and gains little. Copies are between two peers, and
    not beside frozen weights, without whose gradients there is nothing to hide them behind.
    Packed documents are as many as a micro-batch happens to have, and a graph's inputs have one shape.
    """
    names, stage, tp_size = config.get("optimizations", "auto"), config.get("zero_stage", 1), config.get("tp_size", 1)
    chosen = {"auto": set(OPTIMIZATIONS), "none": set()}.get(names, set(names.split(",")))
    if names == "auto" and not on_gpu:
        chosen.discard("compile")
    recomputes = config.get("activation_checkpointing", "none") != "none"
    if not on_gpu or recomputes:
        chosen.discard("cuda_graph")
    trouble = []
    if "cuda_graph" in chosen and config.get("packing") == "documents":
        chosen.discard("cuda_graph")
        trouble.append("no cuda_graph: micro-batches hold different numbers of documents")
    if config.get("lora_rank") or not (on_gpu and peers_copy(chosen, tp_size)):
        chosen.discard("peer_copies")
    if stage == 3 and chosen & STAGE_3_CANNOT:
        return chosen - STAGE_3_CANNOT, "ZeRO stage 3 gathers a layer's weights as that layer is called, and not before"
    if "compile" in chosen and not compilers(on_gpu):
        chosen.discard("compile")
        trouble.append(f"not compiled: {'Triton' if on_gpu else 'a C++ compiler'} is not installed")
    return chosen, "; ".join(trouble)


def peers_copy(names: Collection[str], tp_size: int) -> bool:
    """Whether a TP group's all-reduces may travel as copies: it has two peers, and the operators are this package's."""
    return tp_size == 2 and {"block_all_reduce", "peer_copies"}.issubset(names)


def optimize(
    engine: deepspeed.DeepSpeedEngine, config: dict[str, Any], tp_group: dist.ProcessGroup, blocks: Collection[str]
) -> None:
    """Make the engine's step faster; what it computes stays the same.

    Args:
        blocks: names of the modules whose column-wise layers all take the module's own input.
    """
    startup.mark("sharding")  # which came before this
    names, trouble = _agreed(*chosen_optimizations(config, torch.cuda.is_available()))
    model = engine.module
    _say("not all optimizations", trouble)
    shape = config["batch_size_per_gpu"], config["seq_length"]
    documents.skip_search_for_packed_samples(model)
    change_layers(model, names, config, blocks)
    if config.get("precision") == "fp8":
        compute_in_fp8(engine, "compile" in names)
    if "peer_copies" in names:
        elements = math.prod(shape) * model.config.get_text_config().hidden_size
        _say("no peer_copies but NCCL", reducers.copy_between_peers(tp_group, elements, model.dtype))
    if "fused_loss" in names:
        fuse_loss(model, "compile" in names, in_chunks=engine.zero_optimization_stage() < 3)
    if "fused_step" in names:
        fuse_step(engine)
    if not isinstance(engine.optimizer, FusedZeroOptimizer):
        change_scale_after_step(engine.optimizer)
    if "compile" in names:
        layers.compile_layers(model)
    if "cuda_graph" in names and any(everywhere(_may_be_host_bound(model, math.prod(shape)))):
        restart = functools.partial(reducers.restart, tp_group)
        _say("no cuda_graph", graphs.replay_passes(model, shape, tp_group.size() == 1, restart))
    startup.mark("optimizations")


def change_layers(
    model: torch.nn.Module, names: Collection[str], config: dict[str, Any], blocks: Collection[str]
) -> None:
    """Let the decoder layers of a divided model communicate and keep activations as a run's settings say.

    What the model computes stays the same, which is proven for its class before a run (`model/proof.py`).

    Args:
        names: of the optimizations that are used.
        blocks: as for `optimize`.
    """
    if "block_all_reduce" in names:
        (frozen.enter_once_per_block if config.get("lora_rank") else layers.reduce_once_per_block)(model, blocks)
    if config.get("activation_checkpointing", "none") == "full":
        layers.checkpoint_layers(model)


def _may_be_host_bound(model: torch.nn.Module, tokens: int) -> bool:
    """Of this rank's shard, which may be smaller than another's."""
    return graphs.may_be_host_bound(layers.layer_parameters(model), tokens)


def _agreed(names: set[str], trouble: str) -> tuple[set[str], str]:
    """What every rank of the world can do, and what stands in some rank's way. Collective."""
    return set.intersection(*everywhere(names)), first_trouble(trouble)


def _say(what: str, trouble: str) -> None:
    """A line on rank 0, if there was trouble."""
    if trouble and dist.get_rank() == 0:
        print(f"{what}: {trouble}", flush=True)


def compilers(on_gpu: bool) -> bool:
    """Whether `torch.compile` has what it needs: Triton for GPUs, a C++ compiler for CPUs."""
    if on_gpu:
        return importlib.util.find_spec("triton") is not None
    return shutil.which(os.environ.get("CXX", "g++")) is not None
