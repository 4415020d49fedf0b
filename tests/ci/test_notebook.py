"""The checks of `ci/notebook` on a run's files, each made to fail once, and the cleaning of stored outputs."""

from __future__ import annotations

import copy
import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ci.notebook import NOTEBOOK, ROOT, placeholders
from ci.notebook.__main__ import main
from ci.notebook.cells import failed_cells
from ci.notebook.check import checks_of, parameters_of, planned_steps
from ci.notebook.placeholders import Placeholders
from ci.notebook.refresh import METADATA, clean
from ci.notebook.run import parse
from tp2d_helpers.config import make_config

PARAMETERS = "num_epochs = 1  # passes\ndebug_steps = 20\nmodel_name = 'auto'"


def printed(text: str, name: str = "stdout") -> NotebookNode:
    return new_output("stream", name=name, text=text)


def cell(source: str, *outputs: NotebookNode, tag: str = "", count: int | None = 1, seconds: float = 0) -> NotebookNode:
    metadata = {"tags": [tag] if tag else [], "papermill": {"duration": seconds}}
    return new_code_cell(source, outputs=list(outputs), execution_count=count, metadata=metadata)


@pytest.fixture
def executed() -> NotebookNode:
    """A notebook as papermill leaves it, of a run of (1 + 1) epochs of 6 steps."""
    cells = [
        cell(PARAMETERS, tag="parameters", count=1),
        cell("# Parameters\ndebug_steps = 6", tag="injected-parameters", count=2),
        new_markdown_cell("## Launch"),
        cell("result = launch(plan)", printed("step\n" * 10), tag="launch", count=3, seconds=61.25),
        cell("", count=None),
    ]
    notebook = new_notebook(cells=cells)
    notebook.metadata.papermill = {"parameters": {"debug_steps": 6}}
    return notebook


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """Metrics of that run, with a loss that falls."""
    return metrics(6, 6)


def metrics(*epochs: int) -> list[dict[str, Any]]:
    """A record per step of epochs of these lengths."""
    epoch_of = [epoch for epoch, steps in enumerate(epochs) for _ in range(steps)]
    return [
        dict(step=k, epoch=epoch, loss=5 - k / 10, grad_norm=1.0, tokens_per_second=100.0 * k, mfu=None,
             peak_memory_gib=k / 10)
        for k, epoch in enumerate(epoch_of, start=1)
    ]  # fmt: skip


def failing(notebook: NotebookNode, records: list[dict[str, Any]], max_memory_gib: float | None = None) -> list[str]:
    return [item.name for item in checks_of(notebook, records, max_memory_gib) if not item.passed]


def test_a_good_run_passes_all_checks(executed, records):
    assert failing(executed, records, max_memory_gib=1.2) == []


def test_parameters_are_the_cells_literals_and_papermills_over_them(executed):
    assert parameters_of(executed) == {"num_epochs": 1, "debug_steps": 6, "model_name": "auto"}


def test_a_cell_that_was_not_executed_fails(executed, records):
    executed.cells[3].execution_count = None
    assert failing(executed, records) == ["cells executed"]


def test_a_cell_with_an_error_fails(executed, records):
    executed.cells[3].outputs.append(new_output("error", ename="ValueError", evalue="no", traceback=[]))
    assert failing(executed, records) == ["cells executed"]
    assert failed_cells(executed) == ["In [3] 'result = launch(plan)': ValueError: no"]


def test_a_missing_step_fails(executed, records):
    assert failing(executed, records[:-1]) == ["number of steps"]


def test_the_length_of_a_whole_epoch_is_unknown_but_epochs_are_equal(executed, records):
    executed.metadata.papermill["parameters"]["debug_steps"] = 0
    assert failing(executed, records) == []
    assert failing(executed, records[:-1]) == ["number of steps"]
    assert "number of steps" in failing(executed, [])


def promise(notebook: NotebookNode, steps: int, debug_steps: int) -> None:
    """Put preflight's table before the launch: `steps` of the `debug_steps` that the parameters ask for."""
    table = (
        "| checked | found | chosen |\n| :-- | :-- | :-- |\n"
        "| model | demo: qwen2, 1,001,600 parameters | 2 shards × 2 replicas, ZeRO stage 1 |\n"
        f"| data | demo: 99 steps per epoch, 128 packed samples | {steps} steps per epoch, 8 samples each |\n"
        "| storage | writable | /tmp |"
    )
    shown = new_output("display_data", data={"text/markdown": table, "text/plain": "<Markdown>"})
    notebook.cells.insert(3, cell("show_table(header, plan.rows)", shown))
    notebook.metadata.papermill["parameters"]["debug_steps"] = debug_steps


