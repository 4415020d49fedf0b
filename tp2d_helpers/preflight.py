"""Can this cluster run this config? Asked on the driver, before a worker starts or a GPU is taken.

`preflight` connects to Ray, settles what is "auto", and checks the cluster, the model, the data and the storage, in the
order of what they cost. It ends in a table of what was found and what was chosen, or in one `ConfigError`.
"""

from __future__ import annotations

import importlib.metadata
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from packaging.version import Version

from tp2d_helpers.cluster import (
    check_placement,
    check_resources,
    connect,
    describe_cluster,
    describe_placement,
    loopback_variables,
)
from tp2d_helpers.config import OPTIMIZATIONS, Config, ConfigError
from tp2d_helpers.dataloader import GlobalBatchSampler, TokenDataset
from tp2d_helpers.demo import demo_model
from tp2d_helpers.elastic import first_size, possible_dp_sizes
from tp2d_helpers.engine import chosen_optimizations, load_config
from tp2d_helpers.fit import check_gpu_memory
from tp2d_helpers.planner import parameter_count
from tp2d_helpers.run_folder import RESIZABLE, continue_run, record_run
from tp2d_helpers.sharding import sharding_plan
from tp2d_helpers.storage import check_checkpoints, check_storage
from tp2d_helpers.tokens import load_tokenizer, prepare_tokens

# Older ones lack what the run relies on (AutoTP by the model's plan with ZeRO, Ray Train V2), or were not tested.
OLDEST = {"torch": "2.11", "transformers": "5.17", "deepspeed": "0.19.8", "ray": "2.60"}
SHARED_STORAGE = Path("/mnt/cluster_storage")  # on an Anyscale workspace, a disk that all its nodes share
PRE_AMPERE = {"K80", "P4", "P100", "V100", "T4"}  # no bf16 in hardware
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or, if it is in parts, the index: *.index.json


@dataclass
class Plan:
    """What preflight settled: the config without "auto", and what Ray Train and the reader need besides."""

    config: Config
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
        return {"env_vars": device | loopback_variables()}


def preflight(config: Config) -> Plan:
    """Check everything that can be checked before the launch.

    Raises:
        ConfigError: for the first thing that can't work, with the value found and what would be right.
    """
    resources = connect()
    config, why = choose(config, resources)
    check_resilience(config)
    then, config = config, continue_run(config)
    rows = [("versions", check_versions(), "")]
    rows.append(("cluster", describe_cluster(resources), f"{config.num_workers} workers on {why}"))
    first = first_size(config, resources)
    resources_per_worker = check_resources(first, resources)
    counts = check_placement(first, resources_per_worker)
    rows.append(("precision", *check_precision(config, resources)))
    rows.append(("model", *check_model(config)))
    rows += check_gpu_memory(config, resources)
    names, without = chosen_optimizations(config.model_dump(), config.use_gpu)
    rows.append(("speed", without, ", ".join(name for name in OPTIMIZATIONS if name in names) or "no optimizations"))
    rows += describe_placement(config, counts)
    steps, *described = check_data(config)
    rows.append(("data", *described))
    rows.append(("storage", check_storage(config), str(config.run_dir)))
    rows += check_checkpoints(config, then)
    record_run(config)
    return Plan(config, resources_per_worker, steps, rows)


def check_resilience(config: Config) -> None:
    """Settings of evaluation, checkpoints and elasticity that contradict each other.

    Raises:
        ConfigError: for the first of them.
    """
    if config.keep_checkpoints_by == "eval_loss" and not config.eval_samples:
        raise ConfigError("keep_checkpoints_by = 'eval_loss': nothing is evaluated; set eval_samples, say to 16")
    if config.eval_interval and not config.eval_samples:
        raise ConfigError(f"eval_interval = {config.eval_interval}: eval_samples is 0; set it, say to 16")
    if config.min_dp_size > config.dp_size:
        raise ConfigError(f"min_dp_size = {config.min_dp_size}: must not be above dp_size, which is {config.dp_size}")
    if config.min_dp_size and config.zero_stage not in RESIZABLE:
        raise ConfigError(f"min_dp_size = {config.min_dp_size}: needs zero_stage 1 or 2, and it is {config.zero_stage}")


def check_versions() -> str:
    """The versions of the libraries that matter. Raises `ConfigError` for one older than what was tested."""
    found = {name: importlib.metadata.version(name) for name in OLDEST}
    for name, version in found.items():
        if Version(version) < Version(OLDEST[name]):
            raise ConfigError(f"{name} {version}: too old, {OLDEST[name]} is needed (pip install -r requirements.txt)")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def choose(config: Config, resources: dict[str, float]) -> tuple[Config, str]:
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
    if Path(dataset).expanduser().exists():  # the workers have another working directory
        dataset = str(Path(dataset).expanduser().absolute())
    storage, name = config.storage_path, config.experiment_name
    if storage == "auto":
        storage = str(SHARED_STORAGE / "tp_autotp" if SHARED_STORAGE.is_dir() else Path("outputs").absolute())
    if name == "auto":
        name = f"tp_autotp_{time.strftime('%Y%m%d_%H%M%S')}_{uuid.uuid4().hex[:4]}"
    settled = dict(model_name=model, dataset_name=dataset, storage_path=storage, experiment_name=name)
    return config.change(use_gpu=use_gpu, **settled), why


