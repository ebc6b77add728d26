"""A text that comes in pieces, read by a program that may wait anywhere for more of it.

Readers are generators: `yield` means "nothing more can be said before more text comes". What they decide hangs on the
text alone and never on where it was cut, because each decision looks at as much text as it needs and waits for it.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")
Waiting = Generator[None, None, Result]
"""A step of reading: yields while it waits for text, and returns what it found."""

BLANK = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_WORD = re.compile(r"[-+.0-9a-zA-Z]+")
_VALUE = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_HEX = re.compile(r"[0-9a-fA-F]")
_MAX_WORD = 1000
"""Letters of one number."""
_MAX_DEPTH = 64
"""As of a request's body: a client that sends the call back may not go deeper."""


class Broken(Exception):
    """What is read is not what it began as; the letter at fault is still unread."""


class Source:
    """The text of one answer. Owns what has come and is not read yet, and a record of what was read."""

    def __init__(self) -> None:
        self.record: list[str] = []
        """What was taken since it was last emptied."""
        self._text = ""
        self._start = 0  # of what is not read
        self._has_ended = False

    def push(self, text: str) -> None:
        """More text."""
        self._text = self._text[self._start :] + text
        self._start = 0

    def end(self) -> None:
        """No more text comes."""
        self._has_ended = True

    @property
    def has_ended(self) -> bool:
        """Whether all text has come."""
        return self._has_ended

    @property
    def is_over(self) -> bool:
        """Whether all text has come and was read."""
        return self._has_ended and self._start == len(self._text)

    def take(self, size: int | None = None) -> str:
        """Read so many letters, which are there, or all."""
        end = len(self._text) if size is None else self._start + size
        taken = self._text[self._start : end]
        self._start = end
        self.record.append(taken)
        return taken

    def peek(self) -> Waiting[str]:
        """The next letter, unread; empty at the end."""
        while self._start == len(self._text) and not self._has_ended:
            yield
        return self._text[self._start : self._start + 1]

    def some(self, pattern: re.Pattern[str], most: int = 2**62) -> str:
        """Read what matches `pattern` in the text that has come."""
        found = pattern.match(self._text, self._start, self._start + most)
        return self.take(found.end() - self._start) if found is not None else ""

    def run(self, pattern: re.Pattern[str], most: int = 2**62) -> Waiting[str]:
        """Read what matches `pattern`, which matches letter by letter, and no more letters than `most`."""
        parts: list[str] = []
        while most and (yield from self.peek()):
            part = self.some(pattern, most)
            if not part:
                break
            parts.append(part)
            most -= len(part)
        return "".join(parts)

    def has(self, mark: str) -> Waiting[bool]:
        """Read `mark` if it comes next."""
        while not self._has_ended:
            num_there = len(self._text) - self._start
            if num_there >= len(mark) or not self._text.startswith(mark[:num_there], self._start):
                break
            yield
        if not self._text.startswith(mark, self._start):
            return False
        self.take(len(mark))
        return True

    def expect(self, mark: str) -> Waiting[None]:
        """Read `mark`. Raises Broken."""
        if not (yield from self.has(mark)):
            raise Broken

    def find(self, marks: tuple[str, ...]) -> tuple[str, str | None]:
        """Read up to the first of `marks`: the text before it, and the mark, which is read too.

        None as long as there is no mark: then all text is read but an end that may become one.
        """
        places = [(place, -len(mark), mark) for mark in marks if (place := self._text.find(mark, self._start)) >= 0]
        if places:
            place, _, mark = min(places)
            before = self.take(place - self._start)
            self.take(len(mark))
            return before, mark
        num_there = len(self._text) - self._start
        longest = 0 if self._has_ended else min(max(map(len, marks)) - 1, num_there)
        for size in range(longest, 0, -1):
            if any(mark.startswith(self._text[-size:]) for mark in marks):
                return self.take(num_there - size), None
        return self.take(), None


class JsonReading:
    """Reads one JSON value and tells its text as it comes. Owns the text that nobody has taken yet."""

    def __init__(self, source: Source):
        self._source = source
        self._parts: list[str] = []

    def take(self) -> str:
        """The text since the last time."""
        text = "".join(self._parts)
        self._parts.clear()
        return text

    def value(self) -> Waiting[None]:
        """One value, without blanks around it. Raises Broken where it is none."""
        closers: list[str] = []
        while True:
            opened = yield from self._begin()
            if opened:
                closers.append("}" if opened == "{" else "]")
                if len(closers) > _MAX_DEPTH:
                    raise Broken
                yield from self._blank()
                if (yield from self._source.peek()) != closers[-1]:
                    yield from self._key(closers)
                    continue
            yield from self._close(closers)
            if not closers:
                return
            yield from self._letter(",")
            yield from self._blank()
            yield from self._key(closers)

    def text(self) -> Waiting[None]:
        """One string. Raises Broken where it is none."""
        yield from self._letter('"')
        while True:
            yield from self._plain()
            letter = yield from self._source.peek()
            if letter == '"':
                self._parts.append(self._source.take(1))
                return
            yield from self._letter("\\")  # a control character, or the end, breaks it
            letter = yield from self._source.peek()
            if not letter or letter not in '"\\/bfnrtu':
                raise Broken
            self._parts.append(self._source.take(1))
            for _ in range(4 if letter == "u" else 0):
                if not _HEX.match((yield from self._source.peek())):
                    raise Broken
                self._parts.append(self._source.take(1))

    def _plain(self) -> Waiting[None]:
        """Letters that need no thought; given out as they come, so a long string is not held back."""
        while (yield from self._source.peek()):
            part = self._source.some(_PLAIN)
            if not part:
                return
            self._parts.append(part)

    def _begin(self) -> Waiting[str]:
        """A whole simple value, or the bracket that opens another."""
        letter = yield from self._source.peek()
        if letter and letter in "{[":
            self._parts.append(self._source.take(1))
            return letter
        if letter == '"':
            yield from self.text()
        else:
            word = yield from self._source.run(_WORD, _MAX_WORD)
            self._parts.append(word)
            if not _VALUE.fullmatch(word):
                raise Broken
        return ""

    def _close(self, closers: list[str]) -> Waiting[None]:
        """Blanks and every bracket that closes here; a comma is left unread."""
        while closers:
            yield from self._blank()
            letter = yield from self._source.peek()
            if letter == ",":
                return
            yield from self._letter(closers.pop())

    def _key(self, closers: list[str]) -> Waiting[None]:
        """The name of a field, if an object is open."""
        if closers[-1] == "}":
            yield from self.text()
            yield from self._blank()
            yield from self._letter(":")
            yield from self._blank()

    def _letter(self, letter: str) -> Waiting[None]:
        yield from self._source.expect(letter)
        self._parts.append(letter)

    def _blank(self) -> Waiting[None]:
        self._parts.append((yield from self._source.run(BLANK)))
