"""What an answer's text turns out to be, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass


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


def joined(events: list[Event]) -> list[Event]:
    """The same events with neighbours of one kind as one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Said) and isinstance(last, Said):
            out[-1] = Said(last.text + event.text)
        elif isinstance(event, Thought) and isinstance(last, Thought):
            out[-1] = Thought(last.text + event.text)
        elif isinstance(event, Argued) and isinstance(last, Argued) and event.index == last.index:
            out[-1] = Argued(event.index, last.text + event.text)
        else:
            out.append(event)
    return out
