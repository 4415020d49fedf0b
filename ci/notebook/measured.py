"""Measured numbers in Markdown are links to the value in a results file, so that text and results cannot part.

    a step takes [1,647 ms](results/h200x2.json "ours micro_batch=4: step_ms"), and the best peer
    [1.19 times](results/h200x2.json "fastest ours=false: step_ms / fastest ours=true: step_ms") as long

The link's title says which value: the entry of the file's `candidates` by its name, by values and settings of it or
both, then the key. Without an entry it is the keys from the top of the file, as in "totals.matmul_ms", or in a notebook
"metadata.tp2d.seconds.core". `fastest` takes the entry with the most tokens/s per GPU where several fit. Two values
with " / " between them are a ratio. The text says how the number is written: its digits after the point, and a percent
sign for a share; thousands get commas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

LINK = re.compile(r'\[(?P<text>[^\[\]]*)\]\((?P<file>[^()\s]+\.(?:json|ipynb)) "(?P<title>[^"]+)"\)')
NUMBER = re.compile(r"\d[\d,]*(?:\.(?P<digits>\d+))?(?P<percent>\s?%)?")
SPEED = "tokens_per_second_per_gpu"


def matches(entry: dict[str, Any], condition: str) -> bool:
    """Whether an entry of `candidates` has a name ("ours"), or a value or setting ("micro_batch=4", "ours=false")."""
    key, equals, wanted = condition.partition("=")
    if not equals:
        return entry["name"] == condition
    found = entry.get(key, entry.get("settings", {}).get(key))
    return str(found).lower() == wanted.lower()


def entry_of(candidates: list[dict[str, Any]], words: str) -> dict[str, Any]:
    """The entry that has all that `words` ask for.

    Raises:
        ValueError: if none has, or several without "fastest".
    """
    conditions = words.removeprefix("fastest ").split()
    found = [entry for entry in candidates if all(matches(entry, each) for each in conditions)]
    if words.startswith("fastest "):
        found = sorted((entry for entry in found if entry["status"] == "ok"), key=lambda entry: entry[SPEED])[-1:]
    if len(found) != 1:
        names = ", ".join(f"{entry['name']} ({entry['label']})" for entry in found or candidates)
        raise ValueError(f'"{words}" fits {len(found)} entries, needs 1; there are: {names}')
    return found[0]


def value_of(results: dict[str, Any], selector: str) -> float:
    """The value that one side of a ratio, or the whole title, selects.

    Raises:
        ValueError: if there is no such number.
    """
    words, colon, keys = selector.rpartition(":")
    place = entry_of(results.get("candidates", []), words) if colon else results
    try:
        value = reduce(lambda inner, key: inner[key], keys.strip().split("."), place)
    except (KeyError, TypeError):
        raise ValueError(f'"{selector}": no {keys.strip()}; there are: {", ".join(place)}') from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'"{selector}" is {value!r}, needs a number')
    return value


def rewritten(link: re.Match[str], folder: Path) -> str:
    """The text of a measured link with the number that its file has now.

    Raises:
        ValueError: if the file, the value or the number in the text isn't there.
    """
    written = NUMBER.search(link["text"])
    if not written:
        raise ValueError(f"{link.group()} has no number in its text")
    try:
        results = json.loads((folder / link["file"]).read_text())
    except FileNotFoundError:
        raise ValueError(f"{link.group()}: no such file in {folder}") from None
    value, *divisors = [value_of(results, selector) for selector in link["title"].split(" / ")]
    for divisor in divisors:
        value /= divisor
    percent = written["percent"] or ""
    number = f"{value * (100 if percent else 1):,.{len(written['digits'] or '')}f}"
    return link["text"][: written.start()] + number + percent + link["text"][written.end() :]


def refresh_numbers(markdown: str, folder: Path) -> str:
    """Markdown of a file in `folder`, with all measured numbers as their files have them now."""
    return LINK.sub(lambda link: link.group().replace(f"[{link['text']}]", f"[{rewritten(link, folder)}]", 1), markdown)


def outdated(markdown: str, folder: Path) -> Iterator[str]:
    """A line per measured number that isn't as its file has it, or whose value can't be found."""
    for link in LINK.finditer(markdown):
        try:
            now = rewritten(link, folder)
        except ValueError as error:
            yield str(error)
        else:
            if now != link["text"]:
                yield f"{link['text']!r} is {now!r} in {link['file']} ({link['title']})"
