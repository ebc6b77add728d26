"""What an answer's text turns out to be, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the reader: `content`."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the model's thinking: `reasoning_content`."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a tool; its arguments follow. `index` counts the calls of one answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """More of the arguments of a call, as JSON text."""

    index: int
    text: str


Event = Said | Thought | CallBegun | Argued


def joined(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbours of one kind as one."""
    out: list[Event] = []
    for _, group in groupby(events, key=_kind):
        first, *others = group
        if others and not isinstance(first, CallBegun):
            text = "".join(event.text for event in (first, *others) if not isinstance(event, CallBegun))
            out.append(replace(first, text=text))
        else:
            out += [first, *others]
    return out


def _kind(event: Event) -> tuple[type, int]:
    return type(event), event.index if isinstance(event, Argued) else 0
