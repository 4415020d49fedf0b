"""What can't work is refused on the driver, before a worker starts, with the value found and what would be right.

And nothing is left behind: no actor, no folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import ray
import torch
import transformers
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from grid import IMPORT_PATH, NOTEBOOK, run_grid
from ray.actor import ActorClass
from safetensors.torch import load_file, save_file

from tp2d_helpers.checkpoint.files import lock_run
from tp2d_helpers.checkpoint.run_folder import write_manifest
from tp2d_helpers.checkpoint.settings import continue_run, record_run
from tp2d_helpers.config import Config, ConfigError, make_config
from tp2d_helpers.demo import build_model
from tp2d_helpers.model import engine, facts
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.preflight import checks, connection, data, plan
from tp2d_helpers.preflight import cluster as ray_cluster
from tp2d_helpers.training.metrics import read_metrics

SMALL = dict(model_name="demo", dataset_name="demo", use_gpu=False, tp_size=1, dp_size=1, seq_length=64)


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, float]]:
    """Ray on two cores and no GPU; its resources."""
    ray.init(num_cpus=2, num_gpus=0, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    yield ray.cluster_resources()
    ray.shutdown()


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the actors that were created; Ray Train's controller and workers are actors."""
    created, create = [], ActorClass._remote

    def recording(self: ActorClass, *args: Any, **kwargs: Any) -> Any:
        created.append(str(self))
        return create(self, *args, **kwargs)

    monkeypatch.setattr(ActorClass, "_remote", recording)
    return created


