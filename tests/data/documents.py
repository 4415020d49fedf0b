"""A few short documents, written as files of any format, and read back from a folder of tokens."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import datasets
import numpy as np

from tp2d_helpers.data.tokenizer import load_tokenizer

DOCUMENTS = ["the with statement", "yield", "def f(x): return x", "a " * 40, "class C:\n    pass", "lambda: 0", "é ☃"]


def write(path: Path, documents: list[str], column: str = "text") -> Path:
    """Write documents in the format that the file's name asks for; in a text file, a blank line is between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps({column: document}) + "\n" for document in documents))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{column: document} for document in documents], indent=1))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            delimiter = "," if path.suffix == ".csv" else "\t"
            csv.writer(file, delimiter=delimiter).writerows([[column], *([document] for document in documents)])
    elif path.suffix == ".parquet":
        datasets.Dataset.from_dict({column: documents}).to_parquet(path)
    elif path.suffix == ".arrow":
        datasets.Dataset.from_dict({column: documents}).save_to_disk(path.with_suffix(""))
        (path.with_suffix("") / "data-00000-of-00001.arrow").rename(path)
    else:
        path.write_text("\n\n".join(documents))
    return path


def read(tokenizer: str, folder: Path) -> list[str]:
    """The documents in a folder of tokens, decoded."""
    tokens, offsets = np.fromfile(folder / "tokens.bin", dtype=np.uint32), np.load(folder / "offsets.npy")
    return [load_tokenizer(tokenizer).decode(tokens[i:j]) for i, j in itertools.pairwise(offsets)]
