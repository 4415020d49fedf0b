"""Chats → tokens by a chat template, and for each token whether it has loss.

Of an assistant's turn, what the model is to write has loss: thoughts, words and calls, and the token with which it
hands the turn back. What comes before (the turn's header) is given to it, and what comes after (the line break of
ChatML) it is never asked for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import transformers

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chat.answers import Answered, Answers
from tp2d_helpers.data.chat.ends import Ends
from tp2d_helpers.data.chat.forms import Forms
from tp2d_helpers.data.chat.template import ChatTemplate, settled_date
from tp2d_helpers.data.chats import Conversation, from_json
from tp2d_helpers.data.folder import Part, PartBuilder, digest
from tp2d_helpers.data.rows import Place, Text, read
from tp2d_helpers.data.text_tokens import TextEncoder
from tp2d_helpers.data.tokenizer import writes_date

CONTROL = re.compile(r"<([|\uff5c])[^\s|\uff5c<>]+\1>|<(?:start|end)_of_turn>")  # how templates write control tokens

SHOWN = 12  # tokens of an answer, the last of which preflight shows


@dataclass
class Example:
    """A chat's text and answers, and what is wrong with it, if something is."""

    where: str
    size: int  # bytes of its row
    turns: int = 0
    answered: Answered | None = None
    bad: BadRow | None = None


