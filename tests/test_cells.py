"""The notebook's own cells with other models and grids than the default's; launches are faked."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import ray
import transformers
from grid import NOTEBOOK, Run

import tp2d_helpers.checkpoint
import tp2d_helpers.launch
import tp2d_helpers.preflight.plan
from tp2d_helpers.config import Config, ConfigError
from tp2d_helpers.demo import build_model, demo_model
from tp2d_helpers.preflight.plan import Plan
from tp2d_helpers.training.metrics import append, newest_step

SMALL = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=2048,
             num_key_value_heads=2)  # fmt: skip
SHAPES = {
    "gpt2": dict(n_layer=2, n_head=4, n_embd=32, vocab_size=2048),
    "mixtral": {**SMALL, "num_local_experts": 4},
    "phi3": {**SMALL, "pad_token_id": 0},
}
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, num_gpus=0, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


def code_cells() -> list[tuple[str, list[str]]]:
    """(source, tags) of each code cell."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return [(cell.source, cell.metadata.get("tags", [])) for cell in cells if cell.cell_type == "code"]


def fake_launch(plan: Plan, train_func: Any = None) -> types.SimpleNamespace:
    """What a launch leaves that later cells read: a record per step, a checkpoint's folder."""
    config, path = plan.config, plan.config.run_dir / "metrics.jsonl"
    steps = range(newest_step(path) + 1, config.num_epochs * plan.steps_per_epoch + 1)
    same = dict(loss=7.6, grad_norm=1.0, tokens=8, tokens_per_second=80.0, step_seconds=0.1, mfu=None, eval_loss=7.5)
    append(path, [dict(step=step, epoch=0, peak_memory_gib=0.5, **same) for step in steps])
    checkpoint = config.run_dir / "checkpoint_1"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "rank_0.json").write_text("{}")
    return types.SimpleNamespace(checkpoint=types.SimpleNamespace(path=str(checkpoint)))


@pytest.fixture
def run_cells(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """run_cells(exported, **parameters): every cell of the notebook; returns the namespace.

    Launches are faked, an export is the folder `exported`, and parameters are replaced as papermill does it. Left out
    are the experiments on ranks of their own: they don't depend on the parameters.
    """

    def run(exported: Path, **parameters: Any) -> dict[str, Any]:
        trusted = []

        def export(checkpoint: str, model_name: str, folder: Path, trust_remote_code: bool = False) -> Path:
            trusted.append(trust_remote_code)
            return exported

        monkeypatch.setattr(tp2d_helpers.launch, "launch", fake_launch)
        monkeypatch.setattr(tp2d_helpers.checkpoint, "export_checkpoint", export, raising=False)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        shown: list[Any] = []
        namespace: dict[str, Any] = {"__name__": "__main__", "In": [""], "display": shown.append}
        for number, (source, tags) in enumerate(code_cells()):
            sources = [source]
            if "parameters" in tags:
                lines = (f"{name} = {value!r}\n" for name, value in parameters.items())
                sources.append("# Parameters\n" + "".join(lines))
            for part in sources if "on_ranks(" not in source else []:
                namespace["In"].append(part)
                exec(compile(part, f"cell {number}", "exec"), namespace)
        return namespace | {"trusted": trusted, "shown": shown}

    return run


@pytest.mark.parametrize("kind", SHAPES)
def test_models_that_only_tp_1_takes(tmp_path: Path, kind: str, run_cells: Callable[..., dict[str, Any]]) -> None:
    """Every cell runs, and the tables leave out the grids that such a model can't have."""
    build_model({"model_type": kind, **SHAPES[kind]}, tmp_path / kind)
    settings = dict(model_name=str(tmp_path / kind), dataset_name="demo", use_gpu=False, tp_size=1, dp_size=2)
    found = run_cells(tmp_path / kind, **settings, storage_path=str(tmp_path))
    assert found["plan"].config.tp_size == 1 and found["plan"].model.config.model_type == kind
    assert found["plan"].model.parameters > 60_000
    assert found["more"].config.dp_size == 1, "one copy of the model fewer"
    assert len(found["shown"]) == 1, "the comparison with one process is drawn"


@pytest.mark.parametrize("grid", [
    dict(tp_size=1, dp_size=1), dict(tp_size=4, dp_size=1), dict(tp_size=2, dp_size=2, zero_stage=3, num_epochs=2),
])  # fmt: skip
def test_other_grids(tmp_path: Path, grid: dict[str, int], run_cells: Callable[..., dict[str, Any]]) -> None:
    settings = dict(model_name="demo", dataset_name="demo", use_gpu=False, debug_steps=3, storage_path=str(tmp_path))
    found = run_cells(demo_model(), **settings, **grid)
    assert found["more"].config.dp_size == max(1, grid["dp_size"] - 1), "a smaller grid to go on with, if there is one"
    assert len(found["records"]) == 3 * (grid.get("num_epochs", 1) + 1)


def test_one_process_that_is_too_small(
    tmp_path: Path, run_cells: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The comparison says that there is none, and the rest goes on."""
    check = tp2d_helpers.preflight.plan.check_memory

    def tight(config: Config, *rest: Any) -> Any:
        if config.tp_size == 1:
            raise ConfigError("micro-batch 4 × 256 needs 99 GiB")
        return check(config, *rest)

    monkeypatch.setattr(tp2d_helpers.preflight.plan, "check_memory", tight)
    found = run_cells(demo_model(), model_name="demo", dataset_name="demo", use_gpu=False, storage_path=str(tmp_path))
    assert found["single"] is None and not found["shown"]
    assert "one process can't train this model here.\nmicro-batch 4 × 256 needs 99 GiB" in capsys.readouterr().out


@pytest.fixture
def model_with_code(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that no library knows."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in tiny_model("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    fields = dict(model_type="mine", auto_map={"AutoConfig": "code.MineConfig", "AutoModelForCausalLM": "code.Mine"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    (folder / "code.py").write_text(CODE)
    return folder


def test_cells_pass_trust_on(model_with_code: Path, tmp_path: Path, run_cells: Callable[..., dict[str, Any]]) -> None:
    """A cell that doesn't could not load this model."""
    settings = dict(model_name=str(model_with_code), dataset_name="demo", use_gpu=False, trust_remote_code=True)
    found = run_cells(model_with_code, **settings, storage_path=str(tmp_path))
    assert found["config"].trust_remote_code
    assert set(found["trusted"]) == {True} and type(found["trained"]).__name__ == "Mine"


def copy_train_func(names: dict[str, Any]) -> None:
    """As the notebook tells a reader who wants to change the loop."""
    own: dict[str, Any] = {}
    exec("from tp2d_helpers.train import *", own)
    exec(inspect.getsource(names["train_func"]), own)
    own["setup_model_with_autotp"] = names["setup_model_with_autotp"]  # which the tests' grid listens to
    names["train_func"] = own["train_func"]


def test_a_copy_of_the_loop_trains_alike(train: Callable[..., Run]) -> None:
    settings = dict(debug_steps=3, eval_samples=4)
    assert train("llama", patch=copy_train_func, **settings).losses() == train("llama", **settings).losses()
