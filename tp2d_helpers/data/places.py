"""Characters → tokens: which tokens of a text are those of a part of it.

Tokenizers say which characters each token is of, but not always all of them: some leave the spaces at its ends out, and
all tokens of one character have the same place. What is said is checked against the text, and what is left out is given
to the token that follows. Where that can't be done, the beginning of the text is tokenised by itself: what it has in
common with the whole ends where a token ends.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class Places:
    """Where each token of a text begins and ends.

    Args:
        ids: int [tokens].
        offsets: (begin, end) of each by the tokenizer, in characters; None if it has none.
        encode: gives the ids of another text, for tokenizers whose offsets can't be used.
    """

    def __init__(
        self, text: str, ids: np.ndarray, offsets: np.ndarray | None, encode: Callable[[str], np.ndarray]
    ) -> None:
        self.text, self.ids, self.encode = text, ids, encode
        self.bounds = None if offsets is None else _bounds(text, offsets)

    def tokens(self, begin: int, end: int, keep_out: set[int]) -> tuple[int, int]:
        """(first, last + 1) of the tokens with a character of text[begin:end].

        Args:
            keep_out: tokens that are not counted if they begin before it.

        Raises:
            ValueError: if it can't be told.
        """
        if self.bounds is None:
            return self._common(begin), self._common(end)
        begins, ends = self.bounds
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(begins, end, side="left"))
        while first < last and begins[first] < begin and int(self.ids[first]) in keep_out:
            first += 1
        if first < last and ends[last - 1] > end and self.text[begins[last - 1] : end].isspace():
            last -= 1  # the answer's share of this token is a space before what others wrote
        return first, max(first, last)

    def _common(self, place: int) -> int:
        """The number of tokens before a place of the text at which a token ends."""
        found = self.encode(self.text[:place])
        if not np.array_equal(self.ids[: len(found)], found):
            raise ValueError(f"no token ends after {self.text[max(0, place - 20) : place]!r}")
        return len(found)


def _bounds(text: str, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Where tokens begin and end, so that together they are the text; None if what was said of them can't be right."""
    if not len(offsets):
        return (offsets[:, 0], offsets[:, 1]) if not text or text.isspace() else None
    ends = np.maximum.accumulate(offsets[:, 1])
    before = np.concatenate([[0], ends[:-1]])
    gaps = offsets[:, 0] > before
    left_out = [text[i:j] for i, j in zip(before[gaps].tolist(), offsets[gaps, 0].tolist(), strict=True)]
    left_out.append(text[ends[-1] :])
    in_order = (np.diff(offsets[:, 0]) >= 0).all() and ends[-1] <= len(text)
    if not in_order or not ("".join(left_out).isspace() or not any(left_out)):
        return None
    begins = np.minimum(offsets[:, 0], before)
    return np.maximum.accumulate(begins), ends
