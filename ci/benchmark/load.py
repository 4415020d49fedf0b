"""Host memory of each rank while a model is loaded and sharded, for several tp_size: it should follow 1/tp.

    python ci/benchmark/load.py --shape llama-3-70b --layers 1 --vocabulary 8192 --tp 1,2,4 --out load.json

Runs on CPUs. Anonymous memory is what a rank has for itself; mapped files are shared by the ranks of a node. With few
layers and a small vocabulary, a shape's own widths are measured, and the rest follows by the number of parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs import Job


def memory() -> tuple[int, int]:
    """(anonymous, mapped from files) bytes of this process that are in memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(lines[name].split()[0]) for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


class Peak:
    """The most memory while it is entered, beyond what was there before."""

    def __enter__(self) -> Peak:
        self.before, self.peak, self.done = memory(), [0, 0], threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = [max(old, new) for old, new in zip(self.peak, self.more(), strict=True)]

    def more(self) -> list[int]:
        """What there is now beyond what there was."""
        return [now - then for now, then in zip(memory(), self.before, strict=True)]

    def __exit__(self, *_: Any) -> None:
        self.after = self.more()
        self.done.set()
        self.thread.join()


def worker(path: Path) -> None:
    """On each rank: set the engine up, and note what that took."""
    import torch.distributed as dist
    from candidate import wait_for_turn

    from tp2d_helpers.model.engine import setup_model_with_autotp

    job, rank, world = json.loads(path.read_text()), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    wait_for_turn(job)
    dist.init_process_group("gloo")
    config = dict(tp_size=world, dp_size=1, batch_size_per_gpu=1, precision="bf16", optimizations="none")
    with Peak() as peak:
        engine, *_ = setup_model_with_autotp(job["model"], world, 1, rank, world, config)
    shard = sum(parameter.numel() for parameter in engine.module.parameters())
    found = [0.0] * world
    dist.all_gather_object(found, peak.peak[0])
    if rank == 0:
        held = dict(parameters_per_rank=shard, anonymous_peak=max(found), anonymous_after=peak.after[0])
        Path(job["result"]).write_text(json.dumps(held | dict(mapped_peak=peak.peak[1])))
    dist.barrier()
    os._exit(0)


def build(options: argparse.Namespace, folder: Path) -> int:
    """Write the model with random bf16 weights; return its number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tp2d_helpers.demo import SHAPES

    fields = dict(SHAPES[options.shape])
    fields["num_hidden_layers"] = options.layers or fields["num_hidden_layers"]
    fields["vocab_size"] = options.vocabulary or fields["vocab_size"]
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()  # what is in them doesn't count here
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """The command line."""
    from inputs import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-70b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tp", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--scratch", type=Path, default=Path("outputs/load"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    folder = options.scratch.absolute()
    report = dict(
        date=time.strftime("%Y-%m-%d"), versions=environment()["versions"], shape=options.shape, layers=options.layers,
        vocabulary=options.vocabulary, parameters=build(options, folder / "model"), runs=[],
    )  # fmt: skip
    for tp in options.tp:
        env = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        job = Job("load.py", {"model": str(folder / "model")}, tp, folder / f"tp{tp}", env)
        job.release()
        error = job.wait(600)
        report["runs"].append(dict(tp=tp, error=error) | job.found())
        print(report["runs"][-1], flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    worker(Path(sys.argv[1])) if "RANK" in os.environ else main()
