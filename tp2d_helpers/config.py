"""Every setting of a run, validated once, on the driver.

The notebook's `parameters` cell holds the literals; `Config.from_notebook` turns them into a `Config`. A value of the
wrong type or out of range, and a name that is no setting, is a `ConfigError` that says what was found and what would
be right. Nothing after this module checks a setting again.
"""

from __future__ import annotations

import ast
import datetime
import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
# What makes a step faster without changing what it computes (the notebook says how, under "Speed").
OPTIMIZATIONS = ("compile", "block_all_reduce", "peer_copies", "fused_loss", "fused_step", "cuda_graph")
BAD_ROWS = {  # kinds of rows that can't be trained on as they are
    "unreadable": "a line that is no JSON object, or a value that no text can have (bytes, NaN)",
    "not_text": "a value that is no text in the column of the text",
    "ambiguous": "a value that `datasets` wrote so that it can't be told whether it was text or a number",
    "half_character": "half of a surrogate pair, which is no character (a program cut the text in the midst of one)",
    "not_a_chat": "no list of messages with roles and contents",
    "no_answer": "a chat without an assistant's turn to learn",
    "refused": "a chat that the template refuses",
    "not_written": "the template leaves out what the row says",
}
TRACKERS = ("tensorboard", "wandb", "mlflow")  # where curves can be looked at


class ConfigError(ValueError):
    """A setting that can't work. The message has the value found and what would be right."""

    def _render_traceback_(self) -> list[str]:
        """In a notebook, IPython shows these lines: the message says it all, the frames of the checks nothing."""
        return [f"{type(self).__name__}: {self}"]


def reason(error: BaseException) -> str:
    """What a library's error says, in one line: of its cause, if it is only the wrapper of one."""
    error = error.__cause__ if error.__cause__ and not isinstance(error.__cause__, OSError) else error
    return ": ".join([type(error).__name__, *[" ".join(str(error).split())[:300]][: bool(str(error))]])


