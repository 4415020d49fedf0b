"""An export is the trained model, bit for bit; it is made one weight at a time; a bad checkpoint leaves no trace."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from elsewhere import exports
from families import TYPES
from grid import ROOT, Run, fork_context, run_grid
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tp2d_helpers.checkpoint import disk, hugging_face
from tp2d_helpers.checkpoint.export import main
from tp2d_helpers.checkpoint.hugging_face import export_checkpoint
from tp2d_helpers.checkpoint.mark import MARK, write_mark
from tp2d_helpers.checkpoint.run_folder import checkpoint_tag
from tp2d_helpers.checkpoint.shards import merge
from tp2d_helpers.config import make_config
from tp2d_helpers.model.cuts import Cut
from tp2d_helpers.model.plan import Plan
from tp2d_helpers.model.sharding import meta_model

Train = Callable[..., Run]
RUNS = [("qwen2-tied", 2, 2, 2), ("qwen2-untied", 1, 2, 2), ("qwen3", 1, 4, 1), ("mistral", 1, 2, 1),
        ("llama", 2, 2, 2), ("llama", 3, 2, 2)]  # fmt: skip
TOKENS = torch.arange(96).reshape(2, 48) * 37 % 2048  # longer than Mistral's window


def folder_of(run: Run) -> Path:
    """The run's last checkpoint."""
    return Path(run.config["storage_path"], run.config["experiment_name"], "checkpoint_00000020")


def hashes(folder: Path) -> dict[str, str]:
    """Of all files in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def small_sub_groups(names: dict[str, Any]) -> None:
    """A patch for `run_grid`: ZeRO stage 3 works on a few weights at a time, as it does on a billion of them."""
    from tp2d_helpers.model import engine

    make = engine.deepspeed_config

    def small(*args: Any) -> dict[str, Any]:
        settings = make(*args)
        return settings | {"zero_optimization": settings["zero_optimization"] | {"sub_group_size": 8000}}

    engine.deepspeed_config = small


def assert_is_the_trained_model(run: Run, folder: Path) -> None:
    """The exported weights are those that the run's ranks held at its end."""
    exported = AutoModelForCausalLM.from_pretrained(folder)
    weights = dict(exported.named_parameters(remove_duplicate=False))
    assert weights.keys() == run.weights.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, run.weights[name])] == []
    assert exported.dtype == torch.float32
    untrained = AutoModelForCausalLM.from_pretrained(run.config["model_name"])
    assert not torch.equal(untrained.lm_head.weight, exported.lm_head.weight)


