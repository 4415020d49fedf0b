"""Can this cluster run this config? Asked on the driver, before a worker starts or a GPU is taken.

`preflight` connects to Ray, settles what is "auto", and checks the cluster, the model, the data and the storage, in the
order of what they cost. It ends in a table of what was found and what was chosen, or in one `ConfigError`.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tp2d_helpers import launchers
from tp2d_helpers.checkpoint.run_folder import last_step
from tp2d_helpers.checkpoint.settings import continue_run, record_run, same_model
from tp2d_helpers.config import OPTIMIZATIONS, Config, ConfigError
from tp2d_helpers.data.files import absolute_name
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.demo import demo_model, has_random_weights
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.preflight.batch import choose_batch, fit_batch
from tp2d_helpers.preflight.checks import (
    check_lora,
    check_memory,
    check_model,
    check_precision,
    check_resilience,
    check_versions,
    settled_precision,
)
from tp2d_helpers.preflight.cluster import (
    check_placement,
    check_replicas,
    check_resources,
    describe_cluster,
    describe_placement,
    free_cores,
    loopback_variables,
)
from tp2d_helpers.preflight.connection import connect
from tp2d_helpers.preflight.data import check_data, describe_left_out
from tp2d_helpers.preflight.folder import check_checkpoints, check_room, check_storage
from tp2d_helpers.preflight.nodes import check_environments
from tp2d_helpers.speed.optimizations import chosen_optimizations
from tp2d_helpers.training.elastic import first_size, possible_dp_sizes
from tp2d_helpers.training.schedule import check_schedule
from tp2d_helpers.training.trackers import check_trackers

# Learning rates that "auto" takes: what makes random weights learn would undo what pretrained ones have learned.
RANDOM_RATE, PRETRAINED_RATE, LORA_RATE = 1e-3, 1e-5, 2e-4  # adapters begin at zero, and so few take larger steps
SHARED_STORAGE = Path("/mnt/cluster_storage")  # on an Anyscale workspace, a disk that all its nodes share


@dataclass
class Plan:
    """What preflight settled: the config without "auto", and what Ray Train and the reader need besides."""

    config: Config
    model: ModelFacts
    resources_per_worker: dict[str, float]
    steps_per_epoch: int
    rows: list[tuple[str, str, str]] = field(default_factory=list)  # (what, found, chosen)

    @property
    def num_workers(self) -> int | tuple[int, int]:
        """Workers to start; (fewest, most) if the run may go on with fewer replicas."""
        tp_size, sizes = self.config.tp_size, possible_dp_sizes(self.config)
        return (sizes[0] * tp_size, sizes[-1] * tp_size) if self.config.min_dp_size else self.config.num_workers

    @property
    def checkpoint_score(self) -> dict[str, Any]:
        """By what Ray Train chooses the checkpoints to keep, as arguments of its `CheckpointConfig`."""
        by = self.config.keep_checkpoints_by
        return {} if by == "newest" else {"checkpoint_score_attribute": by, "checkpoint_score_order": "min"}

    @property
    def worker_runtime_env(self) -> dict[str, Any]:
        """Environment of the workers, whatever the driver's is: a GPU that is there may not be wanted."""
        device = {"DS_ACCELERATOR": "cuda"}
        if not self.config.use_gpu:
            device = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return {"env_vars": device | launchers.UNSET | loopback_variables()}


