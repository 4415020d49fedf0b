"""Another grid for a run: the same global batch on other ranks, and a checkpoint cut anew.

DeepSpeed's files hold the shards of one grid. Its universal checkpoint holds every weight, master and moment whole, so
that each rank of any other grid takes its own part (Lian et al. 2024, Universal Checkpointing).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import constants, ds_to_universal
from torch.utils.serialization import config as serialization

from tp2d_helpers import heartbeat
from tp2d_helpers.cgroups import cores
from tp2d_helpers.checkpoint.disk import check_space
from tp2d_helpers.checkpoint.files import flush_folder, plain_path, read_json, write_json
from tp2d_helpers.checkpoint.run_folder import checkpoint_tag
from tp2d_helpers.checkpoint.settings import fit_global_batch
from tp2d_helpers.checkpoint.shards import SAFE
from tp2d_helpers.config import make_config

UNIVERSAL = "universal"
LIST = "contents.json"  # in it; `files.json` was that of a form which loads at the ZeRO stage it is of only
STAGE_3 = "zero_pp_rank_0_"  # what stage 3 puts in front of the names of DP rank 0's files


def fit_to_world(config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The settings for the workers there are: dp_size from their number, accumulation so that the global batch stays.

    Raises:
        ConfigError: if they don't make whole TP groups, or the global batch can't be divided so.
    """
    planned = make_config(**config)
    if world_size == planned.num_workers:
        return config
    if world_size % planned.tp_size:
        raise ValueError(f"{world_size} workers don't make whole TP groups of {planned.tp_size}")
    config = planned.change(dp_size=world_size // planned.tp_size)
    return fit_global_batch(config, planned.samples_per_step).model_dump()


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """Within it, `torch.load` executes nothing from a file but the classes in `SAFE`, whatever its caller asks for."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(SAFE):
            yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def universal_checkpoint(checkpoint: str | Path) -> str:
    """Convert a checkpoint for other grids, beside its files, unless that was done before; return the tag to load.

    In a process of its own: it reads the files as mapped memory, which DeepSpeed offers no other way to ask for. What
    that process prints, its progress among it, is this rank's progress.

    Raises:
        RuntimeError: if it can't be converted; the message has the last line of what was printed.
    """
    if universal_problem(Path(checkpoint)):
        command = [sys.executable, "-m", "tp2d_helpers.checkpoint.resize", str(checkpoint), "--with-parent"]
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]  # it may be Ray that brought it
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = b""
        with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as child:
            while new := child.stderr.read1():
                heartbeat.pulse()
                said = (said + new)[-5000:]
        if child.returncode:
            raise RuntimeError(f"{checkpoint} can't be converted: {(said.decode().strip().splitlines() or ['?'])[-1]}")
    return UNIVERSAL


def universal_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint has no universal form that can be loaded, in a few words; None if it has one.

    `convert` writes a list of the files and their sizes last. One that an earlier version left has no such list.
    """
    listed = read_json(checkpoint / UNIVERSAL / LIST)
    if not listed:
        return "is not there, or was not finished"
    if listed["of"] != _made_of(checkpoint):
        return "is of another checkpoint"
    for name, size in listed["files"].items():
        path = checkpoint / UNIVERSAL / name
        if not path.exists() or path.stat().st_size != size:
            return f"has {name} missing or truncated"
    return None


def convert(checkpoint: Path, workers: int = 1) -> Path:
    """Write a checkpoint's universal form into its folder `universal`, which appears when it is complete.

    It is made in a folder that no other process writes to. What others left of theirs is removed: the run has one
    writer, and its predecessors' conversions ended with them.
    """
    universal = checkpoint / UNIVERSAL
    for left in checkpoint.glob(f"{UNIVERSAL}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    check_space(checkpoint, universal_bytes(checkpoint)[0], "its form for another grid")
    scratch = checkpoint / f"{UNIVERSAL}.{uuid.uuid4().hex}.tmp"
    try:
        with plain_path(checkpoint) as place:
            _convert(place, scratch.name, workers)
        files = [path for path in scratch.rglob("*") if path.is_file()]
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sizes = {str(path.relative_to(scratch)): path.stat().st_size for path in files}
        write_json(scratch / LIST, {"of": _made_of(checkpoint), "files": sizes})
        shutil.rmtree(universal, ignore_errors=True)
        scratch.rename(universal)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        (checkpoint / "latest_universal").unlink(missing_ok=True)  # names the scratch folder
    flush_folder(checkpoint)
    return universal


def universal_bytes(checkpoint: Path) -> tuple[float, float]:
    """What a conversion takes of the disk: (at its peak, at its end). Measured at ZeRO stages 1 to 3.

    Masters and moments are there in pieces and, beside these, whole; of one replica at stage 3 once more.
    """
    tag = checkpoint_tag(checkpoint)
    files = list(tag.glob("*optim_states.pt"))
    whole = sum(path.stat().st_size for path in files)
    alone = any(tag.glob(f"{STAGE_3}*model_states.pt")) and not any(tag.glob("*zero_pp_rank_1_mp_rank_*"))
    return (3 if alone else 2) * whole, whole


def _convert(checkpoint: Path, scratch: str, workers: int) -> None:
    """Make the universal form in the checkpoint's folder `scratch`."""
    # Without AutoTP (tp_size 1) DeepSpeed does not say how parameters are cut: "missing state" stands for: not at all.
    arguments = argparse.Namespace(
        input_folder=str(checkpoint_tag(checkpoint)), output_folder=str(checkpoint / scratch),
        num_extract_workers=workers, num_merge_workers=workers,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with safe_loading(), serialization.patch(**{"load.mmap": True}), contextlib.redirect_stdout(sys.stderr):
        ds_to_universal.main(arguments)
        _complete(checkpoint / scratch, workers)


def _complete(scratch: Path, workers: int) -> None:
    """Make one form of the two that DeepSpeed's converter writes, one for ZeRO stage 3 and one for stages 1 and 2.

    They differ in file names and in the place of AdamW's step: with each weight, or with the optimizer's states (where
    stage 3 also leaves those of rank 0). And what was saved at stage 3 and tp_size 1 is flat, so that it could not be
    cut for another tp_size.
    """
    for path in scratch.glob("*_model_states.pt"):
        model = torch.load(path)
        path.unlink()
        name = path.name.removeprefix(STAGE_3)
        if name.startswith("mp_rank_"):  # not of other DP ranks, which have the same
            model["module"] = {}  # the weights are loaded from the folder `zero`
            for prefix in ("", STAGE_3):
                torch.save(model, scratch / f"{prefix}{name}")
            shapes = model[constants.PARAM_SHAPES]
    zero = scratch / "zero"
    optimizer = torch.load(zero / "optimizer_state.pt", mmap=False)
    optimizer.pop(constants.FP32_FLAT_GROUPS, None)
    base = optimizer.get(constants.OPTIMIZER_STATE_DICT)
    step = base["state"][0]["step"] if base else torch.load(next(zero.rglob("step.pt")))
    common = {"state": {0: {"step": step}}, constants.PARAM_GROUPS: optimizer[constants.PARAM_GROUPS]}
    optimizer |= {constants.OPTIMIZER_STATE_DICT: common, constants.DS_VERSION: model[constants.DS_VERSION]}
    torch.save(optimizer, zero / "optimizer_state.pt")

    def complete(name: str, shape: torch.Size) -> None:
        """Give a weight of stage 3 its shape and step."""
        torch.save(step, zero / name / "step.pt")
        for path in (zero / name / f"{state}.pt" for state in ("fp32", "exp_avg", "exp_avg_sq")):
            if torch.is_tensor(value := torch.load(path)):
                torch.save({constants.PARAM: value.view(shape).clone()}, path)  # it was the file, as mapped memory

    if base:
        with ThreadPoolExecutor(workers) as pool:
            for group in shapes:
                list(pool.map(complete, group.keys(), group.values()))


def _made_of(checkpoint: Path) -> dict[str, Any]:
    """What tells a checkpoint from another in a folder of the same name."""
    manifest = read_json(checkpoint / "rank_0.json")
    return {name: manifest.get(name) for name in ("run_id", "step", "tp_size", "dp_size", "zero_stage", "files")}


def end_with_parent() -> None:
    """End this process and all that it starts as soon as the other end of its standard input is gone."""

    def wait() -> None:
        """Read until the other end is closed; then end the process group."""
        while os.read(0, 1024):  # not sys.stdin, whose lock would be held at the end
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a checkpoint so that it loads on any grid.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--workers", type=int, default=min(8, cores()))
    parser.add_argument("--with-parent", action="store_true", help="end as soon as standard input does")
    options = parser.parse_args()
    if options.with_parent:
        end_with_parent()
    print(convert(options.checkpoint, options.workers))
