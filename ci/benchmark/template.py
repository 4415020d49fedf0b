"""The published AutoTP template: its settings in an engine of a few lines, and its own code cells as they are.

    python ci/benchmark/template.py <job.json>     run the cells of the notebook job["notebook"] through Ray Train

The cells are read from the notebook when it runs; nothing of them is kept here.
"""

from __future__ import annotations

import collections
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CELLS = (7, 9, 11, 13, 15)  # imports, data, engine, checkpoints, train_func


def settings_config(job: dict[str, Any], bf16: bool) -> dict[str, Any]:
    """The template's DeepSpeed config."""
    config: dict[str, Any] = {
        "train_batch_size": job["micro_batch"] * job["accumulation"] * job["dp"],
        "train_micro_batch_size_per_gpu": job["micro_batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": job["zero"], "overlap_comm": True},
        "tensor_parallel": {"autotp_size": job["tp"]},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if bf16:
        config["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return config


def settings_trainer(job: dict[str, Any], rank: int) -> Any:
    """The template's settings: weights, gradients and Adam's states in bf16, plain AdamW, eager, the mask passed."""
    import deepspeed
    import torch
    from trainer import Trainer
    from transformers import AutoModelForCausalLM

    from tp2d_helpers.model.mpu import ModelParallelUnit

    cuda = torch.cuda.is_available()
    if not cuda:  # else DeepSpeed compiles, for half a minute, a kernel that only inference uses
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    mpu = ModelParallelUnit.from_grid(job["tp"], job["dp"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16 if cuda else torch.float32)
    model = model.to(device)  # whole, on every GPU, before it is sharded
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings_config(job, cuda), mpu=mpu)
    engine.train()

    def step(micro_batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        losses = []
        for batch in micro_batches:
            ids = batch["input_ids"].to(device)
            loss = engine(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    held, width = sum(parameter.numel() for parameter in engine.module.parameters()), 2 if cuda else 4
    return Trainer(
        config=model.config,
        dp_rank=mpu.dp_rank,
        step=step,
        update=(engine, "step"),
        norm=engine.get_global_grad_norm,
        state_bytes=width * held * (1 + 3 / job["dp"]),  # weights, and masters and two moments in the same dtype
    )


class Watch:
    """Notes each step's begin, loss and positions, from outside of the template's cells.

    A step lasts from the call of the engine to the next. The template itself waits for the GPU in each step, to read
    the loss, so that host times are right.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.began = job, time.time()
        self.begins: list[float] = []
        self.masks: list[Any] = []
        self.losses: list[Any] = []
        self.found: dict[str, Any] = {}

    def before(self, _: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """As the engine is called."""
        self.begins.append(time.perf_counter())
        self.masks.append(kwargs["attention_mask"])

    def after(self, _: Any, args: tuple, output: Any) -> None:
        """As the engine returns."""
        self.losses.append(output.loss.detach())

    def built(self, engine: Any) -> None:
        """As the engine is there: note its memory, and watch its calls."""
        import torch

        self.found.update(init_peak_gib=peak_gib(), setup_seconds=time.time() - self.began)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        engine.register_forward_pre_hook(self.before, with_kwargs=True)
        engine.register_forward_hook(self.after)

    def write(self, *_: Any, **__: Any) -> None:
        """In place of a checkpoint. Collective."""
        import torch
        import torch.distributed as dist

        peak = torch.tensor(peak_gib() or 0.0, device=self.losses[0].device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            self.found.update(
                begins=self.begins,
                losses=[loss.item() for loss in self.losses],
                useful=[int(mask.sum()) for mask in self.masks],
                positions=[mask.numel() for mask in self.masks],
                peak_gib=peak.item() or None,
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
            )
            Path(self.job["raw"]).write_text(json.dumps(self.found))


def instrument(names: dict[str, Any], job: dict[str, Any]) -> None:
    """Let the functions of the cells be watched; where they would save a checkpoint, what was seen is written."""
    watch, setup = Watch(job), names["setup_model_with_autotp"]

    @functools.wraps(setup)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        watch.built(result[0])
        return result

    names.update(setup_model_with_autotp=watched, save_checkpoint=watch.write)


def peak_gib() -> float | None:
    """Most GPU memory allocated so far, None on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def run_cells(config: dict[str, Any]) -> None:
    """On a Ray Train worker: execute the notebook's cells in a namespace of their own, and their `train_func`."""
    import json
    import sys
    from pathlib import Path

    job = config.pop("job")
    sys.path.insert(0, job["here"])
    from template import CELLS, instrument

    cells = json.loads(Path(job["notebook"]).read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "published_template"}
    for index in CELLS:
        exec(compile("".join(cells[index]["source"]), f"published_template[{index}]", "exec"), names)
    instrument(names, job)
    names["train_func"](config)


def result_of(raw: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """The record of a run, as `candidate.py` writes them. The positions are rank 0's; other replicas have as many."""
    from tp2d_helpers.model.facts import ModelFacts
    from tp2d_helpers.speed.devices import device_named

    device = device_named(raw["gpu"] or "")
    seconds = [b - a for a, b in zip(raw["begins"], raw["begins"][1:], strict=False)]
    useful, positions = raw["useful"][:-1], raw["positions"][:-1]
    return dict(
        step_ms=[1e3 * s for s in seconds],
        useful_tokens=[n * job["dp"] for n in useful],
        tokens=[n * job["dp"] for n in positions],
        losses=raw["losses"],
        peak_gib=raw["peak_gib"],
        init_peak_gib=raw["init_peak_gib"],
        setup_seconds=raw["setup_seconds"],
        flops_per_token=ModelFacts.read(job["model"]).flops_per_token(job["seq"]),
        peak_flops=device and device.peak,
    )


def main() -> None:
    """Run a job on its tp × dp workers."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from tp2d_helpers.preflight.connection import connect

    job = json.loads(Path(sys.argv[1]).read_text())
    while not Path(job["go"]).exists():
        time.sleep(0.05)
    gpus = connect().get("GPU", 0) > 0
    workers = job["tp"] * job["dp"]
    config = dict(
        model_name=job["model"], dataset_name=job["text"], dataset_percentage=100.0, tp_size=job["tp"],
        dp_size=job["dp"], batch_size_per_gpu=job["micro_batch"], seq_length=job["seq"], num_epochs=1,
        learning_rate=1e-5, weight_decay=0.01, log_interval=5, debug_steps=job["steps"], seed=42,
        job={**job, "here": str(Path(__file__).resolve().parent)},
    )  # fmt: skip
    resources = {"GPU": 1} if gpus else {"CPU": 1}
    scaling = ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker=resources)
    storage = RunConfig(name="template", storage_path=str(Path(job["raw"]).parent / "ray"))
    TorchTrainer(run_cells, train_loop_config=config, scaling_config=scaling, run_config=storage).fit()
    raw = json.loads(Path(job["raw"]).read_text())
    Path(job["result"]).write_text(json.dumps(result_of(raw, job)))
    ray.shutdown()


if __name__ == "__main__":
    main()