class Config(BaseModel):
    """The settings of one training run. Units: lengths in tokens, sizes in samples, rates per optimizer step."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    # Model and data: "auto", "demo", a hub id or a local path.
    model_name: Name = "auto"
    dataset_name: Name = "auto"
    dataset_config: str = ""
    text_column: Name = "text"
    text_files: Literal["document", "paragraph"] = "document"
    dataset_percentage: Annotated[float, Field(gt=0, le=100)] = 100.0
    packing: bool | Literal["documents", "auto"] = "auto"
    chat_template: str = ""
    chat_date: str = "auto"
    loss_on: Literal["assistant", "all"] = "assistant"
    leave_out_rows: str = ""
    trust_remote_code: bool = False
    # Parallelism.
    tp_size: PositiveInt = 2
    dp_size: PositiveInt = 2
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    use_gpu: bool | Literal["auto"] = "auto"
    # Optimization.
    batch_size_per_gpu: PositiveInt | Literal["auto"] = 1
    gradient_accumulation_steps: PositiveInt = 1
    global_batch_size: NonNegativeInt = 0
    seq_length: Annotated[int, Field(ge=2)] = 512
    num_epochs: PositiveInt = 1
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = 1e-5
    learning_rate_schedule: Literal["constant", "linear", "cosine", "warmup-stable-decay"] = "constant"
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: int | float = 0
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.01
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = "auto"
    master_weights: Literal["fp32", "bf16"] = "fp32"
    gradient_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    activation_checkpointing: Literal["none", "full", "auto"] = "none"
    optimizations: str = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    # LoRA: adapters are trained, and the model's own weights stay as they are.
    lora_rank: NonNegativeInt = 0
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_targets: Name = "all-linear"
    # Length of the run, what it prints and keeps.
    debug_steps: NonNegativeInt = 0
    log_interval: PositiveInt = 5
    eval_samples: NonNegativeInt | Literal["auto"] = 0
    eval_dataset_name: str = ""
    eval_interval: NonNegativeInt = 0
    sample_prompts: str = ""
    checkpoint_interval: NonNegativeInt = 0
    checkpoints_to_keep: PositiveInt = 2
    keep_checkpoints_by: Literal["newest", "loss", "eval_loss"] = "newest"
    async_checkpoint: bool = True
    trust_checkpoint: bool = False
    trackers: str = "tensorboard"
    storage_path: str = "auto"
    experiment_name: str = "auto"
    # The cluster.
    max_failures: NonNegativeInt = 1
    min_dp_size: NonNegativeInt = 0
    hang_timeout_seconds: NonNegativeInt = 600
    cluster_wait_seconds: NonNegativeInt = 0

    @field_validator("*", mode="before")
    @classmethod
    def _take_what_is_plain(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML 1.1 makes text of 1e-4, as it wants a point, and `papermill -p` of true and false: no other is meant."""
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        if float in kinds and isinstance(value, str) and EXPONENT.fullmatch(value):
            return float(value)
        if bool in kinds and isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        return value

    @field_validator("zero_stage")
    @classmethod
    def _shards_something(cls, stage: int) -> int:
        if not stage:
            raise ValueError(
                "stage 0 clips bf16 and fp16 at tp_size > 1 by a part of the gradient norm; take 1, which computes "
                "the same, and shards the optimizer over the dp_size replicas"
            )
        return stage

    @field_validator("warmup_steps")
    @classmethod
    def _are_steps_or_a_share(cls, steps: float) -> float:
        if not (isinstance(steps, int) and steps >= 0) and not 0 < steps < 1:
            raise ValueError("must be a valid number of steps (0, 1, 2 …), or a share of all steps between 0 and 1")
        return steps

    @field_validator("min_learning_rate")
    @classmethod
    def _is_reached(cls, lowest: float, info: ValidationInfo) -> float:
        rate, schedule = info.data.get("learning_rate"), info.data.get("learning_rate_schedule")
        if isinstance(rate, float) and lowest >= rate:
            raise ValueError(f"must be below learning_rate, which is {rate:g}")
        if lowest and schedule == "constant":
            raise ValueError("the learning_rate_schedule 'constant' never goes there; take another, or 0")
        return lowest

    @field_validator("experiment_name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not name or name in (".", "..") or "/" in name or "\\" in name:
            raise ValueError("must be a plain folder name, without slashes")
        return name

    @field_validator("model_name", "dataset_name", "eval_dataset_name", "chat_template", "storage_path",
                     "experiment_name")  # fmt: skip
    @classmethod
    def _can_be_a_path(cls, text: str, info: ValidationInfo) -> str:
        if not text.isprintable():
            raise ValueError("must not have line breaks, tabs or other characters that can't be seen")
        for part in map(str.strip, text.split(",") if info.field_name != "experiment_name" else ()):
            try:
                Path(part).expanduser()
            except RuntimeError:
                raise ValueError(f"{Path(part).parts[0]}: no such user, or no home folder") from None
        return text

    @field_validator("storage_path")
    @classmethod
    def _is_a_path(cls, path: str) -> str:
        if "://" in path:
            raise ValueError("must be a folder that all nodes can reach (a mounted share, not a URL)")
        if not path:
            raise ValueError("must be the path of a folder")
        return path if path == "auto" else str(Path(path).expanduser().absolute())

    @field_validator("optimizations")
    @classmethod
    def _are_optimizations(cls, text: str) -> str:
        names = [] if text in ("auto", "none") else [name.strip() for name in text.split(",")]
        if unknown := [name for name in names if name not in OPTIMIZATIONS]:
            raise ValueError(f"{unknown} unknown; must be 'auto', 'none', or some of {', '.join(OPTIMIZATIONS)}")
        return ",".join(names) or text

    @field_validator("leave_out_rows")
    @classmethod
    def _are_kinds_of_rows(cls, text: str) -> str:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in names if name not in BAD_ROWS]:
            raise ValueError(f"{unknown} unknown; must be '', or some of {', '.join(BAD_ROWS)}")
        return ",".join(dict.fromkeys(names))

    @field_validator("chat_date")
    @classmethod
    def _is_a_date(cls, text: str) -> str:
        if text != "auto":
            try:
                datetime.date.fromisoformat(text)
            except ValueError:
                raise ValueError("must be 'auto' or a date as YYYY-MM-DD") from None
        return text

    @field_validator("trackers")
    @classmethod
    def _are_trackers(cls, text: str) -> str:
        names = [] if text == "none" else [name.strip() for name in text.split(",")]
        if unknown := [name for name in names if name not in TRACKERS]:
            raise ValueError(f"{unknown} unknown; must be 'none', or some of {', '.join(TRACKERS)}")
        return ",".join(dict.fromkeys(names)) or text

    @property
    def num_workers(self) -> int:
        """Ray Train workers, one per GPU: tp × dp."""
        return self.tp_size * self.dp_size

    @property
    def samples_per_step(self) -> int:
        """Samples in one optimizer step. The ranks of a TP group share their samples, so tp_size is no factor.

        Where the micro-batch is still to be chosen, those that are asked for.
        """
        if self.batch_size_per_gpu == "auto":
            return self.global_batch_size
        return self.batch_size_per_gpu * self.dp_size * self.gradient_accumulation_steps

    @property
    def run_dir(self) -> Path:
        """The folder that holds all that the run leaves behind."""
        return Path(self.storage_path) / self.experiment_name

    def change(self, **settings: Any) -> Config:
        """Return a copy with some settings replaced, validated like the original."""
        return make_config(**{**self.model_dump(), **settings})

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> Config:
        """Build the config from the notebook's `parameters` cell and what papermill injected after it.

        Args:
            namespace: the notebook's `globals()`. The names are read from the cells' sources, which IPython keeps in
                `In`, so that a misspelt parameter is found although it is a valid variable.

        Raises:
            ConfigError: for an unknown name (with the nearest valid one) or a value that can't work.
        """
        # Tools that run cells without keeping a history (nbval, for one) inject nothing: the known names will do.
        names = parameter_names(namespace.get("In", [])) or [name for name in cls.model_fields if name in namespace]
        if not names:
            raise ConfigError("no parameters cell was run: run the cell tagged `parameters` first")
        missing = [name for name in names if name not in namespace]
        if missing:
            raise ConfigError(f"{', '.join(missing)}: not assigned; the parameters cell ended in an error: mend it")
        return make_config(**{name: namespace[name] for name in names})


