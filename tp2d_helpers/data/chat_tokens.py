"""Chats → tokens by a chat template, and for each token whether it has loss.

Of an assistant's turn, what the model is to write has loss: its content and the stop token, with which it hands the
turn back. What comes before (the turn's header) is given to it, and what comes after (the line break of ChatML) it is
never asked for. Where the template marks that by `{% generation %}`, the marks count. Where it has none, a turn is what
the rendered chat grows by when the turn is added, and it is checked that nothing before it changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import transformers
from tqdm import tqdm

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.chats import from_json
from tp2d_helpers.data.folder import TokenWriter

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
WAYS_OUT = "set chat_template to a .jinja file that marks the assistant's turns by {% generation %}"


def tokenize_chats(
    chats: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path, loss_on: str, progress: bool
) -> None:
    """Write the tokens of chats, as `load_text` gives them, and their mask into `folder` (see `TokenWriter`).

    An example without a token to learn is left out and counted. `meta.json` also has: `format`, `loss_on`, `turns`
    (messages) and `with_loss` (tokens).

    Raises:
        ConfigError: if there is no template, it refuses an example, a turn can't be told from what is around it, or no
            example has anything to learn.
    """
    form = chats.column_names[0]
    renderer = Renderer(tokenizer, form, loss_on)
    turns = with_loss = 0
    with TokenWriter(folder, masked=True) as writer:
        for row in tqdm(chats, desc="Tokenising", unit=" chats", disable=not progress, mininterval=1):
            messages, prompt = from_json(row[form])
            text, tokens, mask = renderer(messages, prompt, row["where"])
            if any(mask[1:]):  # nothing predicts the first token
                writer.add(text, [tokens], mask)
                turns, with_loss = turns + len(messages), with_loss + sum(mask)
        if not writer.digests:
            raise ConfigError(f"dataset_name: none of the {len(chats)} examples ({form}) has an assistant's turn")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        writer.finish(len(chats), pad, format=form, loss_on=loss_on, turns=turns, with_loss=with_loss)


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

    def __call__(self, messages: list[dict[str, Any]], prompt: int, where: str) -> tuple[str, list[int], list[bool]]:
        """(text, tokens, which of them have loss) of a chat whose messages from `prompt` on are to be learnt."""
        whole = self._render(messages, where)
        tokens = self._tokens(whole)
        if self.loss_on == "all":
            return whole, tokens, [True] * len(tokens)
        answers = [i for i, message in enumerate(messages) if i >= prompt and message["role"] == "assistant"]
        spans = self._marked if self.marks else self._grown
        mask = [False] * len(tokens)
        for begin, end in spans(messages, answers, tokens, where) if answers else ():
            end = self._stop(tokens, begin, end)
            mask[begin:end] = [True] * (end - begin)
        return whole, tokens, mask

    def _marked(
        self, messages: list[dict[str, Any]], answers: list[int], tokens: list[int], where: str
    ) -> Iterator[tuple[int, int]]:
        """The spans of tokens that the template marks, from the first answer on."""
        found = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        begin, first = 0, 0
        if messages[: answers[0]] and any(message["role"] == "assistant" for message in messages[: answers[0]]):
            first = len(self._prefix(messages[: answers[0]], tokens, where, answers[0], add_generation_prompt=True))
        if not any(found["assistant_masks"][first:]):
            raise ConfigError(f"dataset_name: {where}: the chat template's {{% generation %}} marks no answer")
        for marked, group in groupby(found["assistant_masks"]):
            end = begin + len(list(group))
            if marked and begin >= first:
                yield begin, end
            begin = end

    def _grown(
        self, messages: list[dict[str, Any]], answers: list[int], tokens: list[int], where: str
    ) -> Iterator[tuple[int, int]]:
        """The spans of tokens that each answer adds to what is rendered before it."""
        for i in answers:
            if not i:
                raise ConfigError(f"dataset_name: {where}: the chat begins with an assistant's turn; {WAYS_OUT}")
            begin = len(self._prefix(messages[:i], tokens, where, i, add_generation_prompt=True))
            end = len(self._prefix(messages[: i + 1], tokens, where, i)) if messages[i + 1 :] else len(tokens)
            yield begin, end

    def _prefix(
        self, messages: list[dict[str, Any]], tokens: list[int], where: str, answer: int, **options: Any
    ) -> list[int]:
        """The tokens of the first messages. Raises `ConfigError` if those of the whole chat don't begin so."""
        prefix = self._tokens(self._render(messages, where, **options))
        if tokens[: len(prefix)] != prefix:
            raise ConfigError(
                f"dataset_name: {where}: it can't be told where message {answer + 1} (assistant) begins or ends, as "
                f"the tokens before that change once more of the chat follows; {WAYS_OUT}"
            )
        return prefix

    def _stop(self, tokens: list[int], begin: int, end: int) -> int:
        """Where a turn's tokens end: after its stop token, with nothing but that. A turn may have none."""
        last = end
        while last > begin and tokens[last - 1] not in self.control and self._is_space(tokens[last - 1]):
            last -= 1
        if last > begin and tokens[last - 1] in self.control:
            return last
        # The marks of some templates end before it.
        return end + (self.marks and end < len(tokens) and tokens[end] in self.control)

    def _is_space(self, token: int) -> bool:
        return self.tokenizer.decode([token]).isspace()

    def _render(self, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"dataset_name: {where}: the chat template refuses it: {error}") from error

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


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
