"""Run `train_func` on a (dp, tp) grid of local processes, without a Ray cluster, and compare runs.

Ray Train's local mode runs a train function in a process that torchrun's variables describe. The processes are forked
from a server that has imported everything once, so a 2×2 run of a tiny model takes seconds and not a minute.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from ray.train import CheckpointUploadMode

from tp2d_helpers.config import Config
from tp2d_helpers.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "tp_autotp.ipynb"
TIMEOUT = 300  # seconds for one run; a hang is a failure
# With what would be imported late in every process: DeepSpeed's optimizers bring a compiler along (1.5 s of CPU time).
PRELOAD = ["tp2d_helpers.preflight.plan", "tp2d_helpers.train", "ray.train.torch", "ray.tune",
           "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.superoffload.superoffload_stage3",
           "deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer", "pytest", "warm"]  # fmt: skip
# The server must have these as it starts: a process forked from one that has looked for a GPU can't be told otherwise,
# and Python 3.11's server takes the import path of what it preloads from the environment and, unless the path is
# "safe", from the current folder.
IMPORT_PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
ON_GPU = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # else each of many processes starts one per core
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1",
               "PYTHONPATH": IMPORT_PATH}  # fmt: skip


UPLOADS: list[threading.Thread] = []  # of checkpoints, in a worker
BARRIERS = itertools.count()
FAIL: list[Callable[[str], None]] = []  # ends a worker with an error, from any thread


def fork_context() -> multiprocessing.context.BaseContext:
    """Start processes by this: each begins in milliseconds with all libraries imported, and sees no GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context


def run_grid(config: dict[str, Any], after: Callable[..., Any] | None = None, patch: Callable | None = None) -> list:
    """Train by `train_func` on config["tp_size"] × config["dp_size"] processes: on CPUs, or GPUs where it says so.

    Args:
        config: all settings, as `Config.model_dump()` gives them.
        after: called in every process as after(engine, tp_group, dp_group); must be importable.
        patch: called in every process before training, with the namespace of `tp2d_helpers.train`.

    Returns:
        What `after` returned, by rank.

    Raises:
        RuntimeError: with the trace of the first rank that failed, as soon as it does, or if the run takes longer
            than `TIMEOUT`. No process is left behind.
    """
    on_gpu = config["use_gpu"] and torch.cuda.is_available()
    context = multiprocessing.get_context("spawn") if on_gpu else fork_context()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = config["tp_size"] * config["dp_size"]
    processes, readers = [], {}
    try:
        for rank in range(world):
            reader, writer = context.Pipe(duplex=False)
            # The server keeps the environment it was started with; a test may have changed its own since.
            place = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                         MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
            arguments = (os.environ | (ON_GPU if on_gpu else ENVIRONMENT) | place, config, after, patch, writer)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            processes[-1].start()
            writer.close()
            readers[reader] = rank
        return _answers(readers)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answers(readers: dict[Any, int]) -> list:
    """What each rank sent, by rank. The first failure to arrive is the cause; the others follow from it."""
    answers, end = {}, time.monotonic() + TIMEOUT
    while readers:
        ready = wait(list(readers), timeout=end - time.monotonic())
        if not ready:
            raise RuntimeError(f"the ranks {sorted(readers.values())} did not finish within {TIMEOUT} s")
        for reader in ready:
            rank = readers.pop(reader)
            try:
                failed, answers[rank] = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank}: the process ended without an answer") from None
            if failed:
                raise RuntimeError(f"rank {rank}: {answers[rank]}")
    return [answers[rank] for rank in sorted(answers)]


def _rank(environment: dict[str, str], config: dict, after: Callable, patch: Callable, writer: Any) -> None:
    try:
        os.environ.update(environment)
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils

        torch.set_num_threads(1)
        # On a CPU without instructions for fp16 DeepSpeed refuses it; PyTorch computes in it all the same.
        CPU_Accelerator.is_fp16_supported = lambda self: True
        LocalTrainFnUtils.report, LocalTrainFnUtils.barrier = _upload, _barrier

        def fail(trace: str) -> None:
            writer.send_bytes(pickle.dumps((True, trace)))
            os._exit(0)

        FAIL.append(fail)
        from tp2d_helpers import train as loop

        names = vars(loop)
        kept: dict[str, Any] = {}
        setup = names["setup_model_with_autotp"]

        def keeping(*args: Any, **kwargs: Any) -> Any:
            kept["setup"] = setup(*args, **kwargs)
            return kept["setup"]

        names["setup_model_with_autotp"] = keeping
        if patch:
            patch(names)

        def train(config: dict) -> None:
            names["train_func"](config)
            kept["store"] = dist.distributed_c10d._get_default_store()  # which ends with the last that knows rank 0's
            for upload in UPLOADS:
                upload.join()
            engine, tp_group, dp_group, *_ = kept["setup"]
            kept["result"] = after(engine, tp_group, dp_group) if after else None

        run = RunConfig(name=config["experiment_name"], storage_path=config["storage_path"])
        TorchTrainer(train, train_loop_config=config, scaling_config=ScalingConfig(num_workers=0), run_config=run).fit()
        answer = pickle.dumps((False, kept["result"]))
    except BaseException:
        answer = pickle.dumps((True, traceback.format_exc()))
    writer.send_bytes(answer)
    writer.close()
    sys.stdout.flush()
    multiprocessing.parent_process().join()  # it kills this one: others may still ask rank 0's store
    os._exit(0)  # DeepSpeed and gloo threads may not end by themselves


