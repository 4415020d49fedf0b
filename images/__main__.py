"""Draw the figures again: `python -m images [name …]`, from the root of the repository; all of them without a name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from images.drawing import picture

FOLDER = Path(__file__).parent
FIGURES = sorted({path.stem for path in FOLDER.glob("*.py")} - {"drawing", "__main__"})


def main(names: list[str]) -> None:
    """Write the picture of each named figure beside the module that draws it."""
    for name in names or FIGURES:
        picture(importlib.import_module(f"images.{name}").draw).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
