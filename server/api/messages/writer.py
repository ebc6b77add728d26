"""A message on the wire, in Anthropic's shape: in one piece, or as events around blocks of content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
from sse_starlette.event import ServerSentEvent

from server.api.answer import Entry, Piece
from server.api.chat import TakenChat
from server.api.failures import anthropic_error
from server.api.tool_writer import new_call_id
from server.api.writer import encode
from server.errors import ServingError
from server.tools.answer import AnswerReader
from server.tools.events import CallBegun, Event, Said, Thought

_PARTS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}


class MessageWriter:
    """Writes one message. Owns its blocks, the text of the one that is open, and the reader of the answer."""

    def __init__(self, taken: TakenChat, model: str):
        self._answer = taken.answer
        self._reading = taken.reading
        self._reader = AnswerReader(taken.reading)
        self._message = {"id": taken.answer.id, "type": "message", "role": "assistant", "model": model}
        self._blocks: list[dict[str, Any]] = []
        self._open = ""  # type of the open block
        self._texts: list[str] = []
        self._told: list[bytes] = []
        self._num_tokens = 0
        self._ending: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def opening(self) -> list[bytes]:
        """The message as it begins; what the prefix cache answered is told at the end."""
        usage = {**_usage(len(self._answer.prompts[0].ids), 0), "output_tokens": 0}
        self._tell("message_start", message={**self._message, "content": [], **self._ending, "usage": usage})
        self._tell("ping")
        return [self._taken()]

    def event(self, piece: Piece) -> bytes:
        """The events of a piece."""
        self.read(piece)
        return self._taken()

    def closing(self) -> list[bytes]:
        """Why the message ended, and that it did."""
        self._tell("message_delta", delta=self._ending, usage=self._usage())
        self._tell("message_stop")
        return [self._taken()]

    def failure(self, error: ServingError) -> bytes:
        """The error, which is the last event."""
        return b"event: error\ndata: " + encode(anthropic_error(error)) + b"\n\n"

    def keep_alive(self) -> ServerSentEvent:
        """An event that says nothing."""
        return ServerSentEvent(event="ping", data='{"type":"ping"}', sep="\n")

    def choice(self, index: int, text: str, entries: Sequence[Entry] | None, finish_reason: str) -> None:
        """Nothing more: all of it has been read."""

    def whole(self, choices: list[Any]) -> bytes:
        """The message. A call that was cut short is left out: its input is no object."""
        content = [block for block in self._blocks if block["type"] != "tool_use" or block["input"] is not None]
        return encode({**self._message, "content": content, **self._ending, "usage": self._usage()})

    def read(self, piece: Piece) -> None:
        """More of the answer."""
        self._num_tokens = piece.num_tokens
        events = self._reader.feed(piece.text)
        if piece.finish_reason is not None:
            events += self._reader.finish()
        for event in events:
            self._add(event)
        if piece.finish_reason is not None:
            self._close()
            self._ending = self._why(piece.finish_reason)

    def _why(self, finish_reason: str) -> dict[str, Any]:
        stopped_by = self._answer.choices[0].stopped_by
        if stopped_by is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": stopped_by}
        if finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        reason = "tool_use" if self._reader.num_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}

    def _add(self, event: Event) -> None:
        if isinstance(event, CallBegun):
            self._begin({"type": "tool_use", "id": new_call_id(self._reading), "name": event.name, "input": {}})
            return
        if isinstance(event, Said | Thought):
            if not event.text:
                return
            kind = "text" if isinstance(event, Said) else "thinking"
            if self._open != kind:
                self._begin({"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {}))
            delta, name = _PARTS[kind]
        else:
            delta, name = "input_json_delta", "partial_json"
        self._texts.append(event.text)
        self._tell("content_block_delta", index=len(self._blocks) - 1, delta={"type": delta, name: event.text})

    def _begin(self, block: dict[str, Any]) -> None:
        self._close()
        self._open = block["type"]
        self._blocks.append(block)
        self._tell("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _close(self) -> None:
        """End the open block, with all of its text in its place."""
        if not self._open:
            return
        block, text = self._blocks[-1], "".join(self._texts)
        if self._open == "tool_use":
            block["input"] = _object(text)
        else:
            block[self._open] = text
        self._tell("content_block_stop", index=len(self._blocks) - 1)
        self._open, self._texts = "", []

    def _usage(self) -> dict[str, int]:
        usage = replace(self._answer.usage(), num_answer=self._num_tokens)
        return {**_usage(usage.num_prompt, usage.num_cached), "output_tokens": usage.num_answer}

    def _tell(self, kind: str, **fields: Any) -> None:
        """Write an event; an answer in one piece has none."""
        if self._answer.order.is_stream:
            self._told.append(b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, **fields}) + b"\n\n")

    def _taken(self) -> bytes:
        told = b"".join(self._told)
        self._told.clear()
        return told


def _usage(num_prompt: int, num_cached: int) -> dict[str, int]:
    """Tokens of a prompt; those that the prefix cache answered are counted apart."""
    return {
        "input_tokens": num_prompt - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
    }


def _object(text: str) -> dict[str, Any] | None:
    """The input of a call; None if it was cut short."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
