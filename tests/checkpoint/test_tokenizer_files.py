"""An export's tokenizer is the files that came, and gives the tokens that were trained on in `AutoTokenizer`, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from split import CASES, TEXTS, write
from transformers import AutoTokenizer

from tp2d_helpers.checkpoint.tokenizer_files import write_tokenizer
from tp2d_helpers.data.tokenizer import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ADDED = {"content": "<tool>", "special": True, "lstrip": False, "rstrip": False, "normalized": False,
         "single_word": False}  # fmt: skip


def exported(model: Path, out: Path, template: str | None = None) -> dict[str, Any]:
    """Write an export's tokenizer. Returns its tokenizer_config.json."""
    out.mkdir(exist_ok=True)
    shutil.copy(model / "config.json", out)
    write_tokenizer(out, str(model), load_tokenizer(str(model)), template)
    return json.loads((out / "tokenizer_config.json").read_text())


def test_files_that_came(tmp_path: Path) -> None:
    more = dict(add_bos_token=True, chat_template=TEMPLATE, additional_special_tokens=["<tool>"],
                added_tokens_decoder={"1500": ADDED})  # fmt: skip
    write(tmp_path / "model", "mistral", "PreTrainedTokenizerFast", CASES["llama"][1], **more)
    (tmp_path / "model" / "special_tokens_map.json").write_text('{"eos_token": "<|eos|>"}')
    exported(tmp_path / "model", tmp_path / "out")
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name


def test_another_template_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "model", "mistral", "PreTrainedTokenizerFast", CASES["llama"][1], chat_template=TEMPLATE)
    other = TEMPLATE.replace(":", " says:")
    said = exported(tmp_path / "model", tmp_path / "out", other)
    assert "chat_template" not in said and AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == other
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    exported(tmp_path / "model", tmp_path / "again", other)
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == other


@pytest.mark.parametrize("case", ["llama", "olmo"])
def test_a_class_that_splits_otherwise(tmp_path: Path, case: str) -> None:
    """The export names the plain class, so that its readers get what was trained on."""
    kind, split = CASES[case]
    right = write(tmp_path / "model", case, kind, split)
    assert exported(tmp_path / "model", tmp_path / "out")["tokenizer_class"] == "PreTrainedTokenizerFast"
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [found(t)["input_ids"] for t in TEXTS] == [right.encode(t, add_special_tokens=False).ids for t in TEXTS]


def test_a_class_that_transformers_forces(tmp_path: Path) -> None:
    """On Qwen2's, whatever is named: then it is said how to load it."""
    write(tmp_path / "model", *("qwen2", *CASES["qwen2"]))
    with pytest.warns(UserWarning, match=r"load it by PreTrainedTokenizerFast\.from_pretrained"):
        exported(tmp_path / "model", tmp_path / "out")


def test_names_that_both_versions_know(tmp_path: Path) -> None:
    """As version 5 writes them, version 4 has no such class, and takes a list of special tokens for a dict."""
    more = dict(extra_special_tokens=["<tool>"])
    write(tmp_path / "model", "mistral", "TokenizersBackend", CASES["llama"][1], **more)
    before = load_tokenizer(str(tmp_path / "model"))
    said = exported(tmp_path / "model", tmp_path / "out")
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in said
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.extra_special_tokens == before.extra_special_tokens == ["<tool>"]
    assert found("a<tool>b")["input_ids"] == before("a<tool>b")["input_ids"]
