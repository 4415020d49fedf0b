"""What stands in the stored outputs for the names of the machine that ran the notebook: what a reader has there."""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
from pathlib import Path

from nbformat import NotebookNode

from ci.notebook import ROOT

CACHES = {  # variable → where the cache is without it
    "XDG_CACHE_HOME": "~/.cache",
    "TP2D_CACHE": "~/.cache/tp2d",
    "HF_HOME": "~/.cache/huggingface",
    "HF_HUB_CACHE": "~/.cache/huggingface/hub",
    "HF_DATASETS_CACHE": "~/.cache/huggingface/datasets",
}


class Placeholders:
    """Replaces what names the machine that ran the notebook: paths, hosts, users, private addresses.

    Args:
        paths: folder → placeholder. The longest folder that fits is taken.
        names: name → placeholder, replaced as whole words.
        known: the sources of the notebook and the package. A name or a temporary path that stands there is no trace
            of the machine and stays: `root` is a user, and a word of the code.
    """

    def __init__(self, paths: dict[str, str], names: dict[str, str], known: str = "") -> None:
        self.known = known
        self.rules: list[tuple[re.Pattern[str], str]] = []
        # A path begins a word, or follows the end of a colour (ESC[1m).
        begin, end = r"(^|[^\w.-]|\x1b\[[\d;]*m)", r"(?![\w-])"
        for path in sorted(paths, key=len, reverse=True):
            if len(path) > 1:
                self.rules.append((re.compile(begin + re.escape(path) + end, re.M), rf"\1{paths[path]}"))
        for name, placeholder in names.items():
            if len(name) > 1 and not re.search(rf"\b{re.escape(name)}\b", known):
                self.rules.append((re.compile(rf"(\b){re.escape(name)}\b"), rf"\1{placeholder}"))
        private = r"(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d+"
        self.rules.append((re.compile(rf"(?<![\d.])(){private}(?![\d.])"), r"\1<ip>"))
        self.temporary = re.compile(r"(?<![\w.-])/(?:var/)?tmp/[\w./-]+")

    def __call__(self, text: str) -> str:
        for pattern, replacement in self.rules:
            text = pattern.sub(replacement, text)
        return self.temporary.sub(self._replace_temporary, text)

    def _replace_temporary(self, match: re.Match[str]) -> str:
        path = match.group()
        return path if path in self.known else "$TMPDIR" + path.split("tmp", 1)[1]

    @classmethod
    def of_this_machine(cls, storage: Path, notebook: NotebookNode) -> Placeholders:
        """The replacements for a run that wrote to `storage`."""
        paths = {Path(sys.base_prefix): ".venv", Path(sys.prefix): ".venv", Path.home(): "~", ROOT: "."}
        for variable, default in CACHES.items():
            paths[Path(os.environ.get(variable, default)).expanduser()] = default
        paths[storage] = "outputs"  # what storage_path "auto" gives
        with_links_resolved = {path.resolve(): placeholder for path, placeholder in paths.items()}
        host = socket.gethostname()
        names = dict.fromkeys([host, host.split(".")[0], socket.getfqdn()], "localhost") | {getpass.getuser(): "user"}
        sources = [cell.source for cell in notebook.cells]
        sources += [file.read_text() for file in sorted(ROOT.glob("tp2d_helpers/**/*.py"))]
        return cls({str(k): v for k, v in (with_links_resolved | paths).items()}, names, "\n".join(sources))