@pytest.mark.parametrize(
    ("steps", "debug_steps", "epochs", "passes"),
    [
        (20, 20, (20, 20), True),
        (15, 20, (15, 15), True),  # the data has no more
        (15, 20, (14, 14), False),
        (15, 20, (16, 14), False),
        (15, 20, (15,), False),
        (15, 20, (10, 10, 10), False),
        (20, 20, (15, 15), False),
        (15, 20, (20, 20), False),
        (25, 20, (25, 25), False),  # no plan may exceed debug_steps
        (15, 0, (15, 15), True),
        (15, 0, (14, 14), False),
    ],
)
def test_every_epoch_has_the_steps_that_preflight_promised(executed, steps, debug_steps, epochs, passes):
    promise(executed, steps, debug_steps)
    assert failing(executed, metrics(*epochs)) == ([] if passes else ["number of steps"])


def test_without_preflights_table_an_epoch_has_debug_steps(executed):
    assert planned_steps(executed) is None
    assert failing(executed, metrics(5, 5)) == ["number of steps"]


def test_epochs_of_unequal_length_are_told_apart(executed):
    found = [item.found for item in checks_of(executed, metrics(7, 5), None) if not item.passed]
    assert found == ["12 = 7 + 5"]


def test_preflights_table_is_found_in_the_real_notebook():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert planned_steps(notebook) == parameters_of(notebook)["debug_steps"]


def test_a_step_that_appears_twice_fails(executed, records):
    records[7]["step"] = 7
    assert failing(executed, records) == ["steps 1 to n, each once"]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "5"])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_value_that_is_not_a_finite_number_fails(executed, records, name, value):
    records[5][name] = value
    assert failing(executed, records) == [f"every {name} finite"]


def test_a_loss_that_does_not_fall_fails(executed, records):
    for record in records:
        record["loss"] = 4.0
    assert failing(executed, records) == ["loss of the last 5 steps"]


def test_a_run_too_short_to_compare_losses_fails(executed):
    executed.metadata.papermill["parameters"]["debug_steps"] = 4
    assert failing(executed, metrics(4, 4)) == ["loss of the last 5 steps"]


def test_a_peak_above_the_limit_fails(executed, records):
    assert failing(executed, records, max_memory_gib=1.19) == ["peak memory, GiB"]


def test_a_launch_that_prints_too_much_fails(executed, records):
    executed.cells[3].outputs = [printed("line\n" * 40)]
    assert failing(executed, records) == []
    executed.cells[3].outputs.append(printed("and one\n", "stderr"))
    assert failing(executed, records) == ["lines printed by launch"]


def test_a_notebook_without_a_launch_fails(executed, records):
    executed.cells[3].metadata.tags = []
    assert failing(executed, records) == ["lines printed by launch"]


def test_the_check_command_prints_measurements_and_every_check(executed, records, tmp_path, capsys):
    notebook, metrics = tmp_path / "n.ipynb", tmp_path / "metrics.jsonl"
    nbformat.write(executed, notebook)
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["check", str(notebook), str(metrics), "--max-memory-gib", "2"]) == 0
    out = capsys.readouterr().out
    assert "loss, first and last step  4.9000 3.8000" in out
    assert "peak memory, GiB           1.20" in out
    assert "tokens/s, median           650" in out
    assert "MFU, median                unknown" in out
    assert "In [3], seconds            61.2  result = launch(plan)" in out
    assert "ok   number of steps: 12 (expected 12)" in out
    assert main(["check", str(notebook), str(metrics), "--max-memory-gib", "1"]) == 1
    assert "FAIL peak memory, GiB: 1.20 (expected <= 1)" in capsys.readouterr().out


REPLACE = Placeholders(
    paths={"/srv/repo": ".", "/srv/repo/.venv": ".venv", "/root": "~", "/tmp/x": "outputs"},
    names={"build-7": "localhost", "root": "user", "alice": "user"},
    known='the root of the tree; storage = "/tmp/known"',
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/repo/a.py", "./a.py"),
        ("file:/srv/repo", "file:."),
        ("\x1b[31m/srv/repo\x1b[0m", "\x1b[31m.\x1b[0m"),
        ("/srv/repo/.venv/bin/python", ".venv/bin/python"),
        ("/srv/repository /mnt/srv/repo", "/srv/repository /mnt/srv/repo"),
        ("/root/data, /rooted", "~/data, /rooted"),
        ("/tmp/x/tp_autotp/export", "outputs/tp_autotp/export"),
        ("/tmp/ray/session_1 and /var/tmp/y", "$TMPDIR/ray/session_1 and $TMPDIR/y"),
        ("/tmp/known", "/tmp/known"),
        ("alice@build-7: malice", "user@localhost: malice"),
        ("root", "root"),
        ("ip=10.0.1.12, 172.16.0.2:6379, 192.168.1.1", "ip=<ip>, <ip>:6379, <ip>"),
        ("127.0.0.1 1.10.0.1.2 172.40.0.1 0.19.8", "127.0.0.1 1.10.0.1.2 172.40.0.1 0.19.8"),
    ],
)
def test_placeholders(text, expected):
    assert REPLACE(text) == expected


