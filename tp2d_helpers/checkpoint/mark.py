"""The mark that an export bears: by it, what may be replaced is told from what somebody else put there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tp2d_helpers.checkpoint.files import read_json, write_json

MARK = ".tp2d_export.json"
SMALL = 16 * 2**20  # bytes; of a larger file the size is compared, of others the contents: a card may have been edited


def write_mark(folder: Path) -> None:
    """List the files of an export in it."""
    write_json(folder / MARK, {"files": {name: _contents(folder / name) for name in _files(folder)}})


def check_output(folder: Path, model_name: str) -> None:
    """See that nothing is lost if an export takes a folder's place: it must be empty, or an older export as it was.

    Raises:
        ValueError: with the files that are somebody else's, or were changed.
    """
    if folder.resolve() == Path(model_name).resolve():
        raise ValueError(f"{folder} is the model that training began with: take another folder")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    written = read_json(folder / MARK).get("files")
    if written is None:
        raise ValueError(
            f"{folder} holds something other than an export (it has no {MARK}, which each export has since it bears a "
            "mark): take another folder, or remove it"
        )
    if own := [name for name in _files(folder) if written.get(name) != _contents(folder / name)]:
        names = ", ".join(own[:4]) + ", …" * (len(own) > 4)
        raise ValueError(
            f"{folder} holds files that were added to the export or changed since ({names}): they would be lost; move "
            "them, or take another folder"
        )


def _files(folder: Path) -> list[str]:
    found = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())
    return [name for name in found if name != MARK]


def _contents(path: Path) -> str:
    if path.is_symlink() or path.stat().st_size > SMALL:
        return f"{path.lstat().st_size} bytes"
    return hashlib.sha256(path.read_bytes()).hexdigest()