def check_model(config: Config) -> tuple[str, str]:
    """(what the model is, how it will be divided). Raises `ConfigError` if that can't be done."""
    hf_config = load_config(config.model_name, config.trust_remote_code)
    limit = getattr(hf_config, "max_position_embeddings", None)
    if limit and config.seq_length > limit:
        raise ConfigError(f"seq_length = {config.seq_length}: the model's positions end at {limit}")
    if config.tp_size > 1:
        sharding_plan(hf_config, config.tp_size)
        vocabulary = hf_config.get_text_config().vocab_size
        if vocabulary % config.tp_size:
            raise ConfigError(f"tp_size = {config.tp_size}: must divide the vocabulary of {vocabulary} tokens")
    tokenizer = load_tokenizer(config.model_name, config.trust_remote_code)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what transformers makes of a folder without one
        raise ConfigError(f"model_name = {config.model_name!r}: has no tokenizer (tokenizer.json, or its older files)")
    if not _has_weights(config.model_name):
        raise ConfigError(f"model_name = {config.model_name!r}: has no weights ({' or '.join(WEIGHT_FILES)})")
    try:
        size = parameter_count(hf_config)
    except ValueError as error:
        raise ConfigError(
            f"model_name = {config.model_name!r}: {hf_config.model_type!r} is not a model that "
            f"AutoModelForCausalLM builds ({str(error).splitlines()[0]})"
        ) from error
    name = Path(config.model_name).name if Path(config.model_name).is_dir() else config.model_name
    shards = f"{config.tp_size} shard{'s' * (config.tp_size > 1)}"
    replicas = f"{config.dp_size} replica{'s' * (config.dp_size > 1)}"
    return f"{name}: {hf_config.model_type}, {size:,} parameters", (
        f"{shards} × {replicas}, ZeRO stage {config.zero_stage}"
    )


def _has_weights(name: str) -> bool:
    files = [file + suffix for file in WEIGHT_FILES for suffix in ("", ".index.json")]
    if Path(name).is_dir():
        return any((Path(name) / file).exists() for file in files)
    return not is_offline_mode() or any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def check_data(config: Config) -> tuple[int, str, str]:
    """(steps per epoch, what the data is, how it is cut). Tokenises it if this node hasn't yet.

    Raises:
        ConfigError: if it can't be read, is smaller than one global batch, or has tokens that the model doesn't know.
    """
    folder = prepare_tokens(
        config.model_name,
        config.dataset_name,
        config.dataset_config,
        config.text_column,
        config.dataset_percentage,
        config.trust_remote_code,
    )
    data, size = TokenDataset(folder, config.seq_length, config.packing), config.global_batch_size
    kind = "packed" if config.packing else "padded"
    if len(data) - config.eval_samples < size:
        held_out = f", {config.eval_samples} of them held out (eval_samples)" if config.eval_samples else ""
        raise ConfigError(
            f"dataset_name = {config.dataset_name!r}: {len(data)} {kind} samples of {config.seq_length} tokens "
            f"({len(data.tokens):,} tokens in all){held_out}, fewer than one global batch of {size} "
            f"(batch_size_per_gpu {config.batch_size_per_gpu} × dp_size {config.dp_size} × "
            f"gradient_accumulation_steps {config.gradient_accumulation_steps}). Take a smaller one, shorter samples "
            "or more data."
        )
    vocabulary = load_config(config.model_name, config.trust_remote_code).get_text_config().vocab_size
    highest = max(int(data.tokens.max()), 0 if config.packing else data.pad)
    if highest >= vocabulary:
        raise ConfigError(
            f"model_name = {config.model_name!r}: its tokenizer gives id {highest}, the model has {vocabulary} ids; "
            "take the tokenizer that belongs to the model, or resize the model's embeddings"
        )
    steps = GlobalBatchSampler(len(data) - config.eval_samples, size, 1, 0, 1, config.seed).steps_per_epoch
    steps = min(steps, config.debug_steps or steps)
    return (
        steps,
        f"{config.dataset_name}: {len(data.tokens):,} tokens, {len(data):,} {kind} samples of {config.seq_length}",
        f"{steps} steps per epoch, {size} samples each",
    )


def check_precision(config: Config, resources: dict[str, float]) -> tuple[str, str]:
    """(what the devices compute in, what the run will), by the GPU types that Ray reports.

    Raises:
        ConfigError: for bf16 master weights of a run that doesn't compute in bf16, and for fp16 on a CPU without it.
    """
    old = config.use_gpu and PRE_AMPERE & {name.partition(":")[2] for name in resources}
    device = "fp32" if not config.use_gpu else "fp16" if old else "bf16"
    precision = device if config.precision == "auto" else config.precision
    if config.master_weights == "bf16" and precision != "bf16":
        raise ConfigError(
            f"master_weights = 'bf16': this run computes in {precision} (precision = {config.precision!r}); "
            "bf16 masters need precision 'bf16', all others take master_weights 'fp32'"
        )
    if precision == "fp16" and not (config.use_gpu or CPU_Accelerator().is_fp16_supported()):
        raise ConfigError("precision = 'fp16': this CPU lacks instructions for it (AVX512-FP16); take 'fp32' or 'bf16'")
    found = "CPU" if not config.use_gpu else f"{'no ' if old else ''}bf16 in hardware"
    precision += " with loss scaling" if precision == "fp16" else ""
    return found, f"{precision}, {config.master_weights} master weights, {'NCCL' if config.use_gpu else 'gloo'}"
