"""Rendering a conversation by a chat template that says, as it writes, of which message each part of its text is.

transformers renders: its text is what counts. The same template is compiled a second time so that it writes marks
(`marks`) where a message's part begins and ends. If the text without the marks is that of transformers, they are
right. Nothing is concluded from the rendering of a beginning: many templates render one differently.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import transformers

from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chat.marks import NOWHERE, Hooks, Rendered, compiled, environment, mark, without_marks

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PASSED = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"}


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        date: YYYY-MM-DD, what templates that write the date take for today.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, date: str) -> None:
        self.tokenizer, self.day = tokenizer, datetime.fromisoformat(date)

    def source(self, tools: Any = None) -> str:
        """The template's text: of a tokenizer with several by name, `tool_use` where there are tools."""
        return self.tokenizer.get_chat_template(tools=tools)

    @functools.cached_property
    def everything(self) -> str:
        """The text of all templates that the tokenizer has."""
        templates = self.tokenizer.chat_template
        return "\n".join(templates.values()) if isinstance(templates, dict) else templates

    @functools.cached_property
    def variables(self) -> set[str]:
        """The names that the template takes, besides those that every conversation has.

        What it sets itself is none of them, unless it asks whether it is defined: then it sets a default.
        """
        tree = environment().parse(self.everything)
        names = list(tree.find_all(jinja2.nodes.Name))
        asked = {
            node.node.name for kind in (jinja2.nodes.Test, jinja2.nodes.Filter) for node in tree.find_all(kind)
            if node.name in ("defined", "undefined", "default") and isinstance(node.node, jinja2.nodes.Name)
        }  # fmt: skip
        own = {name.name for name in names if name.ctx != "load"} - asked
        return jinja2.meta.find_undeclared_variables(tree) - own - PASSED - {*self.tokenizer.special_tokens_map}

    @property
    def has_marks(self) -> bool:
        """Whether it marks by `{% generation %}` what has loss."""
        return bool(GENERATION.search(self.everything))

    @functools.cached_property
    def names(self) -> set[str]:
        """The fields of messages, tools and other things that it may look at, and all other texts in its code."""
        tree = environment().parse(self.everything)
        fields = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
        return fields | {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}

    def text(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """What transformers renders. Raises `BadRow` if the template refuses the conversation."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, **{"strftime_now": self.day.strftime, **options}
            )
        except Exception as error:  # of jinja, or of the template's own making
            raise BadRow("refused", f"the chat template refuses it: {error}") from error

    def rendered(self, messages: list[dict[str, Any]], **options: Any) -> Iterator[Rendered]:
        """The text with the pieces of each message, found in one way after the other; some of them may find none."""
        text, source, ways = self.text(messages, **options), self.source(options.get("tools")), []
        for assigned in (False, True):
            found = self._marked(compiled(source, assigned), messages, options)
            if found and found.text == text and (placed := {n for *_, n in found.pieces if n != NOWHERE}):
                ways.append((len(placed), found))
                if len(placed) == len(messages):
                    break
        # The one that says of most messages where they are: a message without a part of its own may be in another's.
        yield from (found for _, found in sorted(ways, key=lambda way: -way[0]))
        if not self.has_marks and (found := self._by_content(messages, text, options)):
            yield found

    def _marked(
        self, template: jinja2.Template, messages: list[dict[str, Any]], options: dict[str, Any]
    ) -> Rendered | None:
        """What the template with marks renders; None if it can't."""
        arguments = {"tools": None, "documents": None, "add_generation_prompt": False,
                     "strftime_now": self.day.strftime, **self.tokenizer.special_tokens_map, **options}  # fmt: skip
        try:
            text = template.render(messages=messages, **arguments, **vars(Hooks(messages)))
        except Exception:  # transformers rendered it, and so this is no fault of the conversation
            return None
        return without_marks(text)

    def _by_content(self, messages: list[dict[str, Any]], text: str, options: dict[str, Any]) -> Rendered | None:
        """The text with the pieces that are contents, for templates that don't loop over messages."""
        marked = []
        for number, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, str):
                message = {**message, "content": f"{mark(number)}{content}{mark(NOWHERE)}"}
            marked.append(message)
        try:
            found = without_marks(self.text(marked, **options))
        except BadRow:
            return None
        found.by_content = True
        return found if found.text == text else None


def settled_date(date: str = "auto") -> str:
    """A date as YYYY-MM-DD; today's for "auto" and ""."""
    return datetime.now().date().isoformat() if date in ("", "auto") else date
