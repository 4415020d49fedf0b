"""Folders with tokenizers whose tokenizer.json splits text otherwise than the class that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, trainers
from tokenizers import pre_tokenizers as splits
from transformers import AutoConfig

from tp2d_helpers.demo import demo_documents

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sequence(pattern: str, use_regex: bool) -> Any:
    """Splits by a pattern, then into bytes."""
    last = splits.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return splits.Sequence([splits.Split(Regex(pattern), "isolated"), last])


CASES = {
    "llama": ("LlamaTokenizerFast", sequence(WORDS, False)),  # as DeepSeek-R1-Distill-Llama
    "llama as Yi": ("LlamaTokenizer", splits.ByteLevel(add_prefix_space=False)),
    "olmo": ("GPTNeoXTokenizer", sequence(r"\p{N}{1,3}", True)),
    "dots1": ("Qwen2Tokenizer", sequence(WORDS, False)),
    "qwen2": ("LlamaTokenizerFast", sequence(WORDS, False)),
}
TEXTS = ["def f(x):\n    return x + 1\n", "The yield statement, in 2023: 650841823 times.", " leading"]


def write(folder: Path, model_type: str, kind: str, split: Any, **more: Any) -> Tokenizer:
    """A folder with a byte-level tokenizer of 1,500 tokens and a model's config. Returns what the file says."""
    folder.mkdir(exist_ok=True)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    texts = demo_documents()[:60] + [str(number) for number in range(1000)] * 5
    alphabet, special = splits.ByteLevel.alphabet(), ["<|bos|>", "<|eos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(folder / "tokenizer.json"))
    said = dict(tokenizer_class=kind, bos_token="<|bos|>", eos_token="<|eos|>", model_max_length=256) | more
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    AutoConfig.for_model(model_type).save_pretrained(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