def test_a_user_named_like_a_word_of_a_module_stays(executed, tmp_path, monkeypatch):
    module = tmp_path / "tp2d_helpers/data/tokens.py"
    module.parent.mkdir(parents=True)
    module.write_text("tokenizer = None")
    monkeypatch.setattr(placeholders, "ROOT", tmp_path)
    for user, stored in [("tokenizer", "tokenizer"), ("someone", "user")]:
        monkeypatch.setattr("getpass.getuser", lambda user=user: user)
        assert Placeholders.of_this_machine(tmp_path, executed)(user) == stored


def test_this_machine_reads_as_the_readers(tmp_path, executed, monkeypatch):
    for variable in placeholders.CACHES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path / "cache"))
    replace = Placeholders.of_this_machine(tmp_path / "storage", executed)
    home, host = Path.home(), socket.gethostname()
    found = f"{tmp_path}/storage/tp_autotp {ROOT}/ci/run.sh {tmp_path}/cache/demo {home}/.cache/huggingface/hub"
    assert replace(found) == "outputs/tp_autotp ./ci/run.sh ~/.cache/tp2d/demo ~/.cache/huggingface/hub"
    assert replace(f"{sys.prefix}/bin/python") == ".venv/bin/python"
    assert replace(f"node {host} is up") == "node localhost is up"
    assert replace(str(home / "texts")) == "~/texts"


def test_clean_keeps_only_what_is_the_same_in_every_run(executed):
    figure = {"image/png": "/srv/repo", "text/plain": "<Figure at /srv/repo>"}
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    table = {"text/html": ["<td>/root/a</td>"], "text/plain": "table"}
    executed.cells[3].outputs = [
        printed("warning in /srv/repo\n", "stderr"),
        printed("to /tmp/x/r"),
        printed("un\n", "stderr"),
        printed("un\n"),
        new_output("display_data", data=figure),
        new_output("display_data", data=widget),
        new_output("execute_result", data=table, execution_count=3),
    ]
    executed.metadata.update({"widgets": {}, "kernelspec": {"name": "mine"}, "toc": {"depth": 2}})
    executed.cells[3].metadata.update({"execution": {"a": 1}, "ExecuteTime": {}, "keep": 1})
    before = copy.deepcopy(executed)

    cleaned = clean(executed, REPLACE)

    assert executed == before, "the notebook that was given is changed"
    assert cleaned.metadata == {**METADATA, "toc": {"depth": 2}, "tp2d": {"seconds": {"core": 65}}}
    assert [c.source for c in cleaned.cells] == [c.source for i, c in enumerate(before.cells) if i != 1]
    assert [c.execution_count for c in cleaned.cells if c.cell_type == "code"] == [1, 2, 3]
    launch = cleaned.cells[2]
    assert launch.metadata == {"tags": ["launch"], "keep": 1}
    text, picture, html = launch.outputs
    assert text == printed("to outputs/run\n")
    assert picture.data == {"image/png": "/srv/repo", "text/plain": "<Figure at .>"}
    assert html.data["text/html"] == ["<td>~/a</td>"]
    assert html.execution_count == 2
    assert cleaned.cells[3].metadata == {}  # no empty list of tags
    nbformat.validate(cleaned)
    assert clean(cleaned, REPLACE) == cleaned


def test_clean_refuses_to_change_an_output_that_nbval_compares(executed):
    executed.cells[3].metadata.tags.append("nbval-check-output")
    clean(executed, REPLACE)
    executed.cells[3].outputs.append(printed("/tmp/other"))
    with pytest.raises(ValueError, match=re.escape("'result = launch(plan)' is tagged nbval-check-output")):
        clean(executed, REPLACE)


def test_the_callers_parameters_override_where_a_run_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("experiment_name: filed\ntp_size: 4\n")
    defaults = {"storage_path": str(tmp_path / "default"), "experiment_name": "fresh"}

    def run_dir(*options: str) -> Path:
        return parse(options, defaults)[1]

    assert run_dir() == tmp_path / "default/fresh"
    assert run_dir("-f", "mine.yaml") == tmp_path / "default/filed"
    assert run_dir("-p", "experiment_name", "named", "-f", "mine.yaml") == tmp_path / "default/named"
    assert run_dir("-p", "storage_path", str(tmp_path / "a b")) == tmp_path / "a b/fresh"
    assert run_dir("-y", "storage_path: auto") == tmp_path / "default/fresh"
    context, _ = parse(["-f", "ci/params/cpu.yaml"], defaults)  # as seen from the repository
    assert context.params["parameters_file"] == (str(ROOT / "ci/params/cpu.yaml"),)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        run_dir("-f", "nowhere.yaml")
    with pytest.raises(ValueError, match="storage_path must be a folder"):
        run_dir("-p", "storage_path", "s3://bucket")


@pytest.mark.parametrize("file", sorted((ROOT / "ci/params").glob("*.yaml")), ids=lambda path: path.name)
def test_parameter_files_are_valid_settings(file):
    make_config(**yaml.safe_load(file.read_text()))
