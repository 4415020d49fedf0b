"""Text is split as a folder's tokenizer.json says, whatever class its tokenizer_config.json names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from split import CASES, TEXTS, write
from transformers import AutoTokenizer

from tp2d_helpers.config import ConfigError, make_config
from tp2d_helpers.data import tokenizer as module
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.model.facts import ModelFacts
from tp2d_helpers.preflight.checks import check_model


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_file(tmp_path: Path, case: str) -> None:
    kind, split = CASES[case]
    right = write(tmp_path, case.partition(" ")[0], kind, split)
    expected = [right.encode(text, add_special_tokens=False).ids for text in TEXTS]
    made = AutoTokenizer.from_pretrained(tmp_path)
    assert [made(text, add_special_tokens=False)["input_ids"] for text in TEXTS] != expected, "nothing to mend"
    ours = load_tokenizer(str(tmp_path))
    assert [ours(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == expected
    assert [ours.decode(ids) for ids in expected] == TEXTS
    assert (ours.bos_token, ours.eos_token, ours.model_max_length) == ("<|bos|>", "<|eos|>", 256)
    assert ours.remark == f"tokenizer.json as it is: {type(made).__name__} would split text otherwise"


def test_a_tokenizer_that_its_class_leaves_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, "llama", "PreTrainedTokenizerFast", CASES["llama"][1])
    assert not hasattr(load_tokenizer(str(tmp_path)), "remark")


def test_a_field_of_the_config_counts(tmp_path: Path) -> None:
    """A token that tokenizer_config.json alone has is no fault of the class."""
    more = {"0": {"content": "statement", "special": False, "lstrip": False, "rstrip": False, "normalized": False,
                  "single_word": False}}  # fmt: skip
    right = write(tmp_path, "llama", "PreTrainedTokenizerFast", CASES["llama"][1], added_tokens_decoder=more)
    assert load_tokenizer(str(tmp_path))("statement")["input_ids"] != right.encode(" statement").ids


def test_what_cannot_be_had_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither the class nor the plain one gives the file's tokens, and they differ, nothing is trained."""
    write(tmp_path, "llama", *CASES["llama"])
    monkeypatch.setattr(module, "_of_file", lambda path, changed: [[0]] * len(module.SAMPLE))
    with pytest.raises(ConfigError, match=r"other tokens than its tokenizer\.json, of 'def f.*set the tokenizer_class"):
        load_tokenizer(str(tmp_path))


def test_preflight_says_so(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    write(tmp_path, "llama", *CASES["llama"])
    shutil.copytree(tiny_model("llama"), tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tokenizer*"))
    config = make_config(model_name=str(tmp_path), use_gpu=False, tp_size=1, dp_size=1, seq_length=64)
    said, _ = check_model(config, ModelFacts.read(str(tmp_path)))
    assert said.endswith("F32; tokenizer.json as it is: LlamaTokenizer would split text otherwise")
