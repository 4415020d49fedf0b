"""Run the notebook's `train_func` on a (dp, tp) grid of local processes, without a Ray cluster.

Ray Train's local mode runs a train function in a process that torchrun's variables describe. The processes are forked
from a server that has imported everything once, so a 2×2 run of a tiny model takes seconds and not a minute.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "tp_autotp.ipynb"
TIMEOUT = 300  # seconds for one run; a hang is a failure
PRELOAD = ["torch", "ray.train.torch", "deepspeed", "transformers.models.qwen2.modeling_qwen2", "datasets",
           "tp2d_helpers.preflight", "tp2d_helpers.metrics", "tp2d_helpers.checkpoint"]  # fmt: skip


def notebook_definitions(*tags: str) -> dict[str, Any]:
    """Execute the cells with these tags, in a namespace of their own, and return it: the code that is read is tested."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    found = {tag: [cell for cell in cells if tag in cell.metadata.get("tags", [])] for tag in tags}
    missing = [tag for tag, tagged in found.items() if not tagged]
    if missing:
        raise LookupError(f"{NOTEBOOK.name} has no cell tagged {missing}")
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for tag in tags:
        for cell in found[tag]:
            exec(compile(cell.source, f"{NOTEBOOK.name}[{tag}]", "exec"), namespace)
    return namespace


def run_grid(config: dict[str, Any], after: Callable[..., Any] | None = None, patch: Callable | None = None) -> list:
    """Train by `train_func` on config["tp_size"] × config["dp_size"] processes.

    Args:
        config: all settings, as `Config.model_dump()` gives them.
        after: called in every process as after(engine, tp_group, dp_group); must be importable.
        patch: called in every process before training, with the namespace of the notebook's definitions.

    Returns:
        What `after` returned, by rank.

    Raises:
        RuntimeError: with the trace of the first rank that failed, or if the run takes longer than `TIMEOUT`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = config["tp_size"] * config["dp_size"]
    ranks = []
    for rank in range(world):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world, port, config, after, patch, writer), daemon=True)
        process.start()
        writer.close()
        ranks.append((process, reader))
    try:
        answers = []
        for rank, (_, reader) in enumerate(ranks):
            if not reader.poll(TIMEOUT):
                raise RuntimeError(f"rank {rank} did not finish within {TIMEOUT} s")
            answers.append(pickle.loads(reader.recv_bytes()))
            if isinstance(answers[-1], BaseException):
                raise RuntimeError(f"rank {rank}: {answers[-1].args[0]}")
        return answers
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def _rank(rank: int, world: int, port: int, config: dict, after: Callable, patch: Callable, writer: Any) -> None:
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        import torch
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        torch.set_num_threads(1)
        names = notebook_definitions("imports", "train-func")
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
            engine, tp_group, dp_group, *_ = kept["setup"]
            kept["result"] = after(engine, tp_group, dp_group) if after else None

        run = RunConfig(name=config["experiment_name"], storage_path=config["storage_path"])
        TorchTrainer(train, train_loop_config=config, scaling_config=ScalingConfig(num_workers=0), run_config=run).fit()
        answer = kept["result"]
    except BaseException:
        answer = RuntimeError(traceback.format_exc())
    writer.send_bytes(pickle.dumps(answer))
    writer.close()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed and gloo threads may not end by themselves
