"""Are rows chats, and in which format?"""

from __future__ import annotations

import json
from typing import Any

from tp2d_helpers.data.chats import FORMATS


def chat_format(rows: list[dict[str, Any]], text_column: str) -> str | None:
    """Which of `FORMATS` rows have; None if they are text, or have none of its columns.

    The first row that has either decides. In a row with both, the column `text_column` comes first, if it holds text
    (null is none) and isn't itself the column of the chats.
    """
    for row in rows:
        if _is_text(row.get(text_column), text_column):
            return None
        if form := form_of(row):
            return form
    return None


def form_of(row: dict[str, Any]) -> str | None:
    """The one of `FORMATS` whose columns a row has."""
    return next((form for form, columns in FORMATS.items() if set(columns) <= set(row)), None)


def _is_text(value: Any, column: str) -> bool:
    """Whether a value of the column of the text is one, and not the chat that a column of this name holds."""
    if column not in {name for columns in FORMATS.values() for name in columns}:
        return value is not None
    return value is not None and not isinstance(value, list) and not _is_list_of_objects(value)


def _is_list_of_objects(value: Any) -> bool:
    """Whether a text is JSON of what chats are: some programs write them so."""
    try:
        found = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(found, list) and bool(found) and all(isinstance(one, dict) for one in found)
