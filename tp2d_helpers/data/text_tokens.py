"""Text → tokens, the same ones however it is divided into parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import numpy as np
import transformers

from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chat.places import Places
from tp2d_helpers.data.folder import Part, PartBuilder, digest
from tp2d_helpers.data.rows import Place, Text, read

CHARACTERS = 64_000  # that the tokenizer is given at once; it needs about 500 bytes for each
SLOW = 500_000  # the same of a tokenizer in Python: longer documents are cut there, so another number is other tokens
CONTEXT = 200  # characters on both sides of a part of a document, so that it is tokenized as in the whole
# Specials are off: what a tokenizer adds stands where a document begins and ends, and not where it is divided.
OPTIONS = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)


class TextEncoder:
    """Tokenises rows of text. Rows without text are no documents.

    Attributes:
        begin: the tokens that the tokenizer puts before each text, such as Gemma's BOS, without which the model has
            never seen one.
        end: those that it puts after it, or the end-of-text token.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.is_fast = tokenizer, tokenizer.is_fast
        self.characters = CHARACTERS if self.is_fast else SLOW
        last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
        self.begin, after = _added(tokenizer)
        self.end = after or [last]

    def facts(self) -> dict[str, Any]:
        """What is to be said of it: the tokens that a document begins with and ends in."""
        return {"begin": self.tokenizer.decode(self.begin), "end": self.tokenizer.decode(self.end)}

    def cuts(self, text: Text, size: int) -> Iterator[int]:
        """The bytes at which a long document is divided into parts of about `size` characters, or what it allows."""
        if any(not block.isspace() for block in text.blocks()):
            byte, step = 0, size if self.is_fast else self.characters
            while (byte := self._cut(text, byte, step)) < len(text):
                yield byte

    def encode(self, rows: datasets.Dataset, begin: Place, end: Place, tick: Callable[[int], None]) -> Part:
        """The tokens from `begin` to before `end`. `tick` gets the bytes that are done, again and again."""
        builder, batch, held, bounds = PartBuilder(), [], 0, (begin.row, end.row + (end.byte > 0))
        if begin.byte == 0 and rows.column_names[1:] == ["where", "bad"]:
            for where, bad in zip(read(rows, begin.row, end.row, 1), read(rows, begin.row, end.row, 2), strict=True):
                if len(bad):
                    builder.remarks.add(BadRow.parse(str(bad)), str(where))
        for row, text in enumerate(read(rows, *bounds), begin.row):
            first, last = begin.byte if row == begin.row else 0, end.byte if row == end.row else len(text)
            long = (first, last) != (0, len(text)) or self._is_long(text)
            if batch and (long or held + len(text) > self.characters):
                self._add(builder, batch)
                tick(held)
                batch, held = [], 0
            if long:
                self._add_long(builder, text, first, last, tick)
            else:
                batch.append(str(text))
                held += len(text)
        self._add(builder, batch)
        tick(held)
        return builder.part()

    def places(self, texts: Iterable[str]) -> Iterator[Places]:
        """The tokens of each text, without what the tokenizer adds, and where they are in it."""
        for batch in _batches(texts, self.characters):
            short = [text for text in batch if not self.is_fast or len(text) <= self.characters]
            options = dict(OPTIONS, return_offsets_mapping=True) if self.is_fast else OPTIONS
            found = self.tokenizer(short, **options) if short else {"input_ids": []}
            ids, offsets = iter(found["input_ids"]), iter(found.get("offset_mapping", ()))
            for text in batch:
                if not self.is_fast:
                    yield Places(text, np.asarray(next(ids), dtype=np.int64), None, self._encode)
                elif len(text) <= self.characters:
                    yield self._places(text, next(ids), next(offsets))
                else:
                    data = Text(text.encode())
                    parts = [part for part, _ in self._encode_long(data, 0, len(data))]
                    pairs = [pair for part in parts for pair in part]
                    yield self._places(text, [token for token, _ in pairs], [place for _, place in pairs])

    def _places(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Places:
        flat = itertools.chain.from_iterable(offsets)  # twice as fast as an array of pairs
        places = np.fromiter(flat, np.int64, 2 * len(offsets)).reshape(-1, 2)
        return Places(text, np.asarray(ids, dtype=np.int64), places, self._encode)

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, **OPTIONS)["input_ids"], dtype=np.int64)

    def _is_long(self, text: Text) -> bool:
        return len(text) > self.characters and len(text.ahead(0, self.characters + 1)) > self.characters

    def _add(self, builder: PartBuilder, batch: list[str]) -> None:
        """Tokenise short documents."""
        digests = {number: found for number, text in enumerate(batch) if (found := digest([text])) is not None}
        texts = [batch[number] for number in digests]
        found_ids = self.tokenizer(texts, **OPTIONS)["input_ids"] if texts else []
        for found, ids in zip(digests.values(), found_ids, strict=True):
            builder.add([*self.begin, *ids, *self.end])
            builder.end(found)

    def _add_long(self, builder: PartBuilder, text: Text, first: int, last: int, tick: Callable[[int], None]) -> None:
        """Tokenise a long document, or from one byte to another what it has."""
        found = digest(text.blocks()) if last == len(text) else 0
        if found is None:
            return
        builder.add(self.begin if first == 0 else [])
        for pairs, size in self._encode_long(text, first, last):
            builder.add([token for token, _ in pairs])
            tick(size)
        if last == len(text):
            builder.add(self.end)
            builder.end(found)

    def _encode_long(self, text: Text, first: int, last: int) -> Iterator[tuple[list[tuple[int, Any]], int]]:
        """(pairs of a token id and its place, bytes) of a document's parts, between two cuts: those of the whole.

        A part begins where a token does, and is tokenized together with the `CONTEXT` around it. A tokenizer that can't
        say where its tokens begin ("slow") gets parts that end with a line. Places are in characters from `first` on.
        """
        begin, done = first, 0
        while begin < last:
            end = min(last, self._cut(text, begin, self.characters))
            part = str(text.data[begin:end], "utf-8")
            if not self.is_fast:
                pairs = [(token, None) for token in self.tokenizer(part, **OPTIONS)["input_ids"]]
            else:
                before, after = text.before(begin, CONTEXT), text.ahead(end, CONTEXT)
                found = self.tokenizer(before + part + after, return_offsets_mapping=True, **OPTIONS)
                stop, shift = len(before) + len(part) + (end == len(text)), done - len(before)
                pairs = [  # spaces alone can be given their end
                    (token, (start + shift, stop_at + shift))
                    for token, (start, stop_at) in zip(found["input_ids"], found["offset_mapping"], strict=True)
                    if len(before) <= start < stop
                ]
            yield pairs, end - begin
            begin, done = end, done + len(part)

    def _cut(self, text: Text, begin: int, step: int) -> int:
        """The byte of the first place, `step` characters after `begin` or later, where a token begins."""
        ahead = text.ahead(begin, step + 2 * CONTEXT)
        if len(ahead) <= step:
            return len(text)
        near = self._token_from(ahead, step) if self.is_fast else ahead.rfind("\n", 0, step) + 1 or step
        return begin + len(ahead[:near].encode())

    def _token_from(self, text: str, near: int) -> int:
        """The first place from `near` on where a token begins, however much of the text before it is looked at."""
        starts = []
        for left in (max(0, near - CONTEXT), max(0, near - CONTEXT // 2)):
            found = self.tokenizer(text[left : near + 2 * CONTEXT], return_offsets_mapping=True, **OPTIONS)
            starts.append({left + start for start, _ in found["offset_mapping"]})
        return min((start for start in starts[0] & starts[1] if start >= near), default=near)


def _added(tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """(what a tokenizer puts before a text, what it puts after it)."""
    plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    starts = range(len(whole) - len(plain) + 1)
    first = next((i for i in starts if plain and whole[i : i + len(plain)] == plain), None)
    return ([], []) if first is None else (whole[:first], whole[first + len(plain) :])


def _batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Texts of about so many characters, or one."""
    batch, size = [], 0
    for text in texts:
        if batch and size + len(text) > characters:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch
