"""Chats → tokens by a chat template, and for each token whether it has loss.

Of an assistant's turn, what the model is to write has loss: its content and the stop token, with which it hands the
turn back. What comes before (the turn's header) is given to it, and what comes after (the line break of ChatML) it is
never asked for. Where the template marks that by `{% generation %}`, the marks count. Where it has none, a turn is what
the rendered chat grows by when the turn is added, and it is checked that nothing before it changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import transformers

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.chats import from_json
from tp2d_helpers.data.folder import Part, PartBuilder, digest
from tp2d_helpers.data.rows import Place, Text, read
from tp2d_helpers.data.text_tokens import TextEncoder

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
WAYS_OUT = "set chat_template to a .jinja file that marks the assistant's turns by {% generation %}"


class ChatEncoder:
    """Tokenises rows of chats, as `load_text` gives them. An example without a token to learn is left out.

    Raises:
        ConfigError: if there is no template, it refuses an example, or a turn can't be told from what is around it.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, form: str, loss_on: str) -> None:
        self.text = TextEncoder(tokenizer)
        self.renderer = Renderer(tokenizer, form, loss_on)

    def cuts(self, chat: Text, size: int) -> Iterator[int]:
        """A chat is never divided."""
        return iter(())

    def encode(self, rows: datasets.Dataset, begin: Place, end: Place, tick: Callable[[int], None]) -> Part:
        """The tokens of the rows from `begin` to before `end`, and their mask. `tick` gets the bytes that are done."""
        builder, bounds = PartBuilder(), (begin.row, end.row)
        chats = zip(read(rows, *bounds), read(rows, *bounds, column=1), strict=True)
        for batch in self._batches(chats):
            tokens = self._encode([text for example in batch for text in example.texts])
            for example in batch:
                whole, *prefixes = [next(tokens) for _ in example.texts]
                mask = self.renderer.mask(example, whole, prefixes)
                if mask[1:].any():  # nothing predicts the first token
                    builder.add(whole, mask)
                    builder.end(digest([example.texts[0]]) or 0)
                    builder.turns += len(example.messages)
            tick(sum(example.size for example in batch))
        return builder.part()

    def _batches(self, chats: Iterator[tuple[Text, Text]]) -> Iterator[list[Example]]:
        """Examples of about as many characters as the tokenizer is given at once, or one."""
        batch, size = [], 0
        for chat, where in chats:
            example = self.renderer.render(*from_json(str(chat)), str(where))
            example.size = len(chat)
            batch.append(example)
            size += sum(map(len, example.texts))
            if size > self.text.characters:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        """The tokens of each text."""
        bounds = np.cumsum([len(text) for text in texts]) // self.text.characters
        for _, group in groupby(zip(bounds, texts, strict=True), key=lambda pair: pair[0]):
            ids = self.text.ids([text for _, text in group])
            yield from (np.asarray(tokens, dtype=np.uint32) for tokens in ids)


@dataclass
class Example:
    """A chat and how it is rendered: as a whole, and up to where its answers begin and end."""

    messages: list[dict[str, Any]]
    where: str  # it stands
    has_answers: bool  # that are to be learnt
    texts: list[str]  # the whole, and beginnings of it
    of: list[int] = field(default_factory=list)  # for each beginning, the number of the answer that it is for
    size: int = 0  # bytes of its row

    def add(self, answer: int, beginning: str) -> None:
        """A beginning, which ends where an answer begins or ends."""
        self.texts.append(beginning)
        self.of.append(answer)