@pytest.fixture
def refused(cluster: dict[str, float], actors: list[str], tmp_path: Path) -> Callable[..., None]:
    """refused(*parts, **settings): `preflight` refuses the settings, in a message with each of the parts."""

    def check(*parts: str, **settings: Any) -> None:
        settings = {**SMALL, "storage_path": str(tmp_path / "runs"), **settings}
        with pytest.raises(ConfigError) as error:
            plan.preflight(make_config(**settings))
        for part in parts:
            assert part in str(error.value)
        assert not actors
        assert not (tmp_path / "runs").exists()

    return check


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """model(name, **fields): a copy of a tiny model to break, with fields of its config.json replaced."""

    def copy(name: str, **fields: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_model(name), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return folder

    return copy


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Settings: type, range, name

WRONG_TYPE: dict[type, list[Any]] = {
    int: [True, "2", 1.5, 2.0, None, math.nan, math.inf],
    float: [True, "5", None, math.nan, math.inf, -math.inf],
    bool: [1, "yes", None],
    str: [3, None, True],  # and `use_gpu`, which is also a bool
}


@pytest.mark.parametrize("name", Config.model_fields)
def test_wrong_type(name: str) -> None:
    kind = type(Config.model_fields[name].default)
    for value in WRONG_TYPE[kind if name not in ("use_gpu", "packing") else bool]:
        right = "(valid|finite|'auto'|'fp32'|'newest'|'none'|'document'|'constant'|'assistant')"
        with pytest.raises(ConfigError, match=rf"(?m)^{name} = .*{right}") as error:
            make_config(**{name: value})
        assert f"{name} = {value!r}: " in str(error.value)


@pytest.mark.parametrize("name, text, value", [
    ("learning_rate", "1e-4", 1e-4), ("weight_decay", "1E-2", 0.01), ("dataset_percentage", "2.5e1", 25.0),
    ("packing", "false", False), ("packing", "True", True), ("packing", "documents", "documents"),
    ("async_checkpoint", "TRUE", True), ("use_gpu", "true", True),
])  # fmt: skip
def test_text_that_can_mean_one_thing(name: str, text: str, value: Any) -> None:
    """What YAML 1.1 and `papermill -p` make of 1e-4, true and false."""
    found = getattr(make_config(**{name: text}), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name, value, right", [
    ("learning_rate", "0.1", "write it without quotes: 0.1"), ("max_grad_norm", "1", "write it without quotes: 1"),
    ("packing", "no", 'write True or False (true or false in YAML), or "documents"'),
    ("packing", 0, "write True or False"),
    ("use_gpu", "yes", "write True or False"), ("debug_steps", "1e3", "as a whole number, without quotes: 1000"),
    ("debug_steps", 1000.0, "as a whole number, without quotes: 1000"), ("seed", "7", "without quotes: 7"),
    ("experiment_name", 2024, "write it in quotes, and for papermill as -r experiment_name 2024"),
    ("optimizations", ["compile", "fused_loss"], "write one text with commas: 'compile,fused_loss'"),
])  # fmt: skip
def test_the_way_to_write_it_is_named(name: str, value: Any, right: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(**{name: value})
    assert str(error.value).startswith(f"{name} = {value!r}: ") and right in str(error.value)


@pytest.mark.parametrize("name, value, right", [
    ("zero_stage", 4, "less than or equal to 3"), ("zero_stage", -1, "greater than or equal to 0"),
    ("dataset_percentage", 0, "greater than 0"), ("dataset_percentage", 100.1, "less than or equal to 100"),
    ("tp_size", 0, "greater than or equal to 1"), ("dp_size", -2, "greater than or equal to 1"),
    ("batch_size_per_gpu", 0, "greater than or equal to 1"), ("gradient_accumulation_steps", 0, "equal to 1"),
    ("global_batch_size", -1, "greater than or equal to 0"),
    ("seq_length", 1, "greater than or equal to 2"), ("num_epochs", 0, "greater than or equal to 1"),
    ("eval_samples", -1, "greater than or equal to 0"), ("eval_interval", -1, "greater than or equal to 0"),
    ("min_dp_size", -1, "greater than or equal to 0"), ("hang_timeout_seconds", -1, "greater than or equal to 0"),
    ("learning_rate", 0, "greater than 0"), ("learning_rate", -1e-5, "greater than 0"),
    ("learning_rate", 1, "less than 1"), ("warmup_steps", -1, "a valid number of steps (0, 1, 2"),
    ("min_learning_rate", -1e-6, "greater than or equal to 0"), ("adam_epsilon", 0, "greater than 0"),
    ("adam_beta1", 1, "less than 1"), ("adam_beta1", -0.1, "equal to 0"), ("adam_beta2", 1, "less than 1"),
    ("weight_decay", -0.1, "greater than or equal to 0"), ("weight_decay", 1, "less than 1"),
    ("max_grad_norm", -1, "greater than or equal to 0"), ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**31, "less than 2147483648"), ("debug_steps", -1, "greater than or equal to 0"),
    ("log_interval", 0, "greater than or equal to 1"), ("checkpoint_interval", -1, "greater than or equal to 0"),
    ("checkpoints_to_keep", 0, "greater than or equal to 1"), ("max_failures", -1, "greater than or equal to 0"),
    ("lora_rank", -1, "equal to 0"), ("lora_alpha", 0, "greater than 0"), ("lora_dropout", 1, "less than 1"),
    ("cluster_wait_seconds", -1, "equal to 0"), ("precision", "int8", "'auto', 'bf16', 'fp16', 'fp32' or 'fp8'"),
    ("master_weights", "fp16", "'fp32' or 'bf16'"), ("model_name", "", "at least 1 character"),
    ("dataset_name", "", "at least 1 character"), ("text_column", "", "at least 1 character"),
    ("experiment_name", "", "a plain folder name"), ("experiment_name", "a\nb", "must not have line breaks"),
    ("storage_path", "/tmp/a\0b", "characters that can't be seen"), ("storage_path", "~nobody-here/x", "no such user"),
    ("model_name", "~nobody-here/x", "~nobody-here: no such user"),
    ("dataset_name", "a.txt, ~nobody-here/b.txt", "~nobody-here: no such user"),
    ("experiment_name", "runs/first", "without slashes"), ("experiment_name", "..", "a plain folder name"),
    ("experiment_name", "a\\b", "without slashes"), ("storage_path", "", "the path of a folder"),
    ("storage_path", "s3://bucket/runs", "a mounted share, not a URL"),
])  # fmt: skip
def test_out_of_range(name: str, value: Any, right: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(**{name: value})
    assert str(error.value).startswith(f"{name} = {value!r}: ") and right in str(error.value)


def test_every_bounded_setting_is_tried() -> None:
    """A new number needs its bounds tried above."""
    tried = {mark.args[1][i][0] for mark in test_out_of_range.pytestmark for i in range(len(mark.args[1]))}
    numbers = {name for name, field in Config.model_fields.items() if type(field.default) in (int, float)}
    assert numbers <= tried


@pytest.mark.parametrize("name, hint", [
    ("tp_sise", "did you mean tp_size?"), ("learningrate", "did you mean learning_rate?"),
    ("batch_size", "did you mean batch_size_per_gpu?"), ("qqq", "see the parameters cell"),
])  # fmt: skip
def test_unknown_parameter(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(**{name: 4})
    assert str(error.value) == f"{name} = 4: unknown parameter; {hint}"


def test_a_line_per_mistake() -> None:
    with pytest.raises(ConfigError) as error:
        make_config(tp_size=0, zero_stage=7, sede=1)
    assert [line.split(" = ")[0] for line in str(error.value).splitlines()] == ["tp_size", "zero_stage", "sede"]


def test_change_validates() -> None:
    with pytest.raises(ConfigError, match="zero_stage = 4"):
        make_config().change(zero_stage=4)


# The notebook's parameters

PARAMETERS = 'model_name = "demo"\ntp_size = 2\nexperiment_name = "first"'


def from_cells(*cells: str) -> Config:
    namespace: dict[str, Any] = {"In": ["", *cells], "unrelated": 1}
    for cell in cells:
        if not cell.startswith("%"):
            exec(cell, namespace)
    return Config.from_notebook(namespace)


def test_from_notebook() -> None:
    config = from_cells("import os\nsize = 3", PARAMETERS, "%matplotlib inline", "grid = [2, 2]")
    assert (config.model_name, config.tp_size, config.experiment_name) == ("demo", 2, "first")


def test_papermill_cell_replaces_parameters() -> None:
    config = from_cells(PARAMETERS, "# Parameters\ntp_size = 4\nseed = 7\n")
    assert (config.tp_size, config.seed, config.model_name) == (4, 7, "demo")


def test_parameters_cell_run_again() -> None:
    """A mistake that was mended is forgotten, and so is what was injected before."""
    config = from_cells(PARAMETERS + "\ntp_sise = 4", "# Parameters\nsede = 7", PARAMETERS.replace("2", "4"))
    assert config.tp_size == 4


def test_parameters_in_other_forms() -> None:
    config = from_cells('model_name: str = "demo"\ntp_size, dp_size = 4, 1\nexperiment_name = storage_path = "first"')
    assert (config.model_name, config.tp_size, config.dp_size) == ("demo", 4, 1)


@pytest.mark.parametrize("cells, message", [
    ([PARAMETERS, "# Parameters\ntp_sise = 4\n"], "tp_sise = 4: unknown parameter; did you mean tp_size?"),
    ([PARAMETERS + "\nzerostage = 2"], "zerostage = 2: unknown parameter; did you mean zero_stage?"),
    (["%pip list"], "run the cell tagged `parameters` first"),
    ([], "no parameters cell was run"),
])  # fmt: skip
def test_refused_from_notebook(cells: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_cells(*cells)
    assert message in str(error.value)


def test_parameters_cell_that_failed() -> None:
    with pytest.raises(ConfigError, match="experiment_name: not assigned"):
        Config.from_notebook({"In": ["", PARAMETERS], "model_name": "demo", "tp_size": 2})


def test_papermill(tmp_path: Path) -> None:
    """The run ends with an error that the user sees as one line, without the frames of the checks."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])] + [
        next(cell for cell in code if "preflight(" in cell.source)
    ]
    nbformat.write(notebook, tmp_path / "trimmed.ipynb")
    command = [sys.executable, "-m", "papermill", "trimmed.ipynb", "out.ipynb", "-p", "tp_sise", "4", "-k", "python3"]
    environment = {**os.environ, "PYTHONPATH": IMPORT_PATH}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    message = "tp_sise = 4: unknown parameter; did you mean tp_size?"
    assert message in run.stderr
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    errors = [output for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert [output.traceback for output in errors] == [[f"ConfigError: {message}"]]


# The cluster


def test_more_gpus_than_the_cluster_has(refused: Callable[..., None]) -> None:
    refused("2 × 2 = 4 GPUs", "the cluster has 0", "set use_gpu to False", use_gpu=True, tp_size=2, dp_size=2)


def test_gpus_that_do_not_come(refused: Callable[..., None]) -> None:
    settings = dict(tp_size=2, dp_size=1, cluster_wait_seconds=1)
    refused("2 × 1 = 2 GPUs", "the cluster has 0", "Waited 1 s", use_gpu="auto", **settings)
    assert ray.available_resources()["CPU"] == 2  # the request was taken back


def test_gpus_that_would_do() -> None:
    with pytest.raises(ConfigError, match=r"4 × 2 = 8 GPUs, and the cluster has 6; .* take 1 × 6, 2 × 3, 3 × 2, 6 × 1"):
        ray_cluster.check_resources(make_config(use_gpu=True, tp_size=4, dp_size=2), {"GPU": 6.0, "CPU": 64.0})


def test_more_workers_than_cores_bear(refused: Callable[..., None]) -> None:
    refused("3 × 3 = 9 workers on 2 CPU cores", "at most 8 (4 per core)", tp_size=3, dp_size=3)


def test_cluster_that_is_busy(refused: Callable[..., None], actors: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "PLACEMENT_SECONDS", 0.5)

    class Job:
        def ready(self) -> None:
            pass

    other_job = ray.remote(num_cpus=1.8)(Job).remote()
    try:
        ray.get(other_job.ready.remote())
        assert len(actors) == 1  # so the list is one that can fill
        actors.clear()
        refused(
            "1 × 1 = 1 workers on 0.2 CPU cores that are free of 2", "Other jobs", "End them, or take fewer workers"
        )
    finally:
        ray.kill(other_job)


def test_ray_address_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS = '127.0.0.1:9'.*: no Ray .* answers .*; start one, or unset"):
        connection.connect()


# The model


@pytest.mark.parametrize("name, parts", [
    ("/no/such/model", ["'/no/such/model': no such folder"]),
    ("./model", ["'./model': no such folder"]),
    ("org/unknown", ["'org/unknown': its config can't be loaded", '"demo" or the path of a local folder']),
])  # fmt: skip
def test_model_that_is_not_there(refused: Callable[..., None], name: str, parts: list[str]) -> None:
    refused(*parts, model_name=name)


def test_tp_size_that_cuts_heads(refused: Callable[..., None], tiny_model: Callable[[str], Path]) -> None:
    refused("tp_size = 3", "the 8 attention heads", "[1, 2, 4, 8]", model_name=str(tiny_model("llama")), tp_size=3)
    refused("tp_size = 5", "the 4 key-value heads", "[1, 2, 4, 8]", model_name=str(tiny_model("qwen3")), tp_size=5)


def test_lora_beside_gathered_outputs(refused: Callable[..., None], family: Callable[..., Path]) -> None:
    linear = dict(linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
    model = family("qwen3_5_text", layer_types=["linear_attention", "full_attention"], **linear)
    refused("lora_targets = 'all-linear': at tp_size 2 the outputs of out_proj, in_proj_qkv",
            "take gate_proj,up_proj,down_proj,q_proj", model_name=str(model), tp_size=2, lora_rank=4)  # fmt: skip


def test_run_that_does_not_fit(
    refused: Callable[..., None], tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of 64 million tokens on H200 GPUs, as Ray would report them: refused with one that fits."""
    gpus = {"GPU": 2.0, "CPU": 2.0, "accelerator_type:H200": 1.0}
    monkeypatch.setattr(plan, "connect", lambda: gpus)
    monkeypatch.setattr(plan, "check_placement", lambda *_: [2])
    settings = dict(model_name=str(tiny_model("llama")), use_gpu=True, tp_size=2)
    refused("batch_size_per_gpu × seq_length = 1000000 × 64", "H200 has 139.8 GiB", "activations",
            "What fits", "gradient_accumulation_steps = ",
            batch_size_per_gpu=1_000_000, **settings)  # fmt: skip


def test_sequence_longer_than_positions(refused: Callable[..., None], tiny_model: Callable[[str], Path]) -> None:
    refused("seq_length = 257", "end at 256", model_name=str(tiny_model("llama")), seq_length=257)


def test_model_without_weights(refused: Callable[..., None], model: Callable[..., Path]) -> None:
    folder = model("llama")
    (folder / "model.safetensors").rename(folder / "training_args.bin")  # a file that is no model
    refused("has no weights", "model.safetensors or pytorch_model.bin", model_name=str(folder))


def test_weights_under_other_names(refused: Callable[..., None], model: Callable[..., Path]) -> None:
    """transformers would draw them at random and train; `test_weights.py` has all that is looked for."""
    folder = model("llama")
    weights = load_file(folder / "model.safetensors")
    save_file({f"_orig_mod.{name}": weight for name, weight in weights.items()}, folder / "model.safetensors")
    refused("model.safetensors lacks", "All names there begin with '_orig_mod.'", model_name=str(folder))


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_model_without_tokenizer(refused: Callable[..., None], model: Callable[..., Path], name: str) -> None:
    """For Qwen2, transformers makes an empty tokenizer without a word: the run would train on end-of-text alone."""
    folder = model(name)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(f"model_name = {str(folder)!r}", "tokenizer", model_name=str(folder))


def test_tokenizer_that_can_end_nothing(refused: Callable[..., None], model: Callable[..., Path]) -> None:
    folder = model("llama")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    refused("neither an end-of-text nor a pad token", "set one in its tokenizer_config.json", model_name=str(folder))


def test_tokenizer_of_another_model(refused: Callable[..., None], tmp_path: Path) -> None:
    shape = dict(model_type="llama", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                 vocab_size=2048)  # fmt: skip
    build_model(shape, tmp_path / "model", dtype=torch.float32)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 1000, "pad_token_id": None}))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    cut = {name: weight[:1000] if len(weight) == 2048 else weight for name, weight in weights.items()}
    save_file(cut, tmp_path / "model" / "model.safetensors")
    refused("gives id 2047, the model has 1000 ids", model_name=str(tmp_path / "model"))