def make_config(**settings: Any) -> Config:
    """Validate settings; one line per mistake in the `ConfigError`.

    >>> make_config(tp_sise=2)
    Traceback (most recent call last):
    tp2d_helpers.config.ConfigError: tp_sise = 2: unknown parameter; did you mean tp_size?
    """
    try:
        return Config(**settings)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = str(item["loc"][0])
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                near = [field for field in Config.model_fields if name and field.startswith(name)]
                near += difflib.get_close_matches(name, Config.model_fields, n=1, cutoff=0.5)
                message = "unknown parameter; " + (f"did you mean {near[0]}?" if near else "see the parameters cell")
            elif item["type"] != "literal_error" and (hint := _how_to_write(name, item["input"])):
                message += f"; {hint}"
            line = f"{name} = {item['input']!r}: {message}"
            if line not in lines:
                lines.append(line)
        raise ConfigError("\n".join(lines)) from None


def _kinds(annotation: Any) -> set[type]:
    """The plain types that an annotation allows, without its literals."""
    if get_origin(annotation) is Literal:
        return set()
    parts = get_args(annotation)[: 1 if get_origin(annotation) is Annotated else None]
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def _how_to_write(name: str, value: Any) -> str:
    """How to write a value of the wrong type, if it can be told what was meant; else nothing."""
    kinds = _kinds(Config.model_fields[name].annotation)
    number = isinstance(value, str) and NUMBER.fullmatch(value)
    if bool in kinds and not isinstance(value, bool):
        return "write True or False (true or false in YAML)" + ', or "documents"' * (name == "packing")
    if float in kinds and number:
        return f"write it without quotes: {value}"
    if int in kinds and (number or type(value) is float) and float(value) % 1 == 0:
        return f"write it as a whole number, without quotes: {int(float(value))}"
    if str in kinds and isinstance(value, list):
        between, mark = ("line breaks", "\n") if name == "sample_prompts" else ("commas", ",")
        return f"write one text with {between}: {mark.join(map(str, value))!r}"
    if str in kinds and not isinstance(value, (str, type(None))):
        return f"write it in quotes, and for papermill as -r {name} {value}"
    return ""


def parameter_names(cells: list[str]) -> list[str]:
    """Names assigned by the newest `parameters` cell in `cells` and by papermill's injected cells after it.

    papermill starts an injected cell with the line "# Parameters"; the notebook's own cell is known by the two names
    that no other cell assigns.
    """
    names: dict[str, None] = {}
    for source in cells:
        assigned = _assigned_names(source)
        if source.lstrip().startswith("# Parameters"):
            names.update(dict.fromkeys(assigned))
        elif {"model_name", "experiment_name"} <= set(assigned):
            names = dict.fromkeys(assigned)
    return list(names)


def _assigned_names(source: str) -> list[str]:
    try:
        body = ast.parse(source).body
    except SyntaxError:  # IPython magics
        return []
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign) and node.value]
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
