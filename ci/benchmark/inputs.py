"""What the candidates read, made once in the scratch folder: models with random weights, and a text of short documents.

    python ci/benchmark/inputs.py <job.json>

It runs in a process of its own, so that the process that starts the candidates holds no memory of a GPU.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import random
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tp2d_helpers.cache import build_once
from tp2d_helpers.demo import SHAPES, build_model

ROWS = 8000  # of text, if the standard library has as many
LENGTHS = (80, 1200)  # characters of a row, as most paragraphs of WikiText have
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "pip"}
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "liger_kernel", "triton", "torchtitan")


def random_model(shape: str, layers: int, folder: Path) -> Path:
    """Write a model of a shape of `SHAPES` (with `layers` of them, if not 0), made on the GPU if there is one."""
    fields = dict(SHAPES[shape])
    fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    def build(scratch: Path) -> None:
        with torch.device(device):
            build_model(fields, scratch, dtype=dtype)

    return build_once(folder, build)


def paragraphs(source: str) -> list[str]:
    """The paragraphs of a module's docstrings, each in one line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            found += [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return found


def short_documents(rows: int = ROWS) -> list[str]:
    """Paragraphs of the docstrings and of the language reference that ship with Python, shuffled by a fixed seed."""
    from pydoc_data.topics import topics

    found = [" ".join(part.split()) for text in topics.values() for part in re.split(r"\n\s*\n", text)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(library).parts):
            try:
                found += paragraphs(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):  # templates and samples of other encodings
                continue
    kept = list(dict.fromkeys(row for row in found if LENGTHS[0] <= len(row) <= LENGTHS[1]))
    random.Random(0).shuffle(kept)
    return kept[:rows]


def write_text(folder: Path, rows: int = ROWS) -> None:
    """Write `train.jsonl`, an object with a `text` per document."""
    lines = [json.dumps({"text": row}) + "\n" for row in short_documents(rows)]
    (folder / "train.jsonl").write_text("".join(lines))


def environment() -> dict[str, Any]:
    """Versions, and the GPUs that are there."""
    versions: dict[str, Any] = {"python": sys.version.split()[0], "cuda": torch.version.cuda, "nccl": None}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = torch.cuda.device_count()
    if gpus:
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return dict(versions=versions, device="cuda" if gpus else "cpu",
                gpu=torch.cuda.get_device_name() if gpus else None, gpus_present=gpus)  # fmt: skip


def main() -> None:
    """Make what a job names: `models` (a list of shapes), `layers`, `text` (a folder) and `result` (a file)."""
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(environment()))
    for shape, folder in job["models"].items():
        random_model(shape, job["layers"].get(shape, 0), Path(folder))
    build_once(Path(job["text"]), write_text)


if __name__ == "__main__":
    main()
