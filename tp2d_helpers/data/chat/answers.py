"""Which characters of a rendered conversation an assistant wrote.

Of an assistant's part of the text, it did not write what every answer begins with, and what a prompt ends with: the
header. The rest has loss: thoughts, words, calls, and the token with which it hands the turn back. Where a template
marks by `{% generation %}` what has loss, its marks count.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tp2d_helpers.data.bad_rows import BadRow
from tp2d_helpers.data.chat.forms import KEY, VALUE, Forms
from tp2d_helpers.data.chat.marks import NOWHERE, Rendered
from tp2d_helpers.data.chat.template import ChatTemplate
from tp2d_helpers.data.chat.written import OPENED, check_written
from tp2d_helpers.data.chats import LONG, Conversation

WAYS_OUT = "set chat_template to a .jinja file that marks the assistant's turns by {% generation %}"


@dataclass
class Answered:
    """A conversation's text, and what of it is to be learnt."""

    text: str
    spans: list[tuple[int, int]]  # characters, in order
    ends: list[int]  # for each, where that part of its message ends that the span is of
    notes: Counter  # what the template left out by its design


class Answers:
    """Renders conversations and finds their answers."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template, self.forms = template, Forms(template)
        self.headers: dict[tuple[str, str], list[str]] = {}

    def find(self, conversation: Conversation) -> Answered:
        """The text, and what of it an assistant wrote that is to be learnt.

        Raises:
            BadRow: if the template refuses it, or leaves something out, or it can't be told where an answer is.
        """
        options, notes = self._options(conversation)
        messages = self.forms.messages(conversation)
        wrong = BadRow("refused", f"it can't be told which part of its text is of which message; {WAYS_OUT}")
        for found in self.template.rendered(messages, **options):
            try:
                notes_of_text = check_written(conversation, messages, found, self.template)
                spans = self._spans(conversation, messages, found, options)
                ends = [next(stop for _, stop, _ in found.pieces if stop >= end) for _, end in spans]
                return Answered(found.text, spans, ends, notes + notes_of_text)
            except BadRow as error:
                wrong = error if wrong.kind == "refused" else wrong
        raise wrong

    def headed(self, written: str) -> bool:
        """Whether no header has loss: one has if the template doesn't write it where an answer is asked for.

        Args:
            written: the answer "b", as the template writes it, without what a prompt ends with.
        """
        return "add_generation_prompt" in self.template.everything or written.startswith("b")

    def _options(self, conversation: Conversation) -> tuple[dict[str, Any], Counter]:
        """(what the template is given besides the messages, what it isn't)."""
        takes = self.template.variables
        truth = {"true": True, "false": False}  # as CSV has it
        options = {
            name: truth.get(value.lower(), value) if isinstance(value, str) else value
            for name, value in conversation.more.items() if name in takes
        }  # fmt: skip
        if long := [name for name, value in options.items() if value is None]:
            raise BadRow(
                "not_written", f"column {long[0]}: the template takes it, and it is longer than {LONG} characters"
            )
        unused = Counter(f"columns that the template doesn't take: {n}" for n in conversation.more if n not in takes)
        if conversation.tools:
            options["tools"] = conversation.tools
        if conversation.documents:
            options["documents"] = conversation.documents
        return options, unused

    def _spans(
        self, conversation: Conversation, messages: list[dict[str, Any]], found: Rendered, options: dict[str, Any]
    ) -> list[tuple[int, int]]:
        spans, marks = [], self.template.has_marks
        pieces = found.by_message(found.marked if marks else found.pieces)
        for number, message in enumerate(messages):
            learnt = conversation.learnt[number] if number < len(conversation.learnt) else None
            if message["role"] != "assistant" or number < conversation.prompt or learnt is False:
                continue
            own = pieces.get(number, [])
            if not (own or (marks and NOWHERE in pieces)):
                what = "the template's {% generation %} doesn't mark it" if marks else f"it isn't found; {WAYS_OUT}"
                raise BadRow("refused", f"message {number + 1}, where it is in the text: {what}")
            if not (marks or found.by_content):
                before = messages[number - 1]["role"] if number else ""
                own[0] = (self._begin(found.text, *own[0], number, self._headers(before, options)), own[0][1])
            spans += own
        return sorted(spans + pieces.get(NOWHERE, [])) if marks and spans else spans

    def _begin(self, text: str, begin: int, end: int, number: int, headers: list[str]) -> int:
        """Where the header of an answer ends, and what the assistant wrote begins."""
        piece = text[begin:end]
        for header in headers:
            place = piece.find(header) if number == 0 else len(piece) - len(piece.lstrip())
            if place >= 0 and piece.startswith(header, place):
                return begin + (place + len(header) if header else 0)
        raise BadRow(
            "refused",
            f"message {number + 1} (assistant): it can't be told where it begins, as {piece[:40]!r} doesn't begin with "
            f"{headers[0]!r}, which a prompt ends with; {WAYS_OUT}",
        )

    def _headers(self, before: str, options: dict[str, Any]) -> list[str]:
        """What an answer after a message of that role begins with: as prompts end, and the same without a thought."""
        key = before, json.dumps({name: v for name, v in options.items() if name not in ("tools", "documents")})
        if key not in self.headers:
            whole = self._prompt(before, options) or self._prompt("user", options) or ""
            found = [whole.lstrip(), OPENED.split(whole)[0].lstrip()]
            if "add_generation_prompt" not in self.template.everything:
                found.append("")  # what follows the last message ends the text, and is no header
            # An answer that continues the assistant's turn, after a call's result or another answer, may have none.
            self.headers[key] = list(dict.fromkeys(found + [""] * (before in ("tool", "assistant"))))
        return self.headers[key]

    def _prompt(self, before: str, options: dict[str, Any]) -> str | None:
        """What stands after a message of that role where an answer is asked for; None if the template refuses it."""
        plain = next(self.forms.plain())
        asked = {"tool": self.forms.called, "assistant": lambda *_: plain[:2]}.get(before, lambda *_: plain[:1])
        options = {name: value for name, value in options.items() if name not in ("tools", "documents")}
        content, kind = next(iter(self.forms.calls), ("", dict))
        try:
            arguments = {KEY: VALUE} if kind is dict else json.dumps({KEY: VALUE})
            messages = asked(content, arguments)
            found = next(self.template.rendered(messages, add_generation_prompt=True, **options), None)
        except BadRow:
            return None
        last = max((end for _, end, number in found.pieces if number != NOWHERE), default=None) if found else None
        return None if last is None else found.text[last:]