def test_model_that_is_no_language_model(refused: Callable[..., None], model: Callable[..., Path]) -> None:
    refused("'t5' is not a model that AutoModelForCausalLM", model_name=str(model("llama", model_type="t5")))


HEADS = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=2048)
UNSHARDABLE = {
    "gptj": (dict(n_layer=2, n_head=4, n_embd=32, rotary_dim=4, vocab_size=2048), "its class has no tp_plan"),
    "gpt_oss": (
        HEADS | dict(num_key_value_heads=2, head_dim=8, num_local_experts=4),
        "gate_up_proj_bias is among its experts",
    ),
    "phi3": (HEADS | dict(num_key_value_heads=1), "qkv_proj.weight holds several matrices in one"),
}


@pytest.mark.parametrize("kind", UNSHARDABLE)
def test_architecture_that_autotp_cannot_shard(refused: Callable[..., None], tmp_path: Path, kind: str) -> None:
    """Refused at tp 2; at tp 1 it is a model for DeepSpeed like any other, and trains."""
    shape, reason = UNSHARDABLE[kind]
    build_model({"model_type": kind, **shape}, tmp_path / kind, dtype=torch.float32)
    refused(
        reason, "take a tp_size" if kind == "phi3" else "Take tp_size 1", model_name=str(tmp_path / kind), tp_size=2
    )

    settings = dict(model_name=str(tmp_path / kind), debug_steps=8, learning_rate=1e-2, storage_path=str(tmp_path),
                    activation_checkpointing="full")  # fmt: skip
    config = plan.preflight(make_config(**{**SMALL, **settings})).config
    run_grid(config.model_dump())
    losses = [record["loss"] for record in read_metrics(config.run_dir / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("trust", [False, True])
def test_trust_remote_code_is_what_the_user_set(trust: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = []
    for auto in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        load = getattr(transformers, auto).from_pretrained

        def recording(*args: Any, load: Callable = load, **kwargs: Any) -> Any:
            passed.append(kwargs["trust_remote_code"])
            return load(*args, **kwargs)

        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", recording)
    settings = {"trust_remote_code": True} if trust else {}
    config, _ = plan.settle(make_config(**SMALL, **settings), {})
    model = ModelFacts.read(config.model_name, config.trust_remote_code)
    checks.check_model(config, model)
    data.check_data(config, model)
    engine.load_model(config.model_name, torch.float32, config.model_dump()["trust_remote_code"])
    assert len(passed) >= 4 and set(passed) == {trust}


def test_code_of_a_model_is_not_run(refused: Callable[..., None], model: Callable[..., Path], tmp_path: Path) -> None:
    folder = model("llama", model_type="mine", auto_map={"AutoConfig": "code.MineConfig"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    refused(f"model_name = {str(folder)!r}", "custom code", model_name=str(folder))
    assert not (tmp_path / "ran").exists()


def test_code_of_a_trusted_model_is_run(
    model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    auto_map = {"AutoConfig": "code.MineConfig", "AutoModelForCausalLM": "code.Mine"}
    folder = model("llama", model_type="mine", auto_map=auto_map)
    (folder / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    config = make_config(**{**SMALL, "model_name": str(folder), "trust_remote_code": True, "tp_size": 2})
    assert ": mine, " in checks.check_model(config, ModelFacts.read(str(folder), True))[0]


def test_model_without_sdpa(tmp_path: Path) -> None:
    """What preflight accepts, the workers can load."""
    build_model({"model_type": "gemma2", **HEADS, "num_key_value_heads": 2, "head_dim": 8}, tmp_path / "gemma2")
    config = make_config(**{**SMALL, "model_name": str(tmp_path / "gemma2")})
    checks.check_model(config, ModelFacts.read(config.model_name))
    engine.load_model(str(tmp_path / "gemma2"), torch.float32)


# The data


def test_no_such_column(refused: Callable[..., None], tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", {"content": "a", "title": "b"})
    refused("text_column = 'text'", "['content', 'title']", dataset_name=path)
    refused("text_column = 'body'", "['text']", text_column="body")


@pytest.mark.parametrize("rows", [[{"text": " \n"}, {"text": ""}], [{"text": None}] * 3], ids=["blank", "null"])
def test_no_text(refused: Callable[..., None], tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    refused(f"no text in the {len(rows)} rows", "'text'", dataset_name=lines(tmp_path / "data.jsonl", *rows))


def test_column_that_is_no_text(refused: Callable[..., None], tmp_path: Path) -> None:
    refused(
        "text_column = 'text'",
        "line 1 of",
        "it must hold text, and is int",
        dataset_name=lines(tmp_path / "data.jsonl", *[{"text": 5}] * 3),
    )


def test_no_rows(refused: Callable[..., None], tmp_path: Path) -> None:
    refused("no rows in", "data.jsonl", dataset_name=lines(tmp_path / "data.jsonl"))
    refused("no text in the 0 rows", dataset_percentage=0.01)


def test_less_than_a_global_batch(refused: Callable[..., None], tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", *[{"text": "seven"}] * 3)
    batch = dict(batch_size_per_gpu=2, dp_size=2, gradient_accumulation_steps=3)
    refused("3 padded samples of 8", "fewer than one global batch of 12", "batch_size_per_gpu 2 × dp_size 2 × "
            "gradient_accumulation_steps 3", dataset_name=path, seq_length=8, packing=False, **batch)  # fmt: skip
    refused("0 packed samples of 64 tokens", "fewer than one global batch of 1", dataset_name=path)


@pytest.mark.parametrize("name, parts", [
    ("/no/such/text.jsonl", ["'/no/such/text.jsonl': no such file or folder"]),
    ("org/unknown", ["'org/unknown': can't be loaded", '"demo" or the path of a local file or folder']),
])  # fmt: skip
def test_data_that_is_not_there(refused: Callable[..., None], name: str, parts: list[str]) -> None:
    refused(*parts, dataset_name=name)


def test_data_in_no_known_format(refused: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "data.xml").write_text("<text/>")
    refused("data.xml", "one of .jsonl, .ndjson, .json, .csv, .parquet, .txt", dataset_name=str(tmp_path / "data.xml"))
    (tmp_path / "folder").mkdir()
    refused("folder", "doesn't contain any data files", dataset_name=str(tmp_path / "folder"))


# Precision, storage, the run's folder


def test_what_clips_wrongly_is_gone() -> None:
    with pytest.raises(
        ConfigError, match=r"^zero_stage = 0: .* part of the gradient norm; take 1, which computes the same"
    ):
        make_config(zero_stage=0)
    with pytest.raises(ConfigError, match=r"^activation_checkpointing = 'selective': .*'none', 'full' or 'auto'"):
        make_config(activation_checkpointing="selective")


@pytest.mark.parametrize("precision, computed", [("auto", "fp32"), ("fp32", "fp32"), ("fp16", "fp16")])
def test_bf16_masters_of_another_precision(refused: Callable[..., None], precision: str, computed: str) -> None:
    refused("master_weights = 'bf16'", f"computes in {computed}", precision=precision, master_weights="bf16")


@pytest.mark.parametrize("settings, words", [
    (dict(gradient_dtype="bf16"), ("gradient_dtype = 'bf16'", "computes in fp32", "'auto'")),
    (dict(gradient_dtype="fp32", master_weights="bf16", precision="bf16"),
     ("master_weights = 'bf16'", "summed in bf16", "another master_weights")),
])  # fmt: skip
def test_sums_of_gradients(refused: Callable[..., None], settings: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(*words, **settings)


def test_fp8_on_a_cpu(refused: Callable[..., None]) -> None:
    refused("precision = 'fp8': CPUs can't", "Hopper", "'bf16'", precision="fp8")


@pytest.mark.parametrize("settings, gpu, words", [
    (dict(), "A100", "A100 can't"), (dict(zero_stage=3), "H100", "with zero_stage = 3"),
    (dict(lora_rank=8), "H200", "with lora_rank = 8"),
    (dict(seq_length=100), "H100", "= 100: must be a multiple of 16"),
    (dict(optimizations="compile"), "H100", "needs block_all_reduce"),
])  # fmt: skip
def test_fp8_refused(settings: dict[str, Any], gpu: str, words: str) -> None:
    config = make_config(precision="fp8", use_gpu=True, **settings)
    with pytest.raises(ConfigError, match="precision = 'fp8'") as error:
        checks.check_precision(config, {f"accelerator_type:{gpu}": 1.0})
    assert words in str(error.value)


def test_fp8_where_one_type_of_gpu_cannot() -> None:
    both = {"accelerator_type:H100": 1.0, "accelerator_type:A100": 1.0}
    with pytest.raises(ConfigError, match="precision = 'fp8': A100 can't"):
        checks.check_precision(make_config(precision="fp8", use_gpu=True), both)


@pytest.mark.parametrize("nodes, settings, refused", [
    ([4, 4], dict(tp_size=8, dp_size=1, min_dp_size=1), "have room for 0 of tp_size 8, where it needs 1. The largest"),
    ([4, 2, 2], dict(tp_size=4, dp_size=2, min_dp_size=2), "have room for 1 of tp_size 4, where it needs 2"),
    ([3, 3], dict(tp_size=4, dp_size=1, min_dp_size=1), "takes 3 workers: take a tp_size that divides that, or min_"),
    ([4, 4], dict(tp_size=4, dp_size=2, min_dp_size=1), ""), ([4, 0], dict(tp_size=2, dp_size=4, min_dp_size=2), ""),
    ([4, 4], dict(tp_size=8, dp_size=1), ""),  # a run that can't shrink may span nodes, and is told
])  # fmt: skip
def test_replicas_that_never_fit_into_nodes(
    monkeypatch: pytest.MonkeyPatch, nodes: list[int], settings: dict[str, int], refused: str
) -> None:
    monkeypatch.setattr(ray_cluster, "alive", lambda: [{"Resources": {"CPU": 8.0, "GPU": gpus}} for gpus in nodes])
    config = make_config(use_gpu=True, gradient_accumulation_steps=4, **settings)
    if not refused:
        return ray_cluster.check_replicas(config, {"GPU": 1.0})
    with pytest.raises(ConfigError, match=f"min_dp_size = {settings['min_dp_size']}: ") as error:
        ray_cluster.check_replicas(config, {"GPU": 1.0})
    assert refused in str(error.value)


def test_preflight_asks_about_replicas(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of one core each: four workers find a place there, but no TP group of four."""
    half = [{"NodeManagerAddress": "127.0.0.1", "Resources": {"CPU": 1.0}}] * 2
    monkeypatch.setattr(ray_cluster, "alive", lambda: half)
    refused("min_dp_size = 1", "room for 0 of tp_size 4", tp_size=4, min_dp_size=1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_cpu(
    monkeypatch: pytest.MonkeyPatch, precision: str, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """Slow, but it trains, and so it is not refused, where DeepSpeed does not."""
    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)
    settings = dict(model_name=str(tiny_model("llama")), precision=precision, tp_size=2, debug_steps=8,
                    learning_rate=1e-2, storage_path=str(tmp_path))  # fmt: skip
    config = make_config(**{**SMALL, **settings})
    assert checks.check_precision(config, {})[1].startswith(precision)
    run_grid(config.model_dump())
    losses = [record["loss"] for record in read_metrics(config.run_dir / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1


def test_fp16_on_a_cpu_without_it(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: None)
    refused("precision = 'fp16'", "this CPU lacks instructions for it", "take 'fp32' or 'bf16'", precision="fp16")


def test_storage_that_cannot_be_written(refused: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (f"{tmp_path}/file/runs", "/proc/runs"):
        refused(f"storage_path = {path!r}", "can't be written", "take a folder", storage_path=path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("change", [
    dict(seed=7), dict(model_name="another"), dict(dataset_name="demo"), dict(seq_length=32, packing=False),
    dict(eval_samples=3), dict(master_weights="bf16"),
])  # fmt: skip
def test_another_run_in_the_folder(tmp_path: Path, change: dict[str, Any]) -> None:
    first = make_config(storage_path=str(tmp_path), experiment_name="first")
    record_run(first)
    before = (first.run_dir / "config.json").read_text()
    with pytest.raises(ConfigError) as error:
        continue_run(first.change(**change, num_epochs=2))
    for name, value in change.items():
        assert f"{name}: {getattr(first, name)!r} then, {value!r} now" in str(error.value)
    assert "num_epochs" not in str(error.value) and "another experiment_name" in str(error.value)
    assert (first.run_dir / "config.json").read_text() == before


def test_another_run_is_refused_by_preflight(cluster: dict[str, float], actors: list[str], tmp_path: Path) -> None:
    first = make_config(**SMALL, storage_path=str(tmp_path), experiment_name="first")
    record_run(plan.settle(first, {})[0])
    with pytest.raises(ConfigError, match="seed: 42 then, 7 now"):
        plan.preflight(first.change(seed=7))
    assert not actors and [path.name for path in first.run_dir.iterdir()] == ["config.json"]


def test_a_continued_run(cluster: dict[str, float], actors: list[str], tmp_path: Path) -> None:
    """What has changed is told. Other data, or a lost config.json, is refused before anything is written."""
    text = [{"text": "some text of a dataset"}] * 40
    data = lines(tmp_path / "data.jsonl", *text)
    settings = {**SMALL, "dataset_name": data, "seq_length": 16, "debug_steps": 3, "num_epochs": 2}
    first = make_config(**settings, storage_path=str(tmp_path), experiment_name="first")
    run_dir = plan.preflight(first).config.run_dir
    where = dict(step=2, epoch=0, epoch_step=2, world_size=1, tp_size=1, dp_size=1, zero_stage=1, metrics={"loss": 1.0})
    write_manifest(run_dir / "checkpoint_00000002", 0, {}, **where)
    rows = {name: row for name, *row in plan.preflight(first.change(learning_rate=1e-4, debug_steps=2)).rows}
    assert rows["changed since"][0] == "learning_rate 1e-05 → 0.0001, debug_steps 3 → 2"
    assert rows["checkpoint"][1] == "goes on from checkpoint_00000002, epoch 1 is over: 2 steps of 2 are done"
    recorded = (run_dir / "config.json").read_text()
    lines(tmp_path / "data.jsonl", *text, {"text": "and more of it"})
    with pytest.raises(ConfigError, match=r"its tokens are not those .* 40 documents .* then, 41 documents .* now"):
        plan.preflight(first)
    assert (run_dir / "config.json").read_text() == recorded
    lines(tmp_path / "data.jsonl", *text)
    (run_dir / "config.json").unlink()
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(ConfigError, match=r"holds checkpoints, but no config\.json .* set trust_checkpoint to True"):
        plan.preflight(first)
    assert not actors and sorted(run_dir.rglob("*")) == before


def test_a_run_is_told_by_what_is_in_the_model_and_the_data(
    cluster: dict[str, float], tmp_path: Path, model: Callable[..., Path]
) -> None:
    """A path that has other contents is refused, other paths of the same contents are taken."""
    folder, data = model("llama"), lines(tmp_path / "data.jsonl", *[{"text": "some text of a dataset"}] * 40)
    settings = {**SMALL, "model_name": str(folder), "dataset_name": data, "seq_length": 16, "lora_rank": 4}
    first = make_config(**settings, storage_path=str(tmp_path), experiment_name="first", debug_steps=3)
    run_dir = plan.preflight(first).config.run_dir
    where = dict(step=2, epoch=0, epoch_step=2, world_size=1, tp_size=1, dp_size=1, zero_stage=1, metrics={"loss": 1.0})
    write_manifest(run_dir / "checkpoint_00000002", 0, {}, **where)
    moved = first.change(
        model_name=str(shutil.copytree(folder, tmp_path / "moved")),
        dataset_name=lines(tmp_path / "renamed.jsonl", *[{"body": "some text of a dataset"}] * 40),
        text_column="body",
    )
    rows = {name: row for name, *row in plan.preflight(moved).rows}
    assert rows["checkpoint"][1] == "goes on from checkpoint_00000002"
    assert f"model_name '{folder}' → '{tmp_path / 'moved'}'" in rows["changed since"][0]
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model_name = .* its weights are not what this run was trained on: "):
        plan.preflight(first)
    plan.preflight(moved)


def test_a_run_that_is_being_written_is_refused(cluster: dict[str, float], actors: list[str], tmp_path: Path) -> None:
    config = make_config(**SMALL, storage_path=str(tmp_path), experiment_name="busy")
    with (
        lock_run(config),
        pytest.raises(ConfigError, match=r"another run is writing to .*busy \(started by pid"),
    ):
        plan.preflight(config)
    assert not actors
    plan.preflight(config)


def test_the_same_run_continues(tmp_path: Path) -> None:
    first = make_config(storage_path=str(tmp_path), experiment_name="first")
    record_run(first)
    found = json.loads((first.run_dir / "config.json").read_text())
    longer = first.change(num_epochs=3, log_interval=1, max_failures=0)
    assert continue_run(longer) == longer
    record_run(longer)
    assert json.loads((first.run_dir / "config.json").read_text())["run_id"] == found["run_id"]
    assert json.loads((first.run_dir / "config.json").read_text())["num_epochs"] == 3


@pytest.mark.parametrize("settings, message", [
    (dict(keep_checkpoints_by="eval_loss"), "keep_checkpoints_by = 'eval_loss': nothing is evaluated"),
    (dict(eval_interval=5), "eval_interval = 5: eval_samples is 0"),
    (dict(eval_dataset_name="org/set"), "eval_dataset_name = 'org/set': eval_samples is 0; set it, say to 16"),
    (dict(eval_dataset_name="demo", eval_samples=2), "eval_dataset_name = 'demo': must be another dataset than the"),
    (dict(min_dp_size=2), "min_dp_size = 2: must not be above dp_size, which is 1"),
    (dict(eval_samples=10**6), "eval_samples = 1000000: held-out samples must come from documents that training"),
])  # fmt: skip
def test_settings_that_contradict_each_other(refused: Callable[..., None], settings: dict, message: str) -> None:
    refused(message, **settings)


# What preflight settles

GPUS = {"GPU": 4.0, "CPU": 8.0, "accelerator_type:H100": 1.0}
OLD_GPUS = {"GPU": 4.0, "CPU": 8.0, "accelerator_type:T4": 1.0}


@pytest.mark.parametrize("resources, settings, use_gpu, model_name, why", [
    (GPUS, {}, True, "Qwen/Qwen2.5-0.5B", "GPUs"),
    (GPUS, {"tp_size": 4}, False, "demo", "CPU (4 GPUs for 8 workers)"),
    ({"CPU": 2.0}, {}, False, "demo", "CPU"),
    ({"CPU": 2.0}, {"cluster_wait_seconds": 600}, True, "Qwen/Qwen2.5-0.5B", "GPUs"),
    (GPUS, {"use_gpu": False}, False, "demo", "CPU (4 GPUs for 4 workers)"),
    (GPUS, {"model_name": "demo", "dataset_name": "demo"}, True, "demo", "GPUs"),
    ({"CPU": 2.0}, {"model_name": "org/name", "dataset_name": "org/data"}, False, "org/name", "CPU"),
])  # fmt: skip
def test_choose(resources: dict, settings: dict, use_gpu: bool, model_name: str, why: str) -> None:
    config, reason = plan.settle(make_config(**settings), resources)
    assert (config.use_gpu, reason) == (use_gpu, why)
    if model_name == "demo":
        assert Path(config.model_name).is_dir() and config.dataset_name == "demo"
    else:
        assert config.model_name == model_name
        assert config.dataset_name == settings.get("dataset_name", "Salesforce/wikitext")


@pytest.mark.parametrize("model_name, given, taken", [
    ("demo", "auto", 1e-3), ("org/name", "auto", 1e-5), ("demo", 2e-4, 2e-4), ("org/name", 1e-3, 1e-3),
])  # fmt: skip
def test_learning_rate_that_suits_the_weights(model_name: str, given: Any, taken: float) -> None:
    config, _ = plan.settle(make_config(model_name=model_name, learning_rate=given), {})
    assert config.learning_rate == taken
    assert plan.settle(config, {})[0].learning_rate == taken  # settled once: a continued run keeps it


def test_choose_paths_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have another working directory: what is local becomes absolute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "SHARED_STORAGE", tmp_path / "shared")
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("a")
    config, _ = plan.settle(make_config(model_name="model", dataset_name="text.txt"), {})
    assert (config.model_name, config.dataset_name) == (f"{tmp_path}/model", f"{tmp_path}/text.txt")
    assert config.storage_path == f"{tmp_path}/outputs"
    again, _ = plan.settle(make_config(model_name="model"), {})
    assert again.experiment_name != config.experiment_name
    (tmp_path / "shared").mkdir()
    config, _ = plan.settle(make_config(model_name="model", experiment_name="mine"), {})
    assert (config.storage_path, config.experiment_name) == (f"{tmp_path}/shared/tp_autotp", "mine")
    assert make_config(storage_path="runs").storage_path == f"{tmp_path}/runs"


@pytest.mark.parametrize("use_gpu, resources, expected", [
    (True, GPUS, {"GPU": 1.0}),
    (False, {"CPU": 8.0}, {"CPU": 1.0}),
    (False, {"CPU": 2.0}, {"CPU": 0.5}),
    (False, {"CPU": 1.0}, {"CPU": 0.25}),
    (False, {"CPU": 3.0}, {"CPU": 0.75}),
])  # fmt: skip
def test_resources_of_a_worker(use_gpu: bool, resources: dict[str, float], expected: dict[str, float]) -> None:
    assert ray_cluster.check_resources(make_config(use_gpu=use_gpu), resources) == expected


def test_shares_of_a_core_fit_and_come_back(cluster: dict[str, float]) -> None:
    """Seven workers on two cores: 2/7 is no number that Ray counts in, and rounded up they would not fit."""
    config = make_config(tp_size=7, dp_size=1, use_gpu=False)
    ray_cluster.check_placement(config, ray_cluster.check_resources(config, cluster))
    ray_cluster.check_placement(config, {"CPU": 2 / 7 // 1e-4 * 1e-4})


@pytest.mark.parametrize("settings, resources, expected", [
    (dict(use_gpu=True), GPUS, ("bf16 in hardware", "bf16, fp32 master weights, fp32 gradient sums, NCCL")),
    (dict(use_gpu=True, master_weights="bf16"), GPUS,
     ("bf16 in hardware", "bf16, bf16 master weights, bf16 gradient sums, NCCL")),
    (dict(use_gpu=True, gradient_dtype="bf16"), GPUS,
     ("bf16 in hardware", "bf16, fp32 master weights, bf16 gradient sums, NCCL")),
    (dict(use_gpu=True, precision="fp8"), {"accelerator_type:H100": 1.0},
     ("bf16 in hardware", "fp8 matmuls in bf16, fp32 master weights, fp32 gradient sums, NCCL")),
    (dict(use_gpu=True), OLD_GPUS,
     ("no bf16 in hardware", "fp16 with loss scaling, fp32 master weights, fp32 gradient sums, NCCL")),
    (dict(use_gpu=True, precision="fp32"), GPUS,
     ("bf16 in hardware", "fp32, fp32 master weights, fp32 gradient sums, NCCL")),
    (dict(use_gpu=False), GPUS, ("CPU", "fp32, fp32 master weights, fp32 gradient sums, gloo")),
    (dict(use_gpu=False, precision="bf16"), GPUS, ("CPU", "bf16, fp32 master weights, fp32 gradient sums, gloo")),
])  # fmt: skip
def test_precision_row(settings: dict[str, Any], resources: dict[str, float], expected: tuple[str, str]) -> None:
    assert checks.check_precision(make_config(**settings), resources) == expected


@pytest.mark.parametrize("settings, resources, expected", [
    (dict(use_gpu=False), GPUS, "fp32"), (dict(use_gpu=True), GPUS, "bf16"), (dict(use_gpu=True), OLD_GPUS, "fp16"),
    (dict(use_gpu=True), {"GPU": 4.0}, "auto"), (dict(use_gpu=True), {"accelerator_type:Unheard-of": 1.0}, "auto"),
    (dict(use_gpu=True), GPUS | OLD_GPUS, "fp16"), (dict(use_gpu=True, precision="fp32"), OLD_GPUS, "fp32"),
])  # fmt: skip
def test_what_auto_precision_comes_to(settings: dict[str, Any], resources: dict[str, float], expected: str) -> None:
    """It is recorded, so that a run goes on in it or is refused; "auto" only where the workers have to find out."""
    assert checks.settled_precision(make_config(**settings), resources) == expected


def test_cluster_row(cluster: dict[str, float]) -> None:
    assert ray_cluster.describe_cluster(cluster).startswith("1 node, 2 CPU cores, 0 GPUs;")
    assert "4 GPUs (H100)" in ray_cluster.describe_cluster(GPUS)


def test_what_can_run_is_planned(cluster: dict[str, float], actors: list[str], tmp_path: Path) -> None:
    settings = {**SMALL, "tp_size": 2, "dp_size": 2, "debug_steps": 3, "storage_path": str(tmp_path)}
    found = plan.preflight(make_config(**settings))
    assert (found.steps_per_epoch, found.resources_per_worker) == (3, {"CPU": 0.5})
    assert [what for what, *_ in found.rows] == [
        "versions", "cluster", "precision", "model", "speed", "data", "storage", "curves"
    ]  # fmt: skip
    assert not actors and json.loads((found.config.run_dir / "config.json").read_text())["tp_size"] == 2


def test_the_model_is_read_once(cluster: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readings could understand a config differently: all checks and the planner share one."""
    calls, load = [], facts.read_config
    monkeypatch.setattr(facts, "read_config", lambda *arguments: calls.append(arguments) or load(*arguments))
    found = plan.preflight(make_config(**{**SMALL, "storage_path": str(tmp_path)}))
    assert len(calls) == 1 and found.model.vocabulary == 2048


# The hub, played by a cache that is laid out as the hub's client lays it out. Its place and whether the machine is
# offline are read at import: each test is a process of its own.

FROM_CACHE = """
from tp2d_helpers.model import engine
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.preflight import checks, data
from tp2d_helpers.config import ConfigError, make_config
config = make_config(model_name="org/tiny", dataset_name="org/data", tp_size=2, seq_length=8)
model = ModelFacts.read(config.model_name)
print(*checks.check_model(config, model), sep="\\n")
print(engine.load_model("org/tiny", "float32").dtype)
print(*data.check_data(config, model), sep="\\n")
try:
    checks.check_model(config.change(model_name="org/half"), ModelFacts.read("org/half"))
except ConfigError as error:
    print(error)
"""
UNREACHABLE = """
import time
slept = []
time.sleep = slept.append  # between the attempts of huggingface_hub
from tp2d_helpers.model import facts
from tp2d_helpers.data import tokens
for load, name in ((facts.load_config, "org/unknown"), (tokens.load_text, "org/unknown")):
    try:
        load(name)
    except ValueError as error:
        print(type(error).__name__, error)
print(sum(slept))
"""


def python(script: str, **environment: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": IMPORT_PATH, **environment}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_hub_ids_from_the_cache(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    files = sorted(tiny_model("qwen2-tied").iterdir())
    put_into_hub_cache(tmp_path, "org/tiny", files)
    put_into_hub_cache(tmp_path, "org/half", [file for file in files if file.suffix != ".safetensors"])
    path = lines(tmp_path / "data.jsonl", *[{"text": "some text of a dataset"}] * 20)
    # As `datasets` keeps a hub dataset that was loaded once. It is made from a local file, and renamed.
    python(f"import datasets; datasets.load_dataset('json', data_files={path!r})", HF_DATASETS_CACHE=str(tmp_path))
    cached = next(tmp_path.glob("json/*/*/*/dataset_info.json")).parent
    (cached / "json-train.arrow").rename(cached / "data-train.arrow")
    shutil.copytree(cached, tmp_path / "org___data" / "default" / "0.0.0" / ("a" * 40))

    model, parallel, dtype, steps, _, data, _, half = python(
        FROM_CACHE, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path), TP2D_CACHE=str(tmp_path)
    )
    assert model.startswith("org/tiny: qwen2, ") and "2 shards" in parallel and dtype == "torch.float32"
    assert int(steps) > 1 and data.startswith("org/data: ")
    assert half == "model_name = 'org/half': has no weights (model.safetensors or pytorch_model.bin)"


def put_into_hub_cache(home: Path, name: str, files: list[Path]) -> None:
    repository, commit = home / "hub" / f"models--{name.replace('/', '--')}", "a" * 40
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in files:
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (repository / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / blob.name)


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """Without HF_HUB_OFFLINE too: huggingface_hub tries six times within half a minute, then it is the same error."""
    environment = dict(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    model, data, slept = python(UNREACHABLE, **environment)
    assert "model_name = 'org/unknown': its config can't be loaded" in model and 'take "demo"' in model
    assert "dataset_name = 'org/unknown': can't be loaded" in data and 'take "demo"' in data
    assert model.startswith("ConfigError") and data.startswith("ConfigError")
    assert 0 < float(slept) < 90


def test_old_library(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.OLDEST, "deepspeed", "99.1")
    refused("deepspeed 0.19.8: too old, 99.1 is needed")
