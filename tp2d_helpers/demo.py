"""The embedded default: a small model, a tokenizer and a text that need no network.

- text: the Python language reference that ships inside CPython (`pydoc_data.topics`), one document per topic.
- tokenizer: a byte-level BPE of 2048 tokens, trained on that text in about a second.
- model: a Qwen2 of about a million parameters with seeded weights, tied embeddings and 4 KV heads.

`SHAPES` has the configs of well-known models; `build_model` writes any of them with seeded random weights, to measure
speed and memory where no weights can be downloaded.
"""

from __future__ import annotations

import argparse
import platform
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tp2d_helpers.cache import build_once, cache_dir

BUILT = re.compile(r"-py[\d.]+\w*-torch\S+")  # how the folder of a model that is built here goes on after its shape
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
LAYOUT = 2  # of the folders that are built here; another one is not taken for it

# Topics that repeat no other: half of the reference's topics are parts of longer ones. What is held out for evaluation
# comes from the end of a dataset, and these, 12,000 tokens, are the demo's.
HELD_OUT = ("typesmapping", "binary", "bitwise", "booleans", "del", "global", "import", "lambda", "objects", "shifting",
            "slicings", "subscriptions", "truth", "unary", "yield")  # fmt: skip

# Values from the models' published config.json files.
SHAPES: dict[str, dict[str, Any]] = {
    "demo": dict(model_type="qwen2", hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=8,
                 num_key_value_heads=4, vocab_size=VOCAB_SIZE, max_position_embeddings=2048, tie_word_embeddings=True),
    "qwen2.5-0.5b": dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, vocab_size=151936,
                         max_position_embeddings=32768, tie_word_embeddings=True),
    "qwen2-7b": dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                     num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                     max_position_embeddings=131072, tie_word_embeddings=False),
    "llama-3-8b": dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                       max_position_embeddings=8192, tie_word_embeddings=False),
    "llama-3-70b": dict(model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                        num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
                        max_position_embeddings=8192, tie_word_embeddings=False),
    # These two without the factors that stretch their positions, which cost no time.
    "phi-4-mini": dict(model_type="phi3", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
                       num_attention_heads=24, num_key_value_heads=8, vocab_size=200064, partial_rotary_factor=0.75,
                       max_position_embeddings=131072, sliding_window=262144, pad_token_id=None,
                       tie_word_embeddings=True),
    "gemma-3-4b": dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
                       num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=262208,
                       sliding_window=1024, query_pre_attn_scalar=256, max_position_embeddings=131072,
                       tie_word_embeddings=True),
    "qwen3-30b-a3b": dict(model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
                          num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, num_hidden_layers=48,
                          num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
                          max_position_embeddings=40960, tie_word_embeddings=False),
}  # fmt: skip


def demo_documents() -> list[str]:
    """The demo's text: one string per topic of the Python language reference, by name, and `HELD_OUT` at the end."""
    from pydoc_data.topics import topics

    last = [name for name in HELD_OUT if name in topics]
    return [topics[name] for name in [*sorted(topics.keys() - last), *last]]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `VOCAB_SIZE` tokens whose last token, `END_OF_TEXT`, ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT})
    return fast


def build_model(shape: dict[str, Any], folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a Hugging Face folder with seeded random weights and the demo's tokenizer.

    Args:
        shape: `model_type` and the fields of its config, as in `SHAPES`.
        folder: where `config.json`, the safetensors and the tokenizer go.
        seed: of the weights; they are the same on every machine with the same torch.
        dtype: of the weights on disk.
    """
    shape = dict(shape)
    tokenizer = train_tokenizer(demo_documents())
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    # No pad_token_id: its embedding would begin as zeros. A sample that begins with that token stays zero through all
    # layers, and RMSNorm multiplies a zero's gradient by 1/√ε per layer: infinite after a dozen.
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = None
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Some types have a class that splits text in its own way: the file has to say what `AutoTokenizer` does.
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def has_random_weights(model_name: str) -> bool:
    """Whether a model is one that this module built."""
    return Path(model_name).parent == cache_dir()


def display_name(model_name: str) -> str:
    """What to call a model where a reader sees it: the shape of one that this module built, a folder's own name."""
    return BUILT.sub("", Path(model_name).name if Path(model_name).is_absolute() else model_name)


def demo_model(shape: str = "demo") -> Path:
    """Folder of a model of `SHAPES`, built in the cache on first use (two seconds for the demo)."""
    dtype = torch.float32 if shape == "demo" else torch.bfloat16
    # The text, and with it the tokenizer, differs between versions of Python.
    folder = cache_dir() / f"{shape}-py{platform.python_version()}-torch{torch.__version__}-{LAYOUT}"
    return build_once(folder, lambda scratch: build_model(SHAPES[shape], scratch, dtype=dtype))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build a model with seeded random weights; print its folder.")
    parser.add_argument("shape", choices=SHAPES)
    print(demo_model(parser.parse_args().shape))