class ChatEncoder:
    """Tokenises rows of chats, as `load_text` gives them. Bad rows are left out and remarked upon.

    Args:
        date: YYYY-MM-DD, what a template that writes the date takes for today.

    Raises:
        ConfigError: if there is no template, or its answers end in a token that the tokenizer hasn't got.
    """

    def __init__(
        self, tokenizer: transformers.PreTrainedTokenizerBase, form: str, loss_on: str = "assistant", date: str = ""
    ) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"model_name = {tokenizer.name_or_path!r}: its tokenizer has no chat template, which the chats of "
                f"dataset_name ({form}) need. Set chat_template to a .jinja file, or take a model that was made for "
                "chats (its name often ends in Instruct)"
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise ConfigError(
                f"model_name = {tokenizer.name_or_path!r}: its tokenizer has several chat templates, none by default; "
                f"set chat_template to one of {', '.join(map(repr, tokenizer.chat_template))}"
            )
        self.text, self.form, self.loss_on = TextEncoder(tokenizer), form, loss_on
        self.template = ChatTemplate(tokenizer, settled_date(date))
        try:
            self.answers = Answers(self.template)
            self.ends = Ends(self.answers, tokenizer)
        except (jinja2.TemplateError, ValueError) as error:
            raise ConfigError(f"chat_template: the tokenizer's chat template can't be used: {error}") from error
        written = dict.fromkeys(found[0] for found in CONTROL.finditer(self.template.everything))
        known = {tokenizer.decode([token]) for token in self.ends.control}
        self.absent = [name for name in written if name not in known]  # and so it is several tokens
        if any(self.ends.written.endswith(name) for name in self.absent):
            raise ConfigError(
                f"chat_template: the template ends answers in {self.ends.written[-20:]!r}, and the tokenizer of "
                f"model_name = {tokenizer.name_or_path!r} has no such token ({', '.join(self.absent)} would be text); "
                "take a template that is written in its tokens, or a model that has them"
            )

    def facts(self) -> dict[str, Any]:
        """What is to be said of it: the format, what has loss, how answers end, the control tokens that are missing."""
        date = self.template.day.date().isoformat() if writes_date(self.text.tokenizer) else ""
        stop = self.text.tokenizer.decode([self.ends.token]) if self.ends.token is not None else ""
        ends = {
            "ends": self.ends.how,
            "stop": stop,
            "absent": self.absent,
            "headed": self.answers.headed(self.ends.written),
        }
        return {"format": self.form, "loss_on": self.loss_on, "date": date, **ends}

    def cuts(self, chat: Text, size: int) -> Iterator[int]:
        """A chat is never divided."""
        return iter(())

    def encode(self, rows: datasets.Dataset, begin: Place, end: Place, tick: Callable[[int], None]) -> Part:
        """The tokens of the rows from `begin` to before `end`, and their mask. `tick` gets the bytes that are done."""
        builder = PartBuilder()
        for batch in self._batches(rows, begin.row, end.row):
            texts = (example.answered.text for example in batch if example.answered)
            places = self.text.places(texts)
            for example in batch:
                if not example.bad:
                    self._add(builder, example, next(places))
                if example.bad:
                    builder.remarks.add(example.bad, example.where)
            tick(sum(example.size for example in batch))
        return builder.part()

    def _add(self, builder: PartBuilder, example: Example, places: object) -> None:
        """The tokens of an example, if it has something to learn."""
        try:
            mask, added = self.ends.mask(places, example.answered.spans)
        except ValueError as error:
            example.bad = BadRow("refused", f"it can't be told where an answer begins or ends: {error}")
            return
        ids = np.concatenate([places.ids, np.asarray(added, dtype=np.int64)])
        mask = np.ones(len(ids), dtype=bool) if self.loss_on == "all" else np.concatenate([mask, [True] * len(added)])
        if not mask[1:].any():  # nothing predicts the first token
            example.bad = BadRow("no_answer", "no turn of an assistant is to be learnt")
            return
        builder.add(ids, mask)
        builder.end(digest([example.answered.text]) or 0)
        builder.turns += example.turns
        builder.remarks.notes += example.answered.notes
        if not builder.remarks.example:
            first = int(mask.argmax())
            last = len(mask) if mask[first:].all() else first + int(mask[first:].argmin())
            builder.remarks.example = self.text.tokenizer.decode(ids[max(first, last - SHOWN) : last].tolist())

    def _batches(self, rows: datasets.Dataset, begin: int, end: int) -> Iterator[list[Example]]:
        """Examples of about as many characters as the tokenizer is given at once, or one."""
        batch, size = [], 0
        for chat, where, bad in zip(*(read(rows, begin, end, column) for column in range(3)), strict=True):
            example = Example(str(where), len(chat), bad=BadRow.parse(str(bad)) if len(bad) else None)
            if not example.bad:
                try:
                    conversation = from_json(str(chat))
                    example.turns = len(conversation.messages)
                    example.answered = self.answers.find(conversation)
                    size += len(example.answered.text)
                except BadRow as error:
                    example.bad = error
            batch.append(example)
            if size > self.text.characters or len(batch) == 1000:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def stop_token(tokenizer: transformers.PreTrainedTokenizerBase) -> int | None:
    """The token that ends an assistant's turn by the chat template; None if there is no template, or no such token."""
    try:
        return ChatEncoder(tokenizer, "messages").ends.token
    except ConfigError:
        return None


def asking(tokenizer: transformers.PreTrainedTokenizerBase, prompt: str, date: str = "") -> str:
    """The text by which a user's turn asks for an answer. Raises `BadRow` if the template refuses it."""
    template = ChatTemplate(tokenizer, settled_date(date))
    messages = Forms(template).messages(Conversation([{"role": "user", "content": prompt}]))
    return template.text(messages, add_generation_prompt=True)


def read_segments(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerBase, number: int = 0
) -> list[tuple[str, bool]]:
    """A document of a folder of tokens, decoded: (text, whether it has loss), in order. All of plain text has."""
    begin, end = np.load(folder / "offsets.npy")[number : number + 2]
    tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")[begin:end].tolist()
    mask = np.ones(len(tokens), dtype=np.uint8)
    if (folder / "mask.bin").exists():
        mask = np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r")[begin:end]
    runs = itertools.groupby(zip(tokens, mask.tolist(), strict=True), key=lambda pair: bool(pair[1]))
    return [(tokenizer.decode([token for token, _ in run]), has_loss) for has_loss, run in runs]
