"""What a run is set to: recorded in its folder and in each checkpoint, and compared when the run is continued.

Some settings are the run's identity and must stay, as must its data. The global batch stays too, once there is a
checkpoint. Everything else may change, and what is set now counts.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from tp2d_helpers.checkpoint.card import versions
from tp2d_helpers.checkpoint.files import write_json
from tp2d_helpers.checkpoint.identity import check_model, model_identity
from tp2d_helpers.checkpoint.run_folder import check_origin, newest_checkpoint, read_manifest, recorded
from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.data.chat.template import settled_date

# What must not change between the start of a run and its resumption: the data order and the optimizer depend on it. The
# grid, the micro-batch and the ZeRO stage may (`tp2d_helpers.checkpoint.resize`), as long as the global batch stays.
IDENTITY = ("packing", "seq_length", "seed", "eval_samples", "precision", "master_weights",
            "lora_rank", "lora_alpha", "lora_targets")  # fmt: skip
# What these name is told by its contents, which the run records under these names. A run of an older version, which
# recorded none, is told by the settings themselves.
CONTENTS = {"model": ("model_name",),
            "data": ("dataset_name", "dataset_config", "text_column", "text_files", "dataset_percentage",
                     "eval_dataset_name")}  # fmt: skip
GRID = ("tp_size", "dp_size", "zero_stage")
BATCH = ("batch_size_per_gpu", "dp_size", "gradient_accumulation_steps", "global_batch_size")  # what a step takes


def record_run(
    config: Config,
    data: dict[str, Any] | None = None,
    chats: bool = False,
    model: dict[str, Any] | None = None,
    template: str | dict[str, str] | None = None,
    left_out: list[str] | None = None,
) -> None:
    """Write settings and versions into the run's folder, for those who continue it, and its checkpoints' id.

    Where `config.json` was lost and the user trusts the checkpoints, it is the id that the newest one bears.

    Args:
        data: what was tokenised (`TokenDataset.identity`).
        chats: whether it is chats.
        model: what training begins with (`model_identity`).
        template: the chat template.
        left_out: what of the rows is not trained on, in words.
    """
    newest, _ = newest_checkpoint(config.run_dir)
    run_id = recorded(config.run_dir).get("run_id") or (newest and read_manifest(newest).get("run_id"))
    settings = {
        **config.model_dump(),
        "data": data,
        "chats": chats,
        "model": model,
        "template": template,
        "left_out": left_out,
        "versions": versions(),
        "run_id": run_id or uuid.uuid4().hex,
    }
    write_json(config.run_dir / "config.json", settings)


def settings_of(run_dir: Path, checkpoint: Path | None) -> dict[str, Any]:
    """What was recorded when a checkpoint was written, with the precision it was; without one, at the last launch."""
    manifest = read_manifest(checkpoint) if checkpoint else {}
    then = manifest.get("settings") or recorded(run_dir)
    return then | {name: manifest[name] for name in ("precision",) if then and name in manifest}


def continue_run(config: Config) -> Config:
    """Fit a config to the run that is in its folder, if there is one.

    From its first checkpoint on, a run's global batch stays: given another grid or micro-batch,
    `gradient_accumulation_steps` follows, or where the micro-batch is "auto", preflight chooses both. Before that,
    nothing has been trained that it could be at odds with.

    Raises:
        ConfigError: if the config would not continue that run (with the settings that differ), or the checkpoint can't
            be loaded.
    """
    newest, _ = newest_checkpoint(config.run_dir)
    if newest and not (recorded(config.run_dir) or config.trust_checkpoint):
        raise ConfigError(
            f"experiment_name = {config.experiment_name!r}: {config.run_dir} holds checkpoints, but no "
            f"config.json that says they are this run's. Restore it (its run_id was "
            f"{read_manifest(newest).get('run_id')!r}), set trust_checkpoint to True if you know where they come from, "
            "or take another experiment_name"
        )
    if newest:
        check_origin(newest, config.trust_checkpoint)
    found = settings_of(config.run_dir, newest)
    for name in ("packing", "eval_samples"):  # as the run began, whatever "auto" would be now
        if getattr(config, name) == "auto":
            config = config.change(**{name: found.get(name, "auto")})
    if config.chat_date == "auto":
        config = config.change(chat_date=found.get("chat_date") or settled_date())
    now = config.model_dump()
    by_name = [name for kind, names in CONTENTS.items() if not found.get(kind) for name in names]
    names = [name for name in (*by_name, *IDENTITY) if name in found and found[name] != now[name]]
    if "auto" in (found.get("precision"), now["precision"]):  # not known before the launch: see `load_checkpoint`
        names = [name for name in names if name != "precision"]
    differing = [f"{name}: {found[name]!r} then, {now[name]!r} now" for name in names]
    if differing:
        raise ConfigError(
            f"experiment_name = {config.experiment_name!r}: {config.run_dir} holds a run with other settings "
            f"({'; '.join(differing)}). Take another experiment_name, or the same settings to continue that run."
        )
    if not (newest and found):
        return config
    if found.get("zero_stage") == 0:
        raise ConfigError(
            f"experiment_name = {config.experiment_name!r}: the run was made with zero_stage 0, whose checkpoints "
            "DeepSpeed loads nowhere else. Export it, and begin a run with the export as model_name"
        )
    then = make_config(**{name: found[name] for name in BATCH if name in found})
    samples = then.samples_per_step
    if config.global_batch_size not in (0, samples):
        raise ConfigError(
            f"global_batch_size = {config.global_batch_size}: the run's is {samples}, and stays as it was when the run "
            f"began; take {samples} or 0, or another experiment_name"
        )
    if config.batch_size_per_gpu == "auto":
        return config.change(global_batch_size=samples)
    return fit_global_batch(config, samples)


def changes(then: dict[str, Any], config: Config) -> str:
    """The settings that are not what they were, `name then → now`; "" if none. What now is set counts.

    Args:
        then: what was recorded, by name.
    """
    now = config.model_dump(exclude={"storage_path", "experiment_name"})  # the folder may have been moved
    return ", ".join(f"{k} {then[k]!r} → {v!r}" for k, v in now.items() if k in then and then[k] != v)


def must_stay(kind: str, then: dict[str, Any], config: Config, newest: Path | None) -> bool:
    """Whether a run's model or data ("model", "data") must be what it was: once it has a checkpoint, whatever it is
    called; before, if it is called otherwise, as a name that was taken before may be meant for another run.
    """
    now = config.model_dump(include={*CONTENTS[kind]})
    return bool(newest) or any(then.get(name, value) != value for name, value in now.items())


def same_model(config: Config) -> dict[str, Any]:
    """The identity of the config's model, which is that of the run in its folder, if there is one.

    Raises:
        ConfigError: if it is not.
    """
    newest, _ = newest_checkpoint(config.run_dir)
    then, now = settings_of(config.run_dir, newest), model_identity(config.model_name, config.trust_remote_code)
    if must_stay("model", then, config, newest):
        check_model(then, now, config.model_name, cure=", or take another experiment_name")
    return now


def check_same_data(then: dict[str, Any] | None, now: dict[str, Any], dataset_name: str) -> None:
    """Refuse data that is not what the run was trained on, whatever it is called. Each is a `TokenDataset.identity`.

    Raises:
        ConfigError: with both.
    """

    def describe(data: dict[str, Any] | None) -> str:
        """An identity in words."""
        if not data:
            return "documents of dataset_name"
        date = f", whose chat template wrote the date {data['date']}" if data.get("date") else ""
        return f"{data['documents']:,} documents of {data['tokens']:,} tokens, SHA-256 {data['sha256'][:12]}…{date}"

    if then and then != now:
        what = f"dataset_name = {dataset_name!r}: its tokens are not those that this run was trained on"
        if {**then, "eval": None} == {**now, "eval": None}:
            what, then, now = "eval_dataset_name: its tokens are not the run's", then.get("eval"), now.get("eval")
        raise ConfigError(
            f"{what}: {describe(then)} then, {describe(now)} now. Restore the data (and the tokenizer, and chat_date), "
            "or take another experiment_name"
        )


def fit_global_batch(config: Config, samples: int) -> Config:
    """Set `gradient_accumulation_steps` so that an optimizer step takes `samples` samples.

    Raises:
        ConfigError: if they can't be cut into whole micro-batches for every DP rank.
    """
    share = config.batch_size_per_gpu * config.dp_size
    if samples % share:
        raise ConfigError(
            f"batch_size_per_gpu × dp_size = {config.batch_size_per_gpu} × {config.dp_size}: must divide the run's "
            f"global batch of {samples} samples, which stays as it was when the run began"
        )
    return config.change(gradient_accumulation_steps=samples // share)
