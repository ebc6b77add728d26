"""Chat answers in which there may be calls of tools or thinking: the text is read, and each part told in its place."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from typing import Any

from server.api.answer import Answer, Entry, Piece
from server.api.writer import ChatWriter, encode
from server.detokenize import TokenText
from server.tools.answer import AnswerReader, Reading
from server.tools.events import CallBegun, Event, Said, Thought, joined

_ID_LETTERS = string.ascii_letters + string.digits
_SHORT_ID = 9
"""Letters of a call's id where templates take no other."""


def chat_writer(answer: Answer, model: str, text: TokenText, reading: Reading) -> ChatWriter:
    """Who writes the answers to a conversation."""
    if reading.is_plain:
        return ChatWriter(answer, model, text)
    return ReadingWriter(answer, model, text, reading)


class ReadingWriter(ChatWriter):
    """Whole answers and chunks with calls and thinking. Owns a reader for each choice, and what it found."""

    def __init__(self, answer: Answer, model: str, text: TokenText, reading: Reading):
        super().__init__(answer, model, text)
        self._readers = [AnswerReader(reading) for _ in answer.choices]
        self._reading = reading
        self._read: list[list[Event]] = [[] for _ in answer.choices]  # of answers that are sent whole
        self._num_read = [0] * len(answer.choices)

    def opening(self) -> list[bytes]:
        """The role of each choice; there may be no content at all."""
        return self._role_chunks(b'{"role":"assistant"}')

    def event(self, piece: Piece) -> bytes:
        """A chunk for each part of the piece; log-probabilities and ids go with the first."""
        self._num_tokens[piece.index] = piece.num_tokens
        reader = self._readers[piece.index]
        events = reader.feed(piece.text)
        if piece.finish_reason is not None:
            events += reader.finish()
        deltas = [encode(self._delta(event)) for event in events]
        if (piece.entries or piece.tokens) and not deltas:
            deltas = [b"{}"]
        chunks = b""
        logprobs = b"null" if piece.entries is None else encode(self._logprobs(piece.entries))
        ids = self._new_ids(piece)
        for delta in deltas:
            fields = (piece.index, delta, logprobs, ids)
            choice = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null%b}' % fields
            chunks += self._chunk(choice, is_last=False)
            logprobs, ids = b"null", b""
        if piece.finish_reason is not None:
            reason = encode(_reason(piece.finish_reason, reader))
            chunks += self._chunk(self.end(piece.index, reason), is_last=True)
        return chunks

    def read(self, piece: Piece) -> None:
        """Read what has come."""
        self._read[piece.index] += self._readers[piece.index].feed(piece.text)
        self._num_read[piece.index] += len(piece.text)

    def choice(self, index: int, text: str, entries: Sequence[Entry] | None, finish_reason: str) -> dict[str, Any]:
        """A message, of the same parts."""
        reader = self._readers[index]
        said, thought = "", ""
        calls: list[dict[str, Any]] = []
        rest = reader.feed(text[self._num_read[index] :])
        for event in joined([*self._read[index], *rest, *reader.finish()]):
            if isinstance(event, Said):
                said += event.text
            elif isinstance(event, Thought):
                thought += event.text
            elif isinstance(event, CallBegun):
                calls.append({"id": new_call_id(self._reading), "type": "function", "function": _function(event.name)})
            else:
                calls[-1]["function"]["arguments"] += event.text
        message: dict[str, Any] = {"role": "assistant", "content": said or None, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": None if entries is None else self._logprobs(entries),
            "finish_reason": _reason(finish_reason, reader),
        }

    def _delta(self, event: Event) -> dict[str, Any]:
        if isinstance(event, Said):
            return {"content": event.text}
        if isinstance(event, Thought):
            return {"reasoning_content": event.text}
        if isinstance(event, CallBegun):
            call = {"id": new_call_id(self._reading), "type": "function", "function": _function(event.name)}
            return {"tool_calls": [{"index": event.index, **call}]}
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}


def new_call_id(reading: Reading) -> str:
    """The id of a call; in the form that the templates of its family take."""
    if reading.family == "mistral":
        return "".join(secrets.choice(_ID_LETTERS) for _ in range(_SHORT_ID))
    return f"call_{secrets.token_hex(12)}"


def _function(name: str) -> dict[str, str]:
    """A called function without arguments yet."""
    return {"name": name, "arguments": ""}


def _reason(finish_reason: str, reader: AnswerReader) -> str:
    return "tool_calls" if finish_reason == "stop" and reader.num_calls else finish_reason
