"""Run in an environment of another transformers: what that version writes, and what it makes of a folder.

python other_version.py write OUT SHAPES    SHAPES: a JSON file {name: fields of a config}; a folder for each in OUT
python other_version.py read OUT FOLDER…    logits of each folder's model, and ids of its tokenizer, in OUT/<name>.pt
python other_version.py ropes OUT FOLDER…   the frequencies of each config.json's ropes; none of an unknown type
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEXT = "def f(x):\n    return x + 1\n\n  The yield statement, in 2023: 650841823 times. Ünïcode, 中文 🎉."
TOKENS = torch.arange(160).reshape(2, 80) * 37 % 2000


def write(out: Path, shapes: dict[str, dict]) -> None:
    """Models with noise on all of their weights."""
    for name, shape in shapes.items():
        try:
            config = AutoConfig.for_model(**shape)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn_like(weight) * 0.02)
            model.save_pretrained(out / name)
        except Exception as error:
            print(f"{name}: {type(error).__name__} {error}")


def read(out: Path, folders: list[Path]) -> None:
    """{"logits"} or {"error"}, and {"ids"} or {"tokenizer_error"}."""
    for folder in folders:
        found = {}
        try:
            model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
            assert not (wrong := {kind: names for kind, names in info.items() if names}), wrong
            with torch.no_grad():
                found["logits"] = model.eval().float()(TOKENS, use_cache=False).logits
        except Exception as error:
            found["error"] = f"{type(error).__name__} {error}"
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            found["ids"] = tokenizer(TEXT)["input_ids"]
        except Exception as error:
            found["tokenizer_error"] = f"{type(error).__name__} {error}"
        torch.save(found, out / f"{folder.name}.pt")


def ropes(out: Path, folders: list[Path]) -> None:
    """[frequencies] of the model that a config.json stands for."""
    for folder in folders:
        found = []
        try:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            found = [m.inv_freq for m in model.modules() if hasattr(m, "inv_freq")]
        except ValueError as error:
            assert "does not recognize this architecture" in str(error), error
        torch.save(found, out / f"{folder.name}.pt")


if __name__ == "__main__":
    command, out, *rest = sys.argv[1:]
    if command == "write":
        write(Path(out), json.loads(Path(rest[0]).read_text(encoding="utf-8")))
    else:
        {"read": read, "ropes": ropes}[command](Path(out), [Path(folder) for folder in rest])