def preflight(config: Config) -> Plan:
    """Check everything that can be checked before the launch.

    Raises:
        ConfigError: for the first thing that can't work, with the value found and what would be right.
    """
    resources, given = connect(), config
    config, why = settle(config, resources)
    check_resilience(config)
    then, config = config, continue_run(config.change(precision=settled_precision(config, resources)))
    config = fit_batch(config)
    rows = [("versions", check_versions(), "")]
    workers = f"{config.num_workers} worker{'s' * (config.num_workers > 1)}"
    rows.append(("cluster", describe_cluster(resources), f"{workers} on {why}"))
    first = first_size(config, resources)
    resources_per_worker = check_resources(first, resources, free_cores(first.num_workers))
    counts = check_placement(first, resources_per_worker)
    check_replicas(config, resources_per_worker)
    check_environments(config)
    rows.append(("precision", *check_precision(then, resources)))
    model = ModelFacts.read(config.model_name, config.trust_remote_code)
    lora = check_lora(config, model)  # what can't have an adapter is refused before the model is tried with them
    rows += [("model", *check_model(config, model)), *lora]
    identity = same_model(config)
    config, chosen = choose_batch(config, model, resources)
    rows += [*check_memory(config, model, resources), *chosen]
    placement = describe_placement(config, model, counts)
    steps, data, *described = check_data(config, model)
    config = config.change(packing=data.packing, eval_samples=data.eval_samples)
    names, without = chosen_optimizations(config.model_dump(), config.use_gpu)
    rows.append(("speed", without, ", ".join(name for name in OPTIMIZATIONS if name in names) or "no optimizations"))
    rows += [*placement, ("data", *described)]
    schedule = check_schedule(config, last_step(config, steps))
    if given.learning_rate == "auto" or config.learning_rate_schedule != "constant":
        kind = "random weights" if has_random_weights(config.model_name) else "pretrained weights"
        rows.append(("learning rate", "LoRA" if config.lora_rank else kind, schedule))
    room = check_room(config, model, steps)
    rows.append(("storage", check_storage(config) + room, str(config.run_dir)))
    rows += check_trackers(config)
    rows += check_checkpoints(config, then, data.identity, steps)
    template = load_tokenizer(config.model_name, config.trust_remote_code, config.chat_template).chat_template
    record_run(config, data.identity, data.mask is not None, identity, template, describe_left_out(data))
    return Plan(config, model, resources_per_worker, steps, rows)


def settle(config: Config, resources: dict[str, float]) -> tuple[Config, str]:
    """Settle what is "auto": GPUs if there are, or may come, enough for tp × dp; the model and data that suit them."""
    gpus = int(resources.get("GPU", 0))
    enough = gpus >= config.num_workers or config.cluster_wait_seconds > 0
    use_gpu = config.use_gpu if config.use_gpu != "auto" else enough
    why = "GPUs" if use_gpu else f"CPU ({gpus} GPUs for {config.num_workers} workers)" if gpus else "CPU"
    model = {"auto": "Qwen/Qwen2.5-0.5B" if use_gpu else "demo"}.get(config.model_name, config.model_name)
    dataset = {"auto": "Salesforce/wikitext" if use_gpu else "demo"}.get(config.dataset_name, config.dataset_name)
    if model == "demo":
        model = str(demo_model())
    elif Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().absolute())
    elif model.startswith((".", "/", "~")):
        raise ConfigError(f"model_name = {model!r}: no such folder")
    dataset, evaluated = absolute_name(dataset), absolute_name(config.eval_dataset_name)
    template = config.chat_template  # or the name of one that the tokenizer has
    if Path(template).suffix or Path(template).expanduser().is_file():
        template = str(Path(template).expanduser().absolute())
    storage, name = config.storage_path, config.experiment_name
    if storage == "auto":
        storage = str(SHARED_STORAGE / "tp_autotp" if SHARED_STORAGE.is_dir() else Path("outputs").absolute())
    if name == "auto":
        name = f"tp_autotp_{time.strftime('%Y%m%d_%H%M%S')}_{uuid.uuid4().hex[:4]}"
    rate = config.learning_rate
    if rate == "auto":
        rate = LORA_RATE if config.lora_rank else RANDOM_RATE if has_random_weights(model) else PRETRAINED_RATE
    settled = dict(model_name=model, dataset_name=dataset, eval_dataset_name=evaluated, storage_path=storage,
                   experiment_name=name, chat_template=template)  # fmt: skip
    return config.change(use_gpu=use_gpu, learning_rate=rate, **settled), why
