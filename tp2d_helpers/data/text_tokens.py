"""Text → tokens, the same ones however it is divided into parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import datasets
import transformers

from tp2d_helpers.data.folder import Part, PartBuilder, digest
from tp2d_helpers.data.rows import Place, Text, read

CHARACTERS = 64_000  # that the tokenizer is given at once; it needs about 500 bytes for each
SLOW = 500_000  # the same of a tokenizer in Python: longer documents are cut there, so another number is other tokens
CONTEXT = 200  # characters on both sides of a part of a document, so that it is tokenized as in the whole
# Specials are off: the end-of-text token is the only separator, whatever the tokenizer adds.
OPTIONS = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)


class TextEncoder:
    """Tokenises rows of text. Each document is closed by the end-of-text token. Rows without text are none."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.is_fast = tokenizer, tokenizer.is_fast
        self.characters = CHARACTERS if self.is_fast else SLOW
        self.end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id

    def cuts(self, text: Text, size: int) -> Iterator[int]:
        """The bytes at which a long document is divided into parts of about `size` characters, or what it allows."""
        if any(not block.isspace() for block in text.blocks()):
            byte, step = 0, size if self.is_fast else self.characters
            while (byte := self._cut(text, byte, step)) < len(text):
                yield byte

    def encode(self, rows: datasets.Dataset, begin: Place, end: Place, tick: Callable[[int], None]) -> Part:
        """The tokens from `begin` to before `end`. `tick` gets the bytes that are done, again and again."""
        builder, batch, held = PartBuilder(), [], 0
        for row, text in enumerate(read(rows, begin.row, end.row + (end.byte > 0)), begin.row):
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

    def ids(self, texts: list[str]) -> Iterator[list[int]]:
        """The token ids of each text, without an end."""
        short = [text for text in texts if not self.is_fast or len(text) <= self.characters]
        found = iter(self.tokenizer(short, **OPTIONS)["input_ids"] if short else [])
        for text in texts:
            if not self.is_fast or len(text) <= self.characters:
                yield next(found)
            else:
                data = Text(text.encode(errors="replace"))
                yield [token for ids, _ in self._encode_long(data, 0, len(data)) for token in ids]

    def _is_long(self, text: Text) -> bool:
        return len(text) > self.characters and len(text.ahead(0, self.characters + 1)) > self.characters

    def _add(self, builder: PartBuilder, batch: list[str]) -> None:
        """Tokenise short documents."""
        digests = {number: found for number, text in enumerate(batch) if (found := digest([text])) is not None}
        for found, ids in zip(digests.values(), self.ids([batch[number] for number in digests]), strict=True):
            builder.add([*ids, self.end])
            builder.end(found)

    def _add_long(self, builder: PartBuilder, text: Text, first: int, last: int, tick: Callable[[int], None]) -> None:
        """Tokenise a long document, or from one byte to another what it has."""
        found = digest(text.blocks()) if last == len(text) else 0
        if found is None:
            return
        for ids, size in self._encode_long(text, first, last):
            builder.add(ids)
            tick(size)
        if last == len(text):
            builder.add([self.end])
            builder.end(found)

    def _encode_long(self, text: Text, first: int, last: int) -> Iterator[tuple[list[int], int]]:
        """(token ids, bytes) of a document's parts, from one cut to another: those of the whole.

        A part begins where a token does, and is tokenized together with the `CONTEXT` around it. A tokenizer that can't
        say where its tokens begin ("slow") gets parts that end with a line.
        """
        begin = first
        while begin < last:
            end = min(last, self._cut(text, begin, self.characters))
            part = str(text.data[begin:end], "utf-8")
            if not self.is_fast:
                ids = self.tokenizer(part, **OPTIONS)["input_ids"]
            else:
                before, after = text.before(begin, CONTEXT), text.ahead(end, CONTEXT)
                found = self.tokenizer(before + part + after, return_offsets_mapping=True, **OPTIONS)
                stop = len(before) + len(part) + (end == len(text))  # spaces alone can be given their end
                pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
                ids = [token for token, (start, _) in pairs if len(before) <= start < stop]
            yield ids, end - begin
            begin = end

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
