"""Other people's chat templates: those that trl ships, each with a tokenizer that has the tokens it is written in."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import transformers

from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chat_tokens import ChatEncoder
from tp2d_helpers.data.chats import FORMATS, THOUGHTS, to_json
from tp2d_helpers.data.folder import Part
from tp2d_helpers.data.rows import Place
from tp2d_helpers.demo import demo_documents, train_tokenizer

# Without importing trl, which imports much else.
FOLDER = Path(find_spec("trl").origin).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
DATE = "2026-11-30"
# Tokens as templates write them: <|name|>, <|name>, <name|>, <name>, </name>, [NAME].
WORDS = "think|tool_call|tool_response|s|sop|arg_key|arg_value|image|start_of_turn|end_of_turn|end_of_utterance"
CONTROL = re.compile(rf"<[|\uff5c][^\s|\uff5c<>]+[|\uff5c]?>|<[a-z_]+\|>|</?(?:{WORDS})>|\[/?[A-Z_]+\]")
# What ends an answer, by the folders that the models were published in. GLM's is the token of the next header.
STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"], "deepseek": ["<\uff5cend▁of▁sentence\uff5c>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma4": ["<turn|>", "<|tool_response>"], "gemma": ["<end_of_turn>"],
    "glm4moe": ["<|user|>", "<|observation|>"], "gptoss": ["<|return|>", "<|call|>", "<|end|>"],
    "idefics3": ["<end_of_utterance>"], "smolvlm": ["<end_of_utterance>"], "lfm2": ["<|im_end|>"],
    "llama3": ["<|eot_id|>", "<|eom_id|>"], "llava_next": ["</s>"], "muse": ["<|eot|>", "<|eom|>"],
    "nemotron": ["<|im_end|>"], "phi3": ["<|end|>"], "qwen": ["<|im_end|>"],
}  # fmt: skip

# Those that only a model's generation_config.json knows: after a call, Gemma 4 ends with the token of what comes next.
LISTED = {"gemma4": ["<turn|>", "<|tool_response>"], "diffusion_gemma": ["<turn|>", "<|tool_response>"]}
CONFIGS = tempfile.TemporaryDirectory(prefix="tp2d-templates-")


@dataclass
class Learnt:
    """What a row became: its tokens as bytes, and which of them have loss."""

    ids: list[int]
    mask: list[bool]
    pieces: list[bytes]
    notes: Counter

    @property
    def text(self) -> bytes:
        return b"".join(self.pieces)

    def begins(self) -> list[int]:
        """The byte at which each token begins."""
        return list(itertools.accumulate(map(len, self.pieces), initial=0))[:-1]

    def loss_on(self, word: str) -> list[bool]:
        """For each place where a word is in the text: whether it has loss. Part of it is a fault."""
        has = np.repeat(np.array(self.mask), list(map(len, self.pieces)))
        found = [has[m.start() : m.end()] for m in re.finditer(re.escape(word.encode()), self.text)]
        assert all(part.all() or not part.any() for part in found), f"part of {word!r} has loss: {self}"
        return [bool(part.all()) for part in found]

    def __str__(self) -> str:
        """The text with ⟦ ⟧ around what has loss."""
        found = []
        for has, run in itertools.groupby(zip(self.pieces, self.mask, strict=True), key=lambda pair: pair[1]):
            text = b"".join(piece for piece, _ in run).decode(errors="replace")
            found.append(f"⟦{text}⟧" if has else text)
        return "".join(found)


@functools.cache
def _trained() -> transformers.PreTrainedTokenizerFast:
    return train_tokenizer(demo_documents()[:10])


@functools.cache
def tokenizer_of(name: str) -> transformers.PreTrainedTokenizerFast:
    """The demo's byte-level BPE with the tokens of a template, and the template."""
    tokenizer = speaking(copy.deepcopy(_trained()), TEMPLATES[name])
    if ends := next((ends for family, ends in LISTED.items() if name.startswith(family)), None):
        tokenizer.name_or_path = f"{CONFIGS.name}/{name}"
        transformers.GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(ends)).save_pretrained(
            tokenizer.name_or_path
        )
    return tokenizer


def speaking(tokenizer: transformers.PreTrainedTokenizerFast, template: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a template and the tokens that it is written in."""
    control = dict.fromkeys(found[0] for found in CONTROL.finditer(template))
    tokenizer.add_special_tokens({"additional_special_tokens": list(control), "bos_token": "<bos>"})
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def encoder_of(name: str) -> ChatEncoder:
    """What tokenises chats by a template."""
    return ChatEncoder(tokenizer_of(name), "messages", date=DATE)


def stops_of(name: str) -> list[str]:
    """The tokens that end an answer."""
    return next(stops for family, stops in STOPS.items() if name.startswith(family))


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """Byte-level tokenizers write each byte as a letter (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def pieces(tokenizer: transformers.PreTrainedTokenizerFast, ids: list[int]) -> list[bytes]:
    """What each token of a byte-level tokenizer stands for."""
    added, table = tokenizer.added_tokens_decoder, _bytes_of_letters()
    return [
        added[i].content.encode() if i in added else bytes(table[c] for c in tokenizer.convert_ids_to_tokens(i))
        for i in ids
    ]


def encoded(encoder: ChatEncoder, row: dict[str, Any], form: str = "") -> Part:
    """What becomes of a row. Raises `BadRow` if it is refused."""
    form = form or next(form for form in FORMATS if set(FORMATS[form]) <= set(row))
    table = pyarrow.Table.from_pylist([to_json(copy.deepcopy(row), form, "line 1")])
    rows = datasets.Dataset(table, fingerprint="drawn")  # or it takes half of the time to compute one
    part = encoder.encode(rows, Place(0, 0), Place(1, 0), lambda _: None)
    for kind, found in json.loads(str(part.remarks[0]))["bad"].items():
        raise BadRow(kind, found["first"][0].removeprefix("line 1: "))
    return part


def learn(encoder: ChatEncoder, row: dict[str, Any]) -> Learnt:
    """The tokens of a row by a byte-level tokenizer. Raises `BadRow` if it is refused."""
    part = encoded(encoder, row)
    ids, notes = part.tokens.tolist(), json.loads(str(part.remarks[0]))["notes"]
    return Learnt(ids, part.mask.astype(bool).tolist(), pieces(encoder.text.tokenizer, ids), Counter(notes))


def plain(tokenizer: transformers.PreTrainedTokenizerBase, row: dict[str, Any], **options: Any) -> Iterator[Any]:
    """What transformers alone makes of a row, in each form that a template may want and doesn't refuse.

    Contents: text or parts; of a message that only calls, null or empty. Arguments: objects or JSON text. Thoughts: by
    each of their names.
    """
    given = [*row.get("prompt", []), *row.get("completion", []), *row.get("messages", [])]
    has_thoughts = any(name in message for message in given for name in THOUGHTS)
    seen = []
    for parts, empty, as_text, thought in itertools.product(
        (False, True), (None, ""), (False, True), THOUGHTS if has_thoughts else THOUGHTS[:1]
    ):
        messages = [_in_form(message, parts, empty, as_text, thought) for message in given]
        if messages in seen:
            continue
        seen.append(messages)
        try:
            yield tokenizer.apply_chat_template(
                messages, tools=row.get("tools"), strftime_now=datetime.fromisoformat(DATE).strftime,
                **{"tokenize": True, "return_dict": True, **options},
            )  # fmt: skip
        except Exception:
            continue


def _in_form(message: dict[str, Any], parts: bool, empty: str | None, as_text: bool, thought: str) -> dict[str, Any]:
    found = {name: value for name, value in copy.deepcopy(message).items() if name != "weight"}
    for name in THOUGHTS:
        if name in message:
            found[thought] = found.pop(name)
    for call in found.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        if as_text is isinstance(arguments, dict):
            call["function"]["arguments"] = json.dumps(arguments) if as_text else json.loads(arguments)
    content = found.get("content") or empty
    found["content"] = [{"type": "text", "text": content}] if parts and content else content
    if found["role"] != "assistant":
        found["content"] = found["content"] or ""
    return found