def _barrier(self: Any) -> None:
    """What Ray Train's barrier does in a cluster and leaves out in local mode: wait for all, however long it takes."""
    store, world = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    name = f"barrier-{next(BARRIERS)}"
    store.add(name, 1)
    while store.add(name, 0) < world:
        time.sleep(0.01)


def _upload(self: Any, metrics: dict, checkpoint: Any, checkpoint_upload_fn: Callable, **mode: Any) -> None:
    """What `ray.train.report` does in a cluster and leaves out in local mode: call the upload function."""
    self._last_metrics, self._last_checkpoint = metrics, checkpoint
    if mode["checkpoint_upload_mode"] is not CheckpointUploadMode.ASYNC:
        checkpoint_upload_fn(checkpoint, "")
        return

    def in_background() -> None:
        try:
            checkpoint_upload_fn(checkpoint, "")
        except BaseException:
            FAIL[0](traceback.format_exc())

    UPLOADS.append(threading.Thread(target=in_background))
    UPLOADS[-1].start()


@dataclass
class Run:
    """What a run left behind, to compare with another's."""

    config: dict[str, Any]
    records: list[dict[str, Any]]  # of metrics.jsonl
    weights: dict[str, torch.Tensor]  # whole, put together from the shards of rank 0's TP group
    replicated: dict[str, bool]  # weights that every TP rank holds whole: are they bit-identical in every TP group?
    sharded: dict[str, bool]  # weights that are divided: are the shards bit-identical? (they had better not be)
    copies: dict[str, bool]  # what a rank holds of each weight: is it bit-identical in every DP group?

    def losses(self) -> list[float]:
        """Loss of every step."""
        return [record["loss"] for record in self.records]


def trained(config: Config, patch: Callable | None = None) -> Run:
    """Train on a grid (see `run_grid`) and return what the run left behind."""
    answers = run_grid(config.model_dump(), after=final_weights, patch=patch)
    return Run(
        config.model_dump(),
        read_metrics(config.run_dir / "metrics.jsonl"),
        weights=answers[0][0],
        replicated={name: all(answer[1][name] for answer in answers) for name in answers[0][1]},
        sharded={name: any(answer[2][name] for answer in answers) for name in answers[0][2]},
        copies={name: all(answer[3][name] for answer in answers) for name in answers[0][3]},
    )


def final_weights(
    engine: Any, tp_group: dist.ProcessGroup, dp_group: dist.ProcessGroup
) -> tuple[dict, dict, dict, dict]:
    """For `run_grid(after=)`: `weights` (on rank 0), `replicated`, `sharded` and `copies` of a `Run`. Collective.

    With `replicated` and `copies` the weights of rank 0's TP group stand for those of all ranks.
    """
    import deepspeed

    from tp2d_helpers.model.lora import Adapter
    from tp2d_helpers.model.plan import Plan
    from tp2d_helpers.model.sharding import meta_model

    meta = meta_model(engine.module.config)
    cuts = Plan.of(meta, tp_group.size()).cuts
    names = {id(p): name for name, p in meta.named_parameters()}
    tied = dict(meta.named_parameters(remove_duplicate=False))
    cuts = {name: cuts.get(names[id(p)]) for name, p in tied.items()}
    whole = {name: p.shape for name, p in tied.items()}
    for name, module in engine.module.named_modules():
        if isinstance(module, Adapter):
            whole |= {f"{name}.A": module.wholes[0], f"{name}.B": module.wholes[1]}
            cuts[f"{name}.{'A' if module.row else 'B'}"] = module.cut
    parameters = dict(engine.module.named_parameters(remove_duplicate=False))
    distinct = list({id(p): p for p in parameters.values()}.values())
    stage_3 = any(hasattr(p, "ds_id") for p in distinct)
    weights, replicated, sharded, copies = {}, {}, {}, {}
    with deepspeed.zero.GatheredParameters(distinct) if stage_3 else nullcontext():
        for name, parameter in parameters.items():
            shard = parameter.data.float().contiguous()
            cut, rank = cuts.get(name), dist.get_rank(tp_group)
            if cut is None:
                replicated[name] = identical(shard, tp_group)
            elif len({cut.width(rank) for rank in range(len(cut.ranges))}) == 1:
                sharded[name] = identical(shard, tp_group)
            copies[name] = identical(shard, dp_group)
            weights[name] = shard.clone() if cut is None else shard.new_zeros(whole[name])
            if cut is not None:
                cut.put(weights[name], shard, rank)
                alike = together(weights[name], cut, rank, tp_group)
                replicated |= {name: alike} if cut.copies > 1 else {}
    weights = {name: weight.cpu() for name, weight in weights.items()} if dist.get_rank() == 0 else {}
    return weights, replicated, sharded, copies


