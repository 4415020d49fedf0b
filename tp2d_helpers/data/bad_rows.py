"""Rows that can't be trained on as they are: each has a kind, by which a user can have them left out."""

from __future__ import annotations

KINDS = {
    "unreadable": "a line that is no JSON object, or a value that is no text, number or list (bytes, NaN)",
    "not_text": "a value that is no text in the column of the text",
    "ambiguous": "a value that `datasets` wrote so that it can't be told whether it was text or a number",
    "half_character": "half of a surrogate pair, which is no character (a program cut the text in the midst of one)",
    "not_a_chat": "no list of messages with roles and contents",
    "no_answer": "a chat without an assistant's turn to learn",
    "refused": "a chat that the template refuses",
    "not_written": "the template leaves out what the row says",
}


class BadRow(ValueError):
    """A row of one of `KINDS`; its text says what was found, without where."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason

    @property
    def line(self) -> str:
        """As it stands in the column "bad" of rows that were read."""
        return f"{self.kind}: {self.reason}".encode(errors="backslashreplace").decode()

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.kind, self.reason)
