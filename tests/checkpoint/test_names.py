"""Names of runs and folders with characters that mean something in globs, patterns, formats, URLs and shells."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from grid import IMPORT_PATH, ROOT, Run, run_grid

from tp2d_helpers import launch
from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.checkpoint.resize import universal_problem
from tp2d_helpers.checkpoint.run_folder import newest_checkpoint
from tp2d_helpers.checkpoint.settings import record_run
from tp2d_helpers.config import Config
from tp2d_helpers.training.metrics import read_metrics

ODD = "lr[1e-4] {x} (a+b) *?|^$ %20%s 'c' \"d\" #e&f;g:h,i=j~k@l!m`n`é"


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_run_of_any_name_goes_on_and_is_exported(
    tiny_model: Callable[[str], Path], train: Callable[..., Run], tmp_path: Path, zero_stage: int
) -> None:
    """On its grid and on another one; model, data and storage are called so, too."""
    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / ODD / "model" / ODD))
    data = tmp_path / ODD / f"{ODD}.jsonl"
    data.write_text('{"text": "one and two and three and four"}\n' * 40)
    where = dict(storage_path=str(tmp_path / ODD), experiment_name=ODD, dataset_name=str(data))
    run = train(model, **where, seq_length=16, debug_steps=2, dp_size=2, zero_stage=zero_stage)
    config = Config(**run.config)
    record_run(config)
    again = config.change(num_epochs=2, trust_checkpoint=True)
    run_grid(again.model_dump())
    checkpoint, _ = newest_checkpoint(config.run_dir)
    assert universal_problem(checkpoint) and checkpoint.name == "checkpoint_00000004"
    run_grid(again.change(num_epochs=3, tp_size=2, dp_size=1, batch_size_per_gpu=4).model_dump())
    assert universal_problem(checkpoint) is None
    assert sorted(path.name for path in checkpoint.glob("*universal*")) == ["universal"]
    assert [record["step"] for record in read_metrics(config.run_dir / "metrics.jsonl")] == list(range(1, 7))
    checkpoint, _ = newest_checkpoint(config.run_dir)
    export_checkpoint(checkpoint, str(model), config.run_dir / f"export {ODD}")


def test_rays_metrics_are_left_out_of_a_name_with_an_accent(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take ASCII alone, and would end the run; the variable is as it was afterwards."""
    for before in (None, "1"):
        monkeypatch.delenv(launch.RAY_METRICS, raising=False) if before is None else monkeypatch.setenv(
            launch.RAY_METRICS, before
        )
        for name, within in (("plain", before), ("é", "0")):
            with launch.ray_metrics(name.isascii()):
                assert os.environ.get(launch.RAY_METRICS) == within
            assert os.environ.get(launch.RAY_METRICS) == before


@pytest.mark.slow  # Ray starts, and launches a run: half a minute
def test_ray_launches_a_run_of_any_name(tmp_path: Path) -> None:
    settings = dict(model_name="demo", dataset_name="demo", use_gpu=False, tp_size=1, dp_size=1, seq_length=64,
                    debug_steps=1, storage_path=str(tmp_path / ODD), experiment_name=ODD)  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / "driver.py"), json.dumps(settings)]
    environment = os.environ | {"PYTHONPATH": IMPORT_PATH, "TP2D_CACHE": str(tmp_path / f"cache {ODD}")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert newest_checkpoint(tmp_path / ODD / ODD)[0].name == "checkpoint_00000001"
