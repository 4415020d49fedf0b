"""Which token ends an answer, and so which tokens of a conversation have loss.

Most templates end an answer by a token of their own. GLM's end it by the token that the next header begins with, and
some, for base models, by nothing: there the tokenizer's end-of-text token is added to a conversation's last answer.
"""

from __future__ import annotations

import numpy as np
import transformers

from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chat.answers import Answered, Answers
from tp2d_helpers.data.chats import Conversation
from tp2d_helpers.data.places import Places
from tp2d_helpers.data.text_tokens import TextEncoder
from tp2d_helpers.data.tokenizer import stop_tokens


class Ends:
    """What ends an answer by a template, found by trying it.

    Attributes:
        token: what ends the last answer of a conversation; None if nothing does.
        written: an answer, as the template writes it.
        how: "template", "header" (the token that the next one begins with) or "tokenizer".
        header: the token before an answer, with which the next header must not begin to end one.
        control: the tokenizer's added tokens, but for spaces and the one for what is unknown.
    """

    def __init__(self, answers: Answers, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.stops, self.spaces = tokenizer, stop_tokens(tokenizer), {}
        added = tokenizer.added_tokens_decoder.items()  # Gemma's have line breaks among them
        unknown = {tokenizer.unk_token_id} - self.stops  # GPT-2's is its end-of-text token, too
        self.control = {number for number, token in added if not token.content.isspace()} - unknown
        self.how, self.token, self.written, self.header = "tokenizer", tokenizer.eos_token_id, "", None
        for messages in answers.forms.plain():
            try:
                found = answers.find(Conversation(messages))
            except BadRow:
                continue
            self._learn(next(TextEncoder(tokenizer).places([found.text])), found)
            return

    def _learn(self, places: Places, found: Answered) -> None:
        """See what ends the answers of a conversation."""
        for (begin, end), part in zip(found.spans, found.ends, strict=True):
            first, last = self._trimmed(places, begin, end)
            self.header = int(places.ids[first - 1]) if first else None
            own = places.tokens(begin, part, self.control)[1]  # marks may leave the message's stop token out
            ended, after = int(places.ids[last - 1]), int(places.ids[last]) if last < len(places.ids) else None
            if ended in self.control or (after in self.control and last < own):
                self.how, self.token = "template", ended if ended in self.control else after
                self.stops.add(self.token)
            elif after in self.control:
                self.how, self.token = "header", after
        if self.how == "tokenizer" and places.text[found.spans[-1][1] :].strip():
            self.token = None  # no place for it: the template goes on
        self.written = places.text[slice(*found.spans[0])].rstrip()

    def mask(self, places: Places, spans: list[tuple[int, int]]) -> tuple[np.ndarray, list[int]]:
        """(bool [tokens], which have loss; tokens to add at the end, which have loss, too).

        Raises:
            ValueError: if it can't be told where a span begins or ends.
        """
        ids, mask, added = places.ids, np.zeros(len(places.ids), dtype=bool), []
        for begin, end in spans:
            first, last = self._trimmed(places, begin, end)
            ended = int(ids[last - 1]) if last > first else None
            open_end = ended not in self.control or self.how == "header"
            if ended not in self.stops:
                after = int(ids[last]) if last < len(ids) else None
                by_header = self.how == "header" and after != self.header  # another answer may follow, by its own
                if after in self.control and (by_header or after in self.stops):
                    last += 1
                elif open_end and self.token is not None and not places.text[end:].strip():
                    added = [self.token]
            mask[first:last] = True
        return mask, added

    def _trimmed(self, places: Places, begin: int, end: int) -> tuple[int, int]:
        """The tokens of an answer: to the token that ends it, if one does, without spaces after it."""
        first, last = places.tokens(begin, end, self.control)
        stop = last
        while stop > first and int(places.ids[stop - 1]) not in self.control and self._is_space(places.ids[stop - 1]):
            stop -= 1
        return first, stop if stop > first and int(places.ids[stop - 1]) in self.control else last

    def _is_space(self, token: int) -> bool:
        token = int(token)
        if token not in self.spaces:
            self.spaces[token] = not self.tokenizer.decode([token]).strip()  # metaspaces alone are decoded to nothing
        return self.spaces[token]
