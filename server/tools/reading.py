"""Calls of tools out of the text of an answer: what all families of models have in common.

A call is told as soon as it is certain: its name is that of a tool of the request, and its arguments begin. Up to there
a text that only looks like a call is content, whole. What breaks off later leaves a call with the arguments so far, and
the rest is content. So no letter is lost but the marks and blanks around calls. An answer that is bound to be calls can
only break off because it was cut: there what is unfinished is no content, but marks that the client never asked to see.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator

from server.tools.events import Argued, CallBegun, Event, Said, joined
from server.tools.source import BLANK, Broken, JsonReading, Source, Waiting

_BLANKS = " \t\r\n"
_KEYS = frozenset({"name", "arguments", "parameters", "type", "id"})
"""Of an object that is a call. An answer in JSON has others, and is not held back until it ends."""
_ARGUMENTS = ("arguments", "parameters")


class ToolReader(ABC):
    """Reads the calls of one answer. Owns what is not certain yet, and the count of calls."""

    openings: tuple[str, ...]
    """Texts with which calls begin."""
    needs_arguments = False
    """Whether an object without arguments is no call: where no mark stands before it."""

    def __init__(self, names: frozenset[str], *, is_bound: bool = False):
        """`names` are those of the tools that may be called; `is_bound`: a grammar lets the answer be nothing else."""
        self.num_calls = 0
        self._is_bound = is_bound
        self._names = names
        self._source = Source()
        self._json = JsonReading(self._source)
        self._events: list[Event] = []
        self._blank = ""  # the end of the content, which is dropped if a call follows
        self._is_behind_call = False
        self._is_in_arguments = False
        self._steps: Generator[None, None, None] = self._read()

    def feed(self, text: str) -> list[Event]:
        """What became certain with this text."""
        self._source.push(text)
        next(self._steps, None)
        self._tell_arguments()
        return self._taken()

    def finish(self) -> list[Event]:
        """The rest, now that nothing follows."""
        self._source.end()
        for _ in self._steps:
            pass
        if self._blank and not self._is_behind_call and not self._is_bound:
            self._events.append(Said(self._blank))
        self._blank = ""
        return self._taken()

    @abstractmethod
    def _calls(self, opening: str) -> Waiting[None]:
        """Read the calls behind an opening, and what closes them. Raises Broken."""

    def _first(self) -> Waiting[None]:
        """Read what may stand at the start of an answer only."""
        yield from ()

    def _read(self) -> Generator[None, None, None]:
        yield from self._first()
        while not self._source.is_over:
            self._source.record.clear()
            before, opening = self._source.find(self.openings)
            self._say(before)
            if opening is not None:
                self._source.record[:] = [opening]
                yield from self._try(lambda: self._calls(opening))  # noqa: B023 (called at once)
            elif not self._source.is_over:
                yield

    def _try(self, read: Callable[[], Waiting[None]]) -> Waiting[None]:
        """Read calls; what is none is content."""
        try:
            yield from read()
        except Broken:
            self._end_arguments()
            self._say("".join(self._source.record))
        self._source.record.clear()

    def _object(self) -> Waiting[None]:
        """Read {"name": ..., "arguments": ...}, in any order. Raises Broken."""
        name, early = "", ""
        has_arguments = False
        yield from self._source.expect("{")
        while True:
            key = yield from self._key()
            if key not in _KEYS:
                raise Broken
            if key == "name" and not name:
                name = yield from self._name()
                if early:
                    self._whole_call(name, early)
            elif key in _ARGUMENTS and not has_arguments:
                has_arguments = True
                if name:
                    yield from self._arguments(name)
                else:
                    early = yield from self._early()
            else:
                yield from self._json.value()
                self._json.take()
            yield from self._blanks()
            if (yield from self._source.has("}")):
                break
            yield from self._source.expect(",")
        if not name or (self.needs_arguments and not has_arguments):
            raise Broken
        if not has_arguments:
            self._whole_call(name, "{}")
        self._source.record.clear()

    def _key(self) -> Waiting[str]:
        """The name of a field, and what stands before its value."""
        yield from self._blanks()
        key = yield from self._string()
        yield from self._blanks()
        yield from self._source.expect(":")
        yield from self._blanks()
        return key

    def _string(self) -> Waiting[str]:
        yield from self._json.text()
        return str(json.loads(self._json.take()))

    def _name(self) -> Waiting[str]:
        name = yield from self._string()
        return self._known(name)

    def _known(self, name: str) -> str:
        """`name`, if there is such a tool. Raises Broken."""
        if name not in self._names:
            raise Broken
        return name

    def _early(self) -> Waiting[str]:
        """Arguments that come before the name."""
        yield from self._open_object()
        yield from self._json.value()
        return self._json.take()

    def _arguments(self, name: str) -> Waiting[None]:
        """Read the arguments of a call: it is certain when they begin. Raises Broken."""
        yield from self._open_object()
        self._begin(name)
        self._is_in_arguments = True
        yield from self._json.value()
        self._end_arguments()

    def _open_object(self) -> Waiting[None]:
        if (yield from self._source.peek()) != "{":
            raise Broken
        self._json.take()

    def _blanks(self) -> Waiting[None]:
        yield from self._source.run(BLANK)

    def _whole_call(self, name: str, arguments: str) -> None:
        self._begin(name)
        self._events.append(Argued(self.num_calls - 1, arguments))
        self._source.record.clear()

    def _begin(self, name: str) -> None:
        """Tell a call. The blanks around it are no content."""
        self._events.append(CallBegun(self.num_calls, name))
        self.num_calls += 1
        self._source.record.clear()
        self._blank = ""
        self._is_behind_call = True

    def _end_arguments(self) -> None:
        self._tell_arguments()
        self._is_in_arguments = False

    def _tell_arguments(self) -> None:
        """Tell the arguments as far as they have come."""
        if self._is_in_arguments and (text := self._json.take()):
            self._events.append(Argued(self.num_calls - 1, text))
            self._source.record.clear()

    def _say(self, text: str) -> None:
        """Tell content, but for the blanks at its end, and for what was cut where there is no content."""
        if self._is_bound and self._source.has_ended:
            return  # at the end only a head or a mark is left unread
        text = self._blank + text
        shown = text.rstrip(_BLANKS)
        self._blank = text[len(shown) :]
        if shown:
            self._events.append(Said(shown.lstrip(_BLANKS) if self._is_behind_call else shown))
            self._is_behind_call = False

    def _taken(self) -> list[Event]:
        events = joined(self._events)
        self._events = []
        return events
