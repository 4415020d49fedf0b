"""The folder that tokens are kept in, as it is written; `TokenDataset` reads it.

- `tokens.bin`: uint32, all documents end to end.
- `mask.bin`: uint8, of chats alone: for each token, whether it has loss.
- `offsets.npy`: int64 [documents + 1], where each begins.
- `first.npy`: int64 [documents], the first document with the same text: its own number, if it repeats none.
- `meta.json`: the numbers of rows, documents and tokens, the pad token, the highest token, a hash of all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class TokenWriter:
    """Writes such a folder, document by document. A context manager, which closes the files."""

    def __init__(self, folder: Path, highest: int = 0, masked: bool = False) -> None:
        self.folder, self.highest = folder, highest
        self.offsets, self.digests = array("q", [0]), array("Q")
        self.whole, self.whole_mask, self.masked = hashlib.sha256(), hashlib.sha256(), masked
        self.files = contextlib.ExitStack()

    def __enter__(self) -> TokenWriter:
        self.tokens = self.files.enter_context(open(self.folder / "tokens.bin", "wb"))
        self.mask = self.files.enter_context(open(self.folder / "mask.bin", "wb")) if self.masked else None
        return self

    def __exit__(self, *error: Any) -> None:
        self.files.close()

    def add(self, text: str, parts: Iterable[Sequence[int]], mask: np.ndarray | None = None) -> None:
        """A document: its text, by which copies are told, its tokens in parts, and which of them have loss."""
        digest = hashlib.blake2b(text.strip().encode(errors="replace"), digest_size=8).digest()
        self.digests.append(int.from_bytes(digest, "big"))
        length = 0
        for ids in parts:
            tokens = np.asarray(ids, dtype=np.uint32)
            self.tokens.write(tokens.tobytes())
            self.whole.update(tokens)
            length, self.highest = length + len(tokens), max(self.highest, int(tokens.max(initial=0)))
        if self.mask:
            has_loss = np.asarray(mask, dtype=np.uint8).tobytes()
            self.mask.write(has_loss)
            self.whole_mask.update(has_loss)
        self.offsets.append(self.offsets[-1] + length)

    def finish(self, rows: int, pad: int, **more: Any) -> None:
        """Write what is known at the end, with the fields `more` in `meta.json`."""
        np.save(self.folder / "offsets.npy", np.asarray(self.offsets))
        self.whole.update(np.asarray(self.offsets))
        if self.mask:
            self.whole.update(self.whole_mask.digest())
        _, firsts, which = np.unique(np.asarray(self.digests), return_index=True, return_inverse=True)
        np.save(self.folder / "first.npy", firsts[which])
        meta = {"rows": rows, "documents": len(self.digests), "tokens": self.offsets[-1], "pad": pad,
                "highest": self.highest, "sha256": self.whole.hexdigest(), **more}  # fmt: skip
        (self.folder / "meta.json").write_text(json.dumps(meta))