class Renderer:
    """Renders chats by the template of a tokenizer. Raises `ConfigError` if it has none."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, form: str, loss_on: str) -> None:
        self.tokenizer, self.loss_on = tokenizer, loss_on
        if not tokenizer.chat_template:
            raise ConfigError(
                f"model_name = {tokenizer.name_or_path!r}: its tokenizer has no chat template, which the chats of "
                f"dataset_name ({form}) need. Set chat_template to a .jinja file, or take a model that was made for "
                "chats (its name often ends in Instruct)"
            )
        self.marks = tokenizer.is_fast and bool(MARKS.search(tokenizer.get_chat_template()))
        added = tokenizer.added_tokens_decoder.items()  # Gemma's have line breaks among them
        self.control = {number for number, token in added if not token.content.isspace()}

    def render(self, messages: list[dict[str, Any]], prompt: int, where: str) -> Example:
        """A chat whose messages from `prompt` on are to be learnt. Raises `ConfigError` if the template refuses it."""
        answers = [i for i, message in enumerate(messages) if i >= prompt and message["role"] == "assistant"]
        example = Example(messages, where, bool(answers), [self._text(messages, where)])
        if self.loss_on == "all" or not answers:
            return example
        if self.marks:  # of the prompt's answers, too: where does the first one begin that is to be learnt?
            if any(message["role"] == "assistant" for message in messages[: answers[0]]):
                example.add(answers[0], self._text(messages[: answers[0]], where))
            return example
        if 0 in answers:
            raise ConfigError(f"dataset_name: {where}: the chat begins with an assistant's turn; {WAYS_OUT}")
        for i in answers:
            example.add(i, self._text(messages[:i], where, add_generation_prompt=True))
            if messages[i + 1 :]:
                example.add(i, self._text(messages[: i + 1], where))
        return example

    def mask(self, example: Example, whole: np.ndarray, prefixes: list[np.ndarray]) -> np.ndarray:
        """bool, for each token of the whole whether it has loss, by the tokens of the beginnings.

        Raises:
            ConfigError: if the whole doesn't begin with one of them.
        """
        if self.loss_on == "all":
            return np.ones(len(whole), dtype=bool)
        mask = np.zeros(len(whole), dtype=bool)
        if not example.has_answers:
            return mask
        for answer, prefix in zip(example.of, prefixes, strict=True):
            if not np.array_equal(whole[: len(prefix)], prefix):
                raise ConfigError(
                    f"dataset_name: {example.where}: it can't be told where message {answer + 1} (assistant) begins or "
                    f"ends, as the tokens before that change once more of the chat follows; {WAYS_OUT}"
                )
        bounds = [*map(len, prefixes), len(whole)]
        for begin, end in self._marked(example, bounds) if self.marks else zip(bounds[::2], bounds[1::2], strict=False):
            mask[begin : self._stop(whole, begin, end)] = True
        return mask

    def _marked(self, example: Example, bounds: list[int]) -> Iterator[tuple[int, int]]:
        """The spans of tokens that the template marks, from the first answer that is to be learnt."""
        options = dict(return_dict=True, return_assistant_tokens_mask=True)
        marks = self.tokenizer.apply_chat_template(example.messages, **options)["assistant_masks"]
        begin, first = 0, bounds[0] if len(bounds) > 1 else 0
        if not any(marks[first:]):
            raise ConfigError(f"dataset_name: {example.where}: the chat template's {{% generation %}} marks no answer")
        for marked, group in groupby(marks):
            end = begin + len(list(group))
            if marked and begin >= first:
                yield begin, end
            begin = end

    def _stop(self, tokens: np.ndarray, begin: int, end: int) -> int:
        """Where a turn's tokens end: after its stop token, with nothing but that. A turn may have none."""
        last = end
        while last > begin and tokens[last - 1] not in self.control and self._is_space(tokens[last - 1]):
            last -= 1
        if last > begin and tokens[last - 1] in self.control:
            return last
        # The marks of some templates end before it.
        return end + int(self.marks and end < len(tokens) and tokens[end] in self.control)

    def _is_space(self, token: int) -> bool:
        return self.tokenizer.decode([int(token)]).isspace()

    def _text(self, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"dataset_name: {where}: the chat template refuses it: {error}") from error


def stop_token(tokenizer: transformers.PreTrainedTokenizerBase) -> int | None:
    """The token that ends an assistant's turn by the chat template; None if it ends in none of the tokenizer's own."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        renderer = Renderer(tokenizer, "messages", "assistant")
        example = renderer.render(turns, 0, "a chat")
        whole, *prefixes = [np.asarray(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in example.texts]
        last = int(whole[np.flatnonzero(renderer.mask(example, whole, prefixes))[-1]])
    except (ConfigError, IndexError):  # there is no template, or it has no such chats
        return None
    return last if last in renderer.control else None


def read_segments(
    folder: Path, tokenizer: transformers.PreTrainedTokenizerBase, number: int = 0
) -> list[tuple[str, bool]]:
    """A document of a folder of tokens, decoded: (text, whether it has loss), in order. All of plain text has."""
    begin, end = np.load(folder / "offsets.npy")[number : number + 2]
    tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")[begin:end].tolist()
    mask = np.ones(len(tokens), dtype=np.uint8)
    if (folder / "mask.bin").exists():
        mask = np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r")[begin:end]
    runs = groupby(zip(tokens, mask.tolist(), strict=True), key=lambda pair: bool(pair[1]))
    return [(tokenizer.decode([token for token, _ in run]), has_loss) for has_loss, run in runs]
