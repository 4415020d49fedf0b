"""The folder that tokens are kept in, as it is written; `TokenDataset` reads it.

- `tokens.bin`: uint32, all documents end to end.
- `mask.bin`: uint8, of chats alone: for each token, whether it has loss.
- `offsets.npy`: int64 [documents + 1], where each begins.
- `first.npy`: int64 [documents], the first document with the same text: its own number, if it repeats none.
- `digests.npy`: uint64 [documents], by which copies are told, in this folder or in another one.
- `meta.json`: the numbers of rows, documents and tokens, the pad token, the highest token, a hash of all of them, and
  what is to be said of the rows (`Remarks`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import zipfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from tp2d_helpers.data.bad_rows import Remarks

NO_TOKENS, NO_MASK = [np.zeros(0, dtype=np.uint32)], [np.zeros(0, dtype=np.uint8)]


@dataclass
class Part:
    """The tokens of some rows, one after the other. A document may begin in one part and end in a later one."""

    tokens: np.ndarray  # uint32 [tokens]
    ends: np.ndarray  # int64 [documents that end here], the number of tokens up to the end of each
    digests: np.ndarray  # uint64 [documents that end here], by which copies are told
    mask: np.ndarray  # uint8 [tokens] of chats, 1 where there is loss; of text [0]
    turns: np.ndarray  # int64 [1], the messages of chats
    remarks: np.ndarray = field(default_factory=lambda: np.array([Remarks().to_json()]))  # str [1], of the rows

    def save(self, path: Path) -> None:
        """Write it to a file, which appears at once, when it is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with open(handle, "wb") as file:
                np.savez(file, **vars(self))
            Path(scratch).replace(path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> Part | None:
        """What `save` wrote; None if it isn't there or is damaged, which a checksum in the file tells."""
        try:
            with np.load(path) as arrays:
                return cls(**{entry.name: arrays[entry.name] for entry in fields(cls)})
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
            return None


class PartBuilder:
    """Collects documents into a `Part`."""

    def __init__(self) -> None:
        self.pieces: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []
        self.size, self.ends, self.digests, self.turns = 0, array("q"), array("Q"), 0
        self.remarks = Remarks()

    def add(self, ids: Sequence[int], mask: np.ndarray | None = None) -> None:
        """Tokens of the current document, and which of them have loss."""
        self.pieces.append(np.asarray(ids, dtype=np.uint32))
        self.size += len(ids)
        if mask is not None:
            self.masks.append(np.asarray(mask, dtype=np.uint8))

    def end(self, digest: int) -> None:
        """The current document is complete."""
        self.ends.append(self.size)
        self.digests.append(digest)

    def part(self) -> Part:
        """All of them."""
        tokens, mask = np.concatenate([*NO_TOKENS, *self.pieces]), np.concatenate([*NO_MASK, *self.masks])
        ends, digests = np.array(self.ends, dtype=np.int64), np.array(self.digests, dtype=np.uint64)
        return Part(tokens, ends, digests, mask, np.array([self.turns]), np.array([self.remarks.to_json()]))


def digest(pieces: Iterable[str]) -> int | None:
    """64 bits by which copies of a text are told, however it is divided into pieces; None if it is only spaces.

    Spaces at its ends don't count.
    """
    found, spaces, empty = hashlib.blake2b(digest_size=8), "", True
    for piece in pieces:
        piece = piece.lstrip() if empty else piece
        if body := piece.rstrip():
            found.update((spaces + body).encode(errors="replace"))
            spaces, empty = "", False
        spaces += piece[len(body) :]
    return None if empty else int.from_bytes(found.digest(), "big")


class TokenWriter:
    """Writes such a folder, part by part. A context manager, which closes the files."""

    def __init__(self, folder: Path, highest: int = 0, masked: bool = False) -> None:
        self.folder, self.highest, self.size, self.turns, self.with_loss = folder, highest, 0, 0, 0
        self.offsets, self.digests, self.remarks = array("q", [0]), array("Q"), Remarks()
        self.whole, self.whole_mask, self.masked = hashlib.sha256(), hashlib.sha256(), masked
        self.files = contextlib.ExitStack()

    def __enter__(self) -> TokenWriter:
        self.tokens = self.files.enter_context(open(self.folder / "tokens.bin", "wb"))
        self.mask = self.files.enter_context(open(self.folder / "mask.bin", "wb")) if self.masked else None
        return self

    def __exit__(self, *error: Any) -> None:
        self.files.close()

    def add(self, part: Part) -> None:
        """The tokens that come next."""
        self.remarks.merge(Remarks.from_json(str(part.remarks[0])))
        self.tokens.write(part.tokens.data)
        self.whole.update(part.tokens)
        self.highest = max(self.highest, int(part.tokens.max(initial=0)))
        if self.mask:
            self.mask.write(part.mask.data)
            self.whole_mask.update(part.mask)
            self.with_loss += int(part.mask.sum())
        self.offsets.frombytes((part.ends + self.size).tobytes())
        self.digests.frombytes(part.digests.tobytes())
        self.size, self.turns = self.size + len(part.tokens), self.turns + int(part.turns[0])

    def finish(self, rows: int, pad: int, **more: Any) -> None:
        """Write what is known at the end, with the fields `more` in `meta.json`."""
        np.save(self.folder / "offsets.npy", np.asarray(self.offsets))
        self.whole.update(np.asarray(self.offsets))
        if self.mask:
            self.whole.update(self.whole_mask.digest())
            more = {**more, "turns": self.turns, "with_loss": self.with_loss}
        digests = np.asarray(self.digests)
        _, firsts, which = np.unique(digests, return_index=True, return_inverse=True)
        np.save(self.folder / "first.npy", firsts[which])
        np.save(self.folder / "digests.npy", digests)
        meta = {"rows": rows, "documents": len(self.digests), "tokens": self.size, "pad": pad,
                "highest": self.highest, "sha256": self.whole.hexdigest(), "remarks": self.remarks.to_json(),
                **more}  # fmt: skip
        (self.folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
