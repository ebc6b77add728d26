"""How the text of one answer is read: its thinking, its content, its calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.tools.events import Event, Said, Thought, joined
from server.tools.families import FAMILIES, MARKS
from server.tools.thinking import MARKS as THINKING_MARKS
from server.tools.thinking import ThoughtReader


@dataclass(frozen=True, slots=True)
class Reading:
    """What is to be found in the answers to one request."""

    family: str = ""
    """Whose calls are looked for; empty is none's."""
    names: frozenset[str] = frozenset()
    """Tools that may be called."""
    is_bound: bool = False
    """A grammar lets the answer be calls and nothing else; thinking may come first."""
    splits_thinking: bool = False
    starts_thinking: bool = False
    """The prompt has opened the thinking."""
    shows_thinking: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether an answer is all content."""
        return not self.family and not self.splits_thinking

    @property
    def marks(self) -> frozenset[str]:
        """Names of tokens that have to be seen in the text even where they are special ones."""
        marks = set(MARKS[self.family]) if self.family else set()
        return frozenset(marks | set(THINKING_MARKS)) if self.splits_thinking else frozenset(marks)


class AnswerReader:
    """Reads one answer as it comes; what it tells does not depend on the pieces. Owns its two readers."""

    def __init__(self, reading: Reading):
        self._thoughts = ThoughtReader(is_open=reading.starts_thinking) if reading.splits_thinking else None
        self._tools = FAMILIES[reading.family](reading.names, is_bound=reading.is_bound) if reading.family else None
        self._is_bound = reading.is_bound
        self._shows_thinking = reading.shows_thinking

    @property
    def num_calls(self) -> int:
        """Calls so far."""
        return self._tools.num_calls if self._tools is not None else 0

    def feed(self, text: str) -> list[Event]:
        """What became certain with this text."""
        first: list[Event] = [Said(text)] if self._thoughts is None else self._thoughts.feed(text)
        return joined([*self._second(first)])

    def finish(self) -> list[Event]:
        """The rest, now that nothing follows."""
        first = [] if self._thoughts is None else self._thoughts.finish()
        if self._is_bound:  # a mark of thinking that was cut is no content
            first = [event for event in first if not isinstance(event, Said)]
        events = [*self._second(first)]
        if self._tools is not None:
            events += self._tools.finish()
        return joined(events)

    def _second(self, events: Iterable[Event]) -> Iterable[Event]:
        for event in events:
            if isinstance(event, Thought):
                if self._shows_thinking:
                    yield event
            elif isinstance(event, Said) and self._tools is not None:
                yield from self._tools.feed(event.text)
            else:
                yield event
