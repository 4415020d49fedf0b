"""The notebook's own cells with other models than the demo: those before the launch, and the export's."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import ray
import transformers
from grid import NOTEBOOK

import tp2d_helpers.checkpoint
from tp2d_helpers.demo import build_model

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


def run_cells_before_the_launch(**parameters: Any) -> dict[str, Any]:
    """Their namespace, with some parameters replaced as papermill does it."""
    namespace: dict[str, Any] = {"__name__": "__main__", "In": [""]}
    for number, (source, tags) in enumerate(code_cells()):
        if "launch" in tags:
            return namespace
        sources = [source]
        if "parameters" in tags:
            sources.append("# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in parameters.items()))
        for part in sources:
            namespace["In"].append(part)
            exec(compile(part, f"cell {number}", "exec"), namespace)
    raise LookupError("no cell is tagged 'launch'")


@pytest.mark.parametrize("kind", SHAPES)
def test_models_that_only_tp_1_takes(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell runs, and the tables leave out the grids that such a model can't have."""
    build_model({"model_type": kind, **SHAPES[kind]}, tmp_path / kind)
    settings = dict(model_name=str(tmp_path / kind), dataset_name="demo", use_gpu=False, tp_size=1, dp_size=2)
    found = run_cells_before_the_launch(**settings, storage_path=str(tmp_path))
    assert found["plan"].config.tp_size == 1 and found["plan"].model.config.model_type == kind
    assert found["plan"].model.parameters > 60_000


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


def test_cells_pass_trust_on(model_with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that doesn't could not load this model."""
    settings = dict(model_name=str(model_with_code), dataset_name="demo", use_gpu=False, trust_remote_code=True)
    namespace = run_cells_before_the_launch(**settings, storage_path=str(tmp_path))
    assert namespace["config"].trust_remote_code
    exported = []

    def export(checkpoint: str, model_name: str, folder: Path, trust_remote_code: bool = False) -> Path:
        exported.append(trust_remote_code)
        return model_with_code

    monkeypatch.setattr(tp2d_helpers.checkpoint, "export_checkpoint", export, raising=False)
    namespace["result"] = types.SimpleNamespace(checkpoint=types.SimpleNamespace(path="somewhere"))
    source = next(source for source, _ in code_cells() if "export_checkpoint(" in source)
    exec(compile(source, "export", "exec"), namespace)
    assert exported == [True] and type(namespace["trained"]).__name__ == "Mine"
