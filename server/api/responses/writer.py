"""A response on the wire: in one piece, or as events, each with its number."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sse_starlette.event import ServerSentEvent

from server.api.answer import Entry, Piece
from server.api.chat import TakenChat
from server.api.failures import error_object
from server.api.responses.objects import (
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    INCOMPLETE,
    Item,
    State,
    response_object,
    usage_object,
)
from server.api.responses.output import Output
from server.api.tool_writer import new_call_id
from server.api.writer import encode, token_logprobs
from server.detokenize import TokenText
from server.errors import Overloaded, ServingError
from server.tools.answer import AnswerReader

Keep = Callable[[bytes, Sequence[Item]], None]
"""Takes a response that has ended, and its output."""


class ResponseWriter:
    """Writes one response. Owns its output, the reader of its text and the numbers of its events."""

    def __init__(self, taken: TakenChat, frame: dict[str, Any], text: TokenText, keep: Keep):
        self._answer = taken.answer
        self._frame = frame
        self._text = text
        self._keep = keep
        self._reader = AnswerReader(taken.reading)
        self._output = Output(self._tell, lambda: new_call_id(taken.reading))
        self._told: list[bytes] = []
        self._num_told = 0
        self._num_tokens = 0
        self._status = IN_PROGRESS

    def opening(self) -> list[bytes]:
        """The response as it begins."""
        response = response_object(self._frame, State(IN_PROGRESS))
        self._tell("response.created", response=response)
        self._tell("response.in_progress", response=response)
        return [self._taken()]

    def event(self, piece: Piece) -> bytes:
        """The events of a piece."""
        self.read(piece)
        return self._taken()

    def closing(self) -> list[bytes]:
        """The whole response, which is kept from here on."""
        self._tell(f"response.{self._status}", response=self._ended())
        return [self._taken()]

    def failure(self, error: ServingError) -> bytes:
        """The response as it failed; it is not kept."""
        self._told.clear()
        self._output.drop_open()
        code = "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error"
        told = {"code": code, "message": error_object(error)["message"]}
        response = response_object(self._frame, State(FAILED, self._output.items, None, told))
        self._tell("response.failed", response=response)
        return self._taken()

    def keep_alive(self) -> ServerSentEvent:
        """A comment."""
        return ServerSentEvent(comment="keep-alive", sep="\n")

    def choice(self, index: int, text: str, entries: Sequence[Entry] | None, finish_reason: str) -> None:
        """Nothing more: all of it has been read."""

    def whole(self, choices: list[Any]) -> bytes:
        """The response, which is kept from here on."""
        return encode(self._ended())

    def read(self, piece: Piece) -> None:
        """More of the answer."""
        self._num_tokens = piece.num_tokens
        events = self._reader.feed(piece.text)
        if piece.finish_reason is not None:
            events += self._reader.finish()
        logprobs = token_logprobs(piece.entries, self._text) if piece.entries else []
        for event in events:
            self._output.add(event, logprobs)
            logprobs = []
        if piece.finish_reason is not None:
            self._status = INCOMPLETE if piece.finish_reason == "length" else COMPLETED
            self._output.end(self._status)

    def _ended(self) -> dict[str, Any]:
        usage = usage_object(replace(self._answer.usage(), num_answer=self._num_tokens))
        completed_at = int(time.time()) if self._status == COMPLETED else None
        response = response_object(self._frame, State(self._status, self._output.items, usage, None, completed_at))
        self._keep(encode(response), self._output.items)
        return response

    def _tell(self, kind: str, **fields: Any) -> None:
        """Write an event; an answer in one piece has none."""
        if self._answer.order.is_stream:
            event = encode({"type": kind, "sequence_number": self._num_told, **fields})
            self._told.append(b"event: " + kind.encode() + b"\ndata: " + event + b"\n\n")
            self._num_told += 1

    def _taken(self) -> bytes:
        told = b"".join(self._told)
        self._told.clear()
        return told
