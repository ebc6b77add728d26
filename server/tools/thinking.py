"""The thinking at the start of an answer, apart from what it says. Nothing of one is ever told as the other."""

from __future__ import annotations

from collections.abc import Generator

from server.tools.events import Event, Said, Thought, joined
from server.tools.source import BLANK, Source

OPEN, CLOSE = "<think>", "</think>"
MARKS = (OPEN, CLOSE)
_BLANKS = " \t\r\n"


def thinks(template: str) -> bool:
    """Whether a chat template is one of a model that thinks."""
    return OPEN in template or CLOSE in template


class ThoughtReader:
    """Splits one answer. Owns the end of the text that may become a mark, and blanks that a mark may follow."""

    def __init__(self, *, is_open: bool):
        """`is_open`: the prompt ends with the opening mark, so the answer begins inside."""
        self._is_open = is_open
        self._source = Source()
        self._events: list[Event] = []
        self._steps: Generator[None, None, None] = self._read()

    def feed(self, text: str) -> list[Event]:
        """What became certain with this text."""
        self._source.push(text)
        next(self._steps, None)
        return self._taken()

    def finish(self) -> list[Event]:
        """The rest, now that nothing follows."""
        self._source.end()
        for _ in self._steps:
            pass
        return self._taken()

    def _read(self) -> Generator[None, None, None]:
        blank = yield from self._source.run(BLANK)
        is_marked = yield from self._source.has(OPEN)
        if self._is_open or is_marked:
            yield from self._source.run(BLANK)
            yield from self._thoughts()
            yield from self._source.run(BLANK)
        else:
            self._events.append(Said(blank))
        while True:
            self._events.append(Said(self._source.take()))
            self._source.record.clear()
            if self._source.is_over:
                return
            yield

    def _thoughts(self) -> Generator[None, None, None]:
        """Up to the closing mark or the end; the blanks before either belong to neither side."""
        blank = ""
        while True:
            before, mark = self._source.find((CLOSE,))
            self._source.record.clear()
            text = blank + before
            shown = text.rstrip(_BLANKS)
            blank = text[len(shown) :]
            self._events.append(Thought(shown))
            if mark is not None or self._source.is_over:
                return
            yield

    def _taken(self) -> list[Event]:
        events = [event for event in joined(self._events) if not isinstance(event, Said | Thought) or event.text]
        self._events = []
        return events