@pytest.mark.parametrize("model, zero_stage, tp_size, dp_size", RUNS, ids=lambda part: str(part))
def test_export_is_the_trained_model(
    train: Train, tmp_path: Path, model: str, zero_stage: int, tp_size: int, dp_size: int
) -> None:
    run = train(model, zero_stage=zero_stage, tp_size=tp_size, dp_size=dp_size)
    before = hashes(folder_of(run))
    folder = export_checkpoint(folder_of(run), run.config["model_name"], tmp_path / "export")
    assert hashes(folder_of(run)) == before, "an export only reads the checkpoint"
    assert_is_the_trained_model(run, folder)
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("README.md", MARK),
    }
    trained_from = AutoTokenizer.from_pretrained(run.config["model_name"])
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == trained_from.get_vocab()
    names = safetensors.torch.load_file(folder / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (model not in ("qwen2-tied", "qwen3")), "tied weights are written once"


def test_export_of_zero_sub_groups(train: Train, tmp_path: Path) -> None:
    run = train("qwen2-tied", patch=small_sub_groups, zero_stage=3, tp_size=2, dp_size=2)
    (path, *_) = folder_of(run).glob("*/*zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert len(torch.load(path, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]) > 2
    assert_is_the_trained_model(run, export_checkpoint(folder_of(run), run.config["model_name"], tmp_path / "export"))


# What the model computes.


def logits(engine: Any, tp_group: dist.ProcessGroup, dp_group: dist.ProcessGroup) -> torch.Tensor:
    """For `run_grid(after=)`: of `TOKENS`, fp32 [batch, sequence, vocabulary]. Each TP rank has a part of the last."""
    engine.eval()
    with torch.no_grad():
        part = engine(input_ids=TOKENS, use_cache=False).logits.float().contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(parts, part, group=tp_group)
    return torch.cat(parts, dim=-1)


def train_for_logits(model: Path, folder: Path, **settings: Any) -> tuple[Path, torch.Tensor]:
    """(the checkpoint, the logits of the sharded model) after a few steps."""
    fixed = dict(dataset_name="demo", use_gpu=False, batch_size_per_gpu=2, seq_length=64, debug_steps=3)
    config = make_config(
        **fixed, model_name=str(model), learning_rate=1e-3, storage_path=str(folder / "run"), **settings
    )
    answers = run_grid(config.model_dump(), after=logits)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    return config.run_dir / "checkpoint_00000003", answers[0]


@pytest.mark.parametrize("model, zero_stage, tp_size, dp_size", [("llama", 3, 2, 2), ("qwen3", 1, 2, 1)])
def test_logits(tiny_model: Callable, tmp_path: Path, model: str, zero_stage: int, tp_size: int, dp_size: int) -> None:
    grid = dict(zero_stage=zero_stage, tp_size=tp_size, dp_size=dp_size)
    checkpoint, sharded = train_for_logits(tiny_model(model), tmp_path, precision="fp32", **grid)
    folder = export_checkpoint(checkpoint, str(tiny_model(model)), tmp_path / "export")
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    assert exported.shape == sharded.shape and sharded.std() > 0.1
    assert (exported - sharded).abs().max() <= 1e-5


def fp32_masters(tag: Path, tp_rank: int, dp_size: int) -> dict[str, torch.Tensor]:
    """The masters of a TP rank's shards at ZeRO stage 1 or 2: flattened, end to end, and divided among the DP ranks."""
    shapes = torch.load(tag / f"mp_rank_{tp_rank:02d}_model_states.pt", weights_only=False)["param_shapes"]
    paths = [tag / f"bf16_zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt" for dp_rank in range(dp_size)]
    parts = [torch.load(path, weights_only=False)["optimizer_state_dict"] for path in paths]
    masters = {}
    for group, named in enumerate(shapes):
        flat = torch.cat([part["single_partition_of_fp32_groups"][group] for part in parts])
        for name, shape in ((name, torch.Size(shape)) for name, shape in named.items()):
            masters[name], flat = flat[: shape.numel()].view(shape), flat[shape.numel() :]
    return masters


def test_bf16(tiny_model: Callable, tmp_path: Path) -> None:
    """The weights are the rounding of the fp32 masters; the logits differ by bf16's rounding of what is in between."""
    settings = dict(zero_stage=1, tp_size=2, dp_size=2, precision="bf16")
    checkpoint, sharded = train_for_logits(tiny_model("qwen2-tied"), tmp_path, **settings)
    folder = export_checkpoint(checkpoint, str(tiny_model("qwen2-tied")), tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    masters = [fp32_masters(checkpoint_tag(checkpoint), tp_rank, dp_size=2) for tp_rank in range(2)]
    cuts = Plan.of(model, 2).cuts
    for name, weight in model.named_parameters():
        shards = [shards[name] for shards in masters][: 2 if name in cuts else 1]
        master = merge(name, shards, weight.shape, torch.float32, cuts.get(name))
        assert torch.equal(weight, master.bfloat16()), name
        assert not torch.equal(weight.float(), master), f"{name}: the master was no more exact"
    with torch.no_grad():
        exported, exact = model(TOKENS).logits.float(), model.float()(TOKENS).logits
    rounding = (exported - exact).pow(2).mean().sqrt()
    assert 0 < rounding < 0.01 * exact.std()
    assert (sharded - exact).pow(2).mean().sqrt() < 2 * rounding


# Files of several GB, in small.


def fabricated(shapes: dict[str, torch.Size], tp_rank: int) -> dict[str, torch.Tensor]:
    """A TP rank's weights in `fabricate`: like no other's."""
    return {
        name: (torch.arange(shape.numel()) * 3 + 7 * i + tp_rank).float().view(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def fabricate(folder: Path, model: Path, zero_stage: int, tp_size: int, dp_size: int) -> Path:
    """A checkpoint as DeepSpeed writes it, quickly; at ZeRO stage 3 with sub-groups, and with padding if dp_size is 3.

    (No weight of a run in these tests has a size that 2 or 4 does not divide.)
    """
    tag = folder / "step_00000001"
    tag.mkdir(parents=True)
    whole = meta_model(AutoConfig.from_pretrained(model))
    shapes = Plan.of(whole, tp_size).shapes(whole)
    common = dict(param_shapes=[shapes], dp_world_size=dp_size, mp_world_size=tp_size, ds_config={})
    for tp_rank in range(tp_size):
        weights = fabricated(shapes, tp_rank)
        if zero_stage < 3:
            torch.save(dict(module=weights, **common), tag / f"mp_rank_{tp_rank:02d}_model_states.pt")
            continue
        torch.save(dict(module={}, **common), tag / f"zero_pp_rank_0_mp_rank_{tp_rank:02d}_model_states.pt")
        padded = [pad(weight.flatten(), (0, -weight.numel() % dp_size), value=-1) for weight in weights.values()]
        for dp_rank in range(dp_size):
            flat = torch.cat([weight.chunk(dp_size)[dp_rank] for weight in padded])
            groups = [group.clone() for group in flat.split(1_000_003)]
            path = tag / f"zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": {"fp32_flat_groups": groups}}, path)
    return folder


def anonymous_memory() -> int:
    """Bytes of this process that are not a file's: what the kernel can't drop."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def export_measured(arguments: tuple, answer: Any) -> None:
    """In a process of its own: send by how many bytes the anonymous memory grew at most, looking every millisecond."""
    torch.set_num_threads(1)
    done, peak, before = threading.Event(), 0, anonymous_memory()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    export_checkpoint(*arguments)
    done.set()
    watcher.join()
    answer.send(peak)


@pytest.fixture(scope="session")
def deep_model(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer of a model of many small weights: 69 MB in fp32, the largest 2 MB."""
    folder = tmp_path_factory.mktemp("deep")
    shutil.copytree(tiny_model("llama"), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(folder)
    config.update(dict(hidden_size=256, intermediate_size=1000, num_hidden_layers=16, head_dim=32))
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("zero_stage, dp_size", [(1, 1), (3, 3)])
def test_memory(deep_model: Path, tmp_path: Path, zero_stage: int, dp_size: int) -> None:
    """At its peak an export takes a few times the largest weight, not the model."""
    checkpoint = fabricate(tmp_path / "checkpoint", deep_model, zero_stage, tp_size=2, dp_size=dp_size)
    whole = meta_model(AutoConfig.from_pretrained(deep_model))
    sizes = [parameter.nbytes for parameter in whole.parameters()]
    assert sum(sizes) > 60e6 and max(sizes) < 3e6
    reader, writer = fork_context().Pipe(duplex=False)
    arguments = (checkpoint, str(deep_model), tmp_path / "export")
    process = fork_context().Process(target=export_measured, args=(arguments, writer))
    process.start()
    writer.close()
    peak = reader.recv()
    process.join()
    print(f"peak {peak / 1e6:.1f} MB, largest weight {max(sizes) / 1e6:.1f} MB, model {sum(sizes) / 1e6:.1f} MB")
    assert process.exitcode == 0 and peak < 6 * max(sizes)
    exported = safetensors.torch.load_file(tmp_path / "export" / "model.safetensors")
    plan = Plan.of(whole, 2)
    shards = [fabricated(plan.shapes(whole), tp_rank) for tp_rank in range(2)]
    for name, parameter in whole.named_parameters():
        cut = plan.cuts.get(name)
        merged = merge(name, [one[name] for one in shards[: 2 if cut else 1]], parameter.shape, torch.float32, cut)
        assert torch.equal(exported[name], merged), name


def test_several_files(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train("llama", zero_stage=3, tp_size=2, dp_size=2)
    monkeypatch.setattr(hugging_face, "MAX_FILE_BYTES", 300_000)
    folder = export_checkpoint(folder_of(run), run.config["model_name"], tmp_path / "export")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in run.weights.values())
    assert_is_the_trained_model(run, folder)


def test_files_of_a_mixture_are_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An expert's weight is counted as what it is, though all experts' are one in memory."""
    limit = 600_000
    monkeypatch.setattr(hugging_face, "MAX_FILE_BYTES", limit)
    folder = exports({"qwen3_moe": TYPES["qwen3_moe"]}, tmp_path)["qwen3_moe"]
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    assert len(sizes) > 2 and all(one + other > limit for one, other in itertools.pairwise(sizes))


def test_shards_that_do_not_fit() -> None:
    whole, cut = torch.Size([4, 6]), Cut.even(1, 6, 2)
    assert merge("w", [torch.zeros(4, 3)] * 2, whole, torch.float32, cut).shape == whole
    for wrong in ([4, 2], [4, 6, 1], [4], [2, 3], [3, 6]):
        with pytest.raises(
            ValueError, match=f"w: shards {[wrong, wrong]} don't make {list(whole)}".replace("[", r"\[")
        ):
            merge("w", [torch.zeros(wrong)] * 2, whole, torch.float32, cut)
    with pytest.raises(ValueError, match="don't make"):
        merge("w", [torch.zeros(4, 3), torch.zeros(4, 2)], whole, torch.float32, cut)


# What goes wrong.


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def checkpoint(train: Train, tmp_path: Path) -> Path:
    """A copy, at ZeRO stage 3, in a run's folder with an older export beside it."""
    run = train("llama", zero_stage=3, tp_size=2, dp_size=2)
    folder = Path(shutil.copytree(folder_of(run), tmp_path / "run" / folder_of(run).name))
    (tmp_path / "run" / "config.json").write_text(json.dumps(run.config))
    (tmp_path / "run" / "export").mkdir()
    (tmp_path / "run" / "export" / "model.safetensors").write_text("older")
    write_mark(tmp_path / "run" / "export")
    return folder


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _replace_by_code(path: Path) -> None:
    torch.save({"optimizer_state_dict": Code(path.parents[2] / "made-by-code")}, path)


def _replace_by_text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def _shorten(path: Path) -> None:
    torch.save({"optimizer_state_dict": {"fp32_flat_groups": [torch.zeros(7)]}}, path)


STATES, MASTERS = "zero_pp_rank_0_mp_rank_01_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize(
    "file, damage, message",
    [
        (STATES, _truncate, "is truncated, or no file of PyTorch's"),
        (MASTERS, _truncate, "is truncated, or no file of PyTorch's"),
        (STATES, _empty, "is empty"),
        (STATES, _shorten, "no file of a DeepSpeed checkpoint: it has no module, param_shapes"),
        (STATES, Path.unlink, "No such file"),
        (MASTERS, Path.unlink, "No such file"),
        (MASTERS, _replace_by_text, "is truncated, or no file of PyTorch's"),
        (MASTERS, _shorten, "has 7 fp32 master weights; by the model's shapes it must have"),
        (MASTERS, _replace_by_code, "holds code that is not executed: posix.mkdir"),
        ("", shutil.rmtree, "is no checkpoint: it has no folder step_"),
    ],
)
def test_damaged_checkpoint(checkpoint: Path, tiny_model: Callable, file: str, damage: Callable, message: str) -> None:
    """One line that names the file; the older export stays, and nothing comes beside it."""
    damage(checkpoint_tag(checkpoint) / file)
    before = hashes(checkpoint.parent)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        export_checkpoint(checkpoint, str(tiny_model("llama")), checkpoint.parent / "export")
    text = str(caught.value)
    assert message in text and (file or checkpoint.name) in text and "\n" not in text
    assert isinstance(caught.value, FileNotFoundError) == (damage in (Path.unlink, shutil.rmtree))
    assert hashes(checkpoint.parent) == before
    assert {path.name for path in checkpoint.parent.iterdir()} == {checkpoint.name, "config.json", "export"}


def test_the_code_is_code(tmp_path: Path) -> None:
    """What `test_damaged_checkpoint` does not execute would have left a trace."""
    torch.save(Code(tmp_path / "made-by-code"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "made-by-code").exists()


def test_failure_while_writing(checkpoint: Path, tiny_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hashes(checkpoint.parent)
    with pytest.raises(ValueError, match=r"embed_tokens.weight: shards .* was it trained from this model"):
        export_checkpoint(checkpoint, str(tiny_model("qwen3")), checkpoint.parent / "export")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hugging_face, "whole_weight", full)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(checkpoint, str(tiny_model("llama")), checkpoint.parent / "export")
    assert hashes(checkpoint.parent) == before
    assert {path.name for path in checkpoint.parent.iterdir()} == {checkpoint.name, "config.json", "export"}


def test_only_an_export_is_replaced(checkpoint: Path, tiny_model: Callable, tmp_path: Path) -> None:
    model, run = str(tiny_model("llama")), checkpoint.parent
    before = hashes(run)
    with pytest.raises(ValueError, match=f"{run} holds something other than an export"):
        export_checkpoint(checkpoint, model, run)
    with pytest.raises(ValueError, match="is the model that training began with"):
        export_checkpoint(checkpoint, model, model)
    assert hashes(run) == before
    (tmp_path / "new").mkdir()
    assert export_checkpoint(checkpoint, model, tmp_path / "new") == tmp_path / "new"


def test_nothing_of_the_users_is_replaced(checkpoint: Path, tiny_model: Callable, tmp_path: Path) -> None:
    """A model that somebody downloaded, notes that were laid beside an export, a card that was edited."""
    model, folder = str(tiny_model("llama")), tmp_path / "out"
    shutil.copytree(tiny_model("qwen3"), folder)
    (folder / "notes.md").write_text("mine")
    before = hashes(folder)
    with pytest.raises(ValueError, match="out holds something other than an export"):
        export_checkpoint(checkpoint, model, folder)
    assert hashes(folder) == before
    shutil.rmtree(folder)
    for _ in range(2):
        export_checkpoint(checkpoint, model, folder)
    for name in ("notes.md", "README.md", "more/eval.json"):
        path = folder / name
        text = path.read_text() if path.exists() else ""
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "mine")
        with pytest.raises(ValueError, match=rf"added to the export or changed since \({name}\).* would be lost"):
            export_checkpoint(checkpoint, model, folder)
        assert path.read_text() == text + "mine"
        path.write_text(text) if text else path.unlink()
    export_checkpoint(checkpoint, model, folder)


def test_an_export_for_which_there_is_no_room(
    checkpoint: Path, tiny_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 500_000))
    before = hashes(checkpoint.parent)
    with pytest.raises(ValueError, match=r"the export needs 1\.4 MB, and the disk of .*export has 0\.5 MB free"):
        export_checkpoint(checkpoint, str(tiny_model("llama")), checkpoint.parent / "export")
    assert hashes(checkpoint.parent) == before


# What comes with the model.


def test_the_chat_template_of_the_run(checkpoint: Path, tiny_model: Callable, tmp_path: Path) -> None:
    """As it was when the run was trained by it; the file may be another by now, or gone."""
    model, template = str(tiny_model("llama")), tmp_path / "template.jinja"
    settings = json.loads((checkpoint.parent / "config.json").read_text())
    template.write_text("then {{ messages }}")
    (checkpoint.parent / "config.json").write_text(
        json.dumps(settings | {"chat_template": str(template), "template": template.read_text()})
    )
    for change in (lambda: template.write_text("now"), template.unlink):
        change()
        folder = export_checkpoint(checkpoint, model, tmp_path / "export")
        assert AutoTokenizer.from_pretrained(folder).chat_template == "then {{ messages }}"


@pytest.mark.parametrize("zero_stage, tp_size", [(1, 2), (3, 1)])
def test_a_weight_that_its_class_keeps_from_training(
    family: Callable[..., Path], tmp_path: Path, zero_stage: int, tp_size: int
) -> None:
    """It is in no checkpoint; the model has it, with a value of its own."""
    model = family("hrm_text", tie_word_embeddings=False)
    settings = dict(zero_stage=zero_stage, tp_size=tp_size, dp_size=1, precision="fp32")
    checkpoint, _ = train_for_logits(model, tmp_path, **settings)
    folder = export_checkpoint(checkpoint, str(model), tmp_path / "export")
    then, now = (safetensors.torch.load_file(place / "model.safetensors") for place in (model, folder))
    assert then.keys() == now.keys() and then["model.z_L_init"].std() > 0
    same = [name for name in then if torch.equal(then[name], now[name])]
    assert "model.z_L_init" in same and len(same) < len(then) / 2


CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .own_layers import times
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        return times(super().forward(*args, **kwargs))
""",
    "own_layers.py": "from .own_numbers import FACTOR\ndef times(out):\n    out.logits *= FACTOR\n    return out\n",
    "own_numbers.py": "FACTOR = 2.0\n",
}


def test_code_that_comes_with_the_model(checkpoint: Path, tiny_model: Callable, tmp_path: Path) -> None:
    """It is in the export, which loads in a process that has never seen the original."""
    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / "own"))
    for name, text in CODE.items():
        (model / name).write_text(text)
    config = json.loads((model / "config.json").read_text())
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": auto, "model_type": "own"}))
    folder = export_checkpoint(checkpoint, str(model), tmp_path / "export", trust_remote_code=True)
    shutil.rmtree(model)
    load = "from transformers import AutoModelForCausalLM as A; import sys, torch; " \
           "model = A.from_pretrained(sys.argv[1], trust_remote_code=True); " \
           "print(type(model).__name__, model(torch.arange(9)[None]).logits.std().item())"  # fmt: skip
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run([sys.executable, "-c", load, folder], capture_output=True, text=True, env=environment)
    assert run.stdout.startswith("OwnForCausalLM "), run.stderr[-2000:]


# The command line.


def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (checkpoint / "latest").unlink()
    (checkpoint / "step_00000020_universal").mkdir()
    main([str(checkpoint)])
    assert capsys.readouterr().out == f"{checkpoint.parent / 'export'}\n"
    exported = hashes(checkpoint.parent / "export")
    assert len(exported) == 7
    model = json.loads((checkpoint.parent / "config.json").read_text())["model_name"]
    (checkpoint.parent / "config.json").unlink()
    main([str(checkpoint), "--model", model, "--output", str(tmp_path / "some" / "where")])
    again = hashes(tmp_path / "some" / "where")
    assert again.pop("README.md") != exported.pop("README.md"), "what config.json alone says is not told any more"
    assert again.pop(MARK) != exported.pop(MARK)
    assert again == exported


def test_command_line_mistakes(checkpoint: Path) -> None:
    settings = checkpoint.parent / "config.json"
    for arguments, message in [
        ([checkpoint.parent], f"{checkpoint.parent} is no checkpoint"),
        ([checkpoint / "nowhere"], f"{checkpoint / 'nowhere'} is no checkpoint"),
        ([checkpoint, "--model", "./nowhere"], "model_name = './nowhere': its config can't be loaded"),
        ([checkpoint, "--output", checkpoint.parent], "holds something other than an export"),
    ]:
        with pytest.raises(SystemExit, match=r"^error: ") as caught:
            main([str(argument) for argument in arguments])
        assert message in caught.value.code and "\n" not in caught.value.code
    for text in ("", "{}", "[]"):
        settings.write_text(text)
        with pytest.raises(SystemExit, match=f"^error: {settings} does not say which model .*: name it by --model"):
            main([str(checkpoint)])


def test_command_line_as_a_process(checkpoint: Path) -> None:
    (checkpoint.parent / "config.json").unlink()
    command = [sys.executable, "-m", "tp2d_helpers.checkpoint.export", str(checkpoint)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
