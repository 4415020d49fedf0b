"""Rows that can't be trained on as they are: each has a kind, by which a user can have them left out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tp2d_helpers.config import BAD_ROWS, ConfigError

KINDS = BAD_ROWS
FIRST = 3  # rows of a kind that are named


class BadRow(ValueError):
    """A row of one of `KINDS`; its text says what was found, without where."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.kind, self.reason)

    @property
    def line(self) -> str:
        """As `parse` takes it: "kind: reason"."""
        return f"{self.kind}: {self.reason}".encode(errors="backslashreplace").decode()

    @classmethod
    def parse(cls, text: str) -> BadRow:
        """One of "kind: reason"."""
        kind, _, reason = text.partition(": ")
        return cls(kind, reason)


@dataclass
class Remarks:
    """What is to be said of rows: those that are bad, and what was left out of good ones."""

    bad: dict[str, dict[str, Any]] = field(default_factory=dict)  # kind: {"count", "first": where and why}
    notes: Counter = field(default_factory=Counter)  # of how many rows, or turns
    example: str = ""  # how the first answer ends

    def add(self, error: BadRow, where: str) -> None:
        """A bad row."""
        self._merge(error.kind, 1, [f"{where}: {error.reason}"])

    def merge(self, other: Remarks) -> None:
        """Those of the rows that follow."""
        self.notes += other.notes
        self.example = self.example or other.example
        for kind, found in other.bad.items():
            self._merge(kind, found["count"], found["first"])

    def _merge(self, kind: str, count: int, first: list[str]) -> None:
        found = self.bad.setdefault(kind, {"count": 0, "first": []})
        found["count"] += count
        found["first"] = [*found["first"], *first][:FIRST]

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps({"bad": self.bad, "notes": self.notes, "example": self.example})

    @classmethod
    def from_json(cls, text: str) -> Remarks:
        """What `to_json` wrote."""
        found = json.loads(text)
        return cls(found["bad"], Counter(found["notes"]), found["example"])

    def check(self, dataset_name: str, rows: int, leave_out: str) -> None:
        """Refuse bad rows, all kinds at once, but those of the kinds that are to be left out.

        Args:
            leave_out: kinds, with commas between.

        Raises:
            ConfigError: with how many there are of each kind, and the first of them.
        """
        names = [kind for kind in self.bad if kind not in kinds_of(leave_out)]
        if not names:
            return
        lines = []
        for kind in names:
            found = self.bad[kind]
            more = f", and {found['count'] - FIRST:,} more" if found["count"] > FIRST else ""
            lines.append(f"{kind} ({KINDS[kind]}): {found['count']:,}, {'; '.join(found['first'])}{more}")
        wanted = ",".join(sorted({*names, *kinds_of(leave_out)}))
        number = sum(self.bad[kind]["count"] for kind in names)
        raise ConfigError(
            f"dataset_name = {dataset_name!r}: {number:,} of {rows:,} rows can't be trained on as they are. "
            f"{'. '.join(lines)}. Mend them, or set leave_out_rows = {wanted!r} to train without them"
        )


def kinds_of(leave_out: str) -> list[str]:
    """The kinds in a list with commas."""
    return [name.strip() for name in leave_out.split(",") if name.strip()]