def together(whole: torch.Tensor, cut: Any, rank: int, group: dist.ProcessGroup) -> bool:
    """Add the other ranks' parts to this rank's in a weight. Returns whether ranks that share a part agree on it."""
    mine = whole.clone()
    if not cut.owns(rank):
        whole.zero_()
    dist.all_reduce(whole, group=group)
    found = torch.zeros_like(whole)
    cut.put(found, cut.take(whole, rank), rank)
    alike = torch.tensor(torch.equal(found, mine), dtype=torch.int32, device=whole.device)
    dist.all_reduce(alike, dist.ReduceOp.MIN, group=group)
    return bool(alike)


def identical(tensor: torch.Tensor, group: dist.ProcessGroup) -> bool:
    """Whether a tensor is the same on all ranks of the group, bit for bit. Collective."""
    low, high = tensor.clone(), tensor.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    return torch.equal(low, high)


# Gradients that are mostly rounding: of a bias of the keys, which adds the same to all scores of a query but for rotary
# angles, and of the decay of a linear attention's heads (one process is off by 0.009 there if it accumulates).
ROUNDING = ("k_proj.bias", "linear_attn.A_log", "linear_attn.dt_bias")


def assert_equal_runs(
    run: Run, reference: Run, loss: float = 1e-5, grad_norm: float = 1e-4, weight: float = 0.01
) -> None:
    """Assert that two runs in fp32 are one and the same training, but for the order in which sums were taken.

    Args:
        loss, grad_norm: relative tolerances of every step.
        weight: tolerance of the final weights: the root mean square, over each tensor, of the difference, in units of
            the learning rate. An Adam step moves a weight by about the learning rate whatever the size of its
            gradient, so a weight whose gradient is all rounding error takes another step in each run, and no bound
            on a single weight can be tight. But a tensor that missed one of its updates is off by about 1.
    """
    for now, then in zip(run.records, reference.records, strict=True):
        for name in ("step", "epoch", "tokens"):
            assert now[name] == then[name], f"step {then['step']}: {name} {now[name]} != {then[name]}"
        for name, tolerance in {"loss": loss, "learning_rate": 1e-12, "grad_norm": grad_norm}.items():
            same = now[name] == pytest.approx(then[name], rel=tolerance, abs=0)
            assert same, f"step {then['step']}: {name} {now[name]} != {then[name]}"
    assert_alike_on_all_ranks(run)
    assert run.weights.keys() == reference.weights.keys()
    for name, then in reference.weights.items():
        error = (run.weights[name] - then).pow(2).mean().sqrt().item() / reference.config["learning_rate"]
        assert error <= weight * (5 if name.endswith(ROUNDING) else 1), f"{name} is off by {error:.2g} learning rates"


def assert_alike_on_all_ranks(run: Run) -> None:
    """Assert that what several ranks hold of a weight is the same in all of them, bit for bit."""
    unlike = [name for name, same in run.replicated.items() if not same]
    assert not unlike, f"replicated weights differ between TP ranks: {unlike}"
    unlike = [name for name, same in run.copies.items() if not same]
    assert not unlike, f"weights differ between DP ranks: {unlike}"


def differences(run: Run, reference: Run) -> tuple[float, float, float]:
    """The largest of two runs: of losses and norms, as shares; of weights, root mean squares in learning rates."""
    pairs = list(zip(run.records, reference.records, strict=True))
    losses = max(abs(now["loss"] / then["loss"] - 1) for now, then in pairs)
    norms = max(abs(now["grad_norm"] / then["grad_norm"] - 1) for now, then in pairs if then["grad_norm"])
    weights = [(run.weights[name] - then).pow(2).mean().sqrt().item() for name, then in reference.weights.items()]
    return losses, norms, max(weights) / reference.config["learning_rate"]


def assert_resumes_on_another_grid(whole: Run, folder: Path) -> None:
    """Assert that a run of 2 × 2, 6 steps and a checkpoint at 4, cut off there, takes the same steps as 1 × 2.

    Args:
        folder: for a copy of the run.
    """
    from tp2d_helpers.checkpoint.resize import convert
    from tp2d_helpers.checkpoint.run_folder import newest_checkpoint
    from tp2d_helpers.training.metrics import keep_until

    config = Config(**whole.config)
    shutil.copytree(config.run_dir, folder / "copy", ignore=shutil.ignore_patterns("logs", "heartbeats"))
    shutil.rmtree(folder / "copy" / "checkpoint_00000006")
    keep_until(folder / "copy" / "metrics.jsonl", 4)
    config = config.change(storage_path=str(folder), experiment_name="copy", tp_size=1, batch_size_per_gpu=1,
                           gradient_accumulation_steps=2)  # fmt: skip
    convert(newest_checkpoint(config.run_dir)[0])
    run_grid(config.model_dump())
    records = read_metrics(config.run_dir / "metrics.jsonl")
    for name in ("step", "tokens", "loss", "eval_loss"):
        then = [record[name] for record in whole.records if record[name] is not None]
        assert [record[name] for record in records if record[name] is not None] == pytest.approx(then, rel=1e-5)
    assert len(records) == 6
