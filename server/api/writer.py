"""The words on the wire: chunks of a stream and whole answers, as JSON bytes, in the shapes of OpenAI.

The fixed parts of a chunk are encoded once per answer; a chunk costs one string encode.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from sse_starlette.event import ServerSentEvent

from server.api.answer import Answer, Entry, Piece, Usage
from server.api.failures import error_body
from server.detokenize import TokenText
from server.errors import ServingError
from server.messages import SpeculationRecord, TokenLogprob

encode = msgspec.json.encode
PADDED_BYTES = 256
"""Chunks with `obfuscation` have a multiple of so many bytes: one with a word and one with a letter look alike."""
_PADDING = b',"obfuscation":"'
LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""
_DONE = b"data: [DONE]\n\n"


def usage_object(usage: Usage) -> dict[str, Any]:
    """The `usage` of an answer."""
    value: dict[str, Any] = {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_answer,
        "total_tokens": usage.num_prompt + usage.num_answer,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached},
    }
    if usage.predicted is not None:
        value["completion_tokens_details"] = {
            "accepted_prediction_tokens": usage.predicted.num_accepted,
            "rejected_prediction_tokens": usage.predicted.num_rejected,
        }
    return value


_NO_RECORD = SpeculationRecord(num_steps=0, num_draft_tokens=0, num_accepted_tokens=0, histogram=())


def metrics_object(record: SpeculationRecord | None, max_nodes: int) -> dict[str, Any]:
    """The `metrics` of an answer: speculative decoding, in the format that vLLM set."""
    record = record or _NO_RECORD
    steps, drafted, accepted = record.num_steps, record.num_draft_tokens, record.num_accepted_tokens
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1.0 + accepted / steps if steps else 1.0,
            "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "acceptance_histogram": list(record.histogram),
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
            "num_spec_tokens": max_nodes - 1,  # vLLM's name for the bound, not a count
        }
    }


class Writer(ABC):
    """Writes one answer. Owns the encoded fixed parts of its chunks."""

    object_name: str
    chunk_name: str

    def __init__(self, answer: Answer, model: str, text: TokenText):
        self._answer = answer
        self._text = text
        self._fixed = {"id": answer.id, "created": int(time.time()), "model": model}
        head = encode({**self._fixed, "object": self.chunk_name})[:-1]
        self._head = b"data: " + head + b',"choices":['
        self._num_tokens = [0] * len(answer.choices)
        telling = answer.order.telling
        self._has_ids, self._is_padded = telling.has_token_ids, telling.is_padded
        self._name: Callable[[int], str] = _id_name if telling.names_are_ids else text.name
        self._no_usage = b',"usage":null' if answer.order.includes_usage else b""

    def opening(self) -> list[bytes]:
        """Events that need no token."""
        return []

    def event(self, piece: Piece) -> bytes:
        """The chunks of a piece. The reason why a choice ended has a chunk of its own, behind all of the text."""
        self._num_tokens[piece.index] = piece.num_tokens
        chunks = b""
        if piece.text or piece.entries or piece.tokens or piece.finish_reason is None:
            chunks = self._chunk(self.delta(piece), is_last=False)
        if piece.finish_reason is not None:
            chunks += self._chunk(self.end(piece.index, encode(piece.finish_reason)), is_last=True)
        return chunks

    @abstractmethod
    def delta(self, piece: Piece) -> bytes:
        """The encoded choice of a chunk that carries text."""

    @abstractmethod
    def end(self, index: int, reason: bytes) -> bytes:
        """The encoded choice of a chunk that tells why it ended."""

    def read(self, piece: Piece) -> None:
        """Look at a piece of an answer that is sent whole: what takes time is done as it comes, not at the end."""

    @abstractmethod
    def choice(self, index: int, text: str, entries: Sequence[Entry] | None, finish_reason: str) -> dict[str, Any]:
        """One choice of a whole answer."""

    def closing(self) -> list[bytes]:
        """The usage event, if it was asked for, and the end."""
        if not self._answer.order.includes_usage:
            return [_DONE]
        return [self._head + b"]" + b',"usage":' + self._usage() + self._metrics() + b"}\n\n", _DONE]

    def failure(self, error: ServingError) -> bytes:
        """The error event, and the end."""
        return b"data: " + error_body(error) + b"\n\n" + _DONE

    def keep_alive(self) -> ServerSentEvent:
        """A comment."""
        return ServerSentEvent(comment="keep-alive", sep="\n")

    def whole(self, choices: list[dict[str, Any]]) -> bytes:
        """The body of an answer that is not streamed."""
        for choice in choices:
            choice.update(self.more_of_choice(choice["index"]))
        value = {**self._fixed, "object": self.object_name, "choices": choices, **self.more_of_answer()}
        value["usage"] = usage_object(self._answer.usage())
        if self._answer.order.wants_metrics:
            value["metrics"] = metrics_object(self._answer.record(), self._answer.order.speculation.max_nodes)
        return encode(value)

    def more_of_choice(self, index: int) -> dict[str, Any]:
        """What a whole choice tells beside its text, for those who asked."""
        return {"token_ids": self._answer.choices[index].token_ids} if self._has_ids else {}

    def more_of_answer(self) -> dict[str, Any]:
        """What a whole answer tells beside its choices, for those who asked."""
        return {}

    def prompt_ids(self, index: int) -> tuple[int, ...]:
        """The prompt of a choice."""
        return self._answer.choices[index].submit.prompt

    def prompt_logprobs(self, index: int) -> list[dict[str, Any] | None]:
        """One object for each token of a choice's prompt, by token id; the first token has none."""
        prompt, scores = self.prompt_ids(index), self._answer.choices[index].scores.logprobs
        found: list[dict[str, Any] | None] = [None]
        for token, scored in zip(prompt[1:], scores, strict=True):
            ranked = {str(token): self._ranked(token, scored.logprob, scored.rank)}
            for rank, top in enumerate(scored.top, 1):
                ranked.setdefault(str(top.token), self._ranked(top.token, top.logprob, rank))
            found.append(ranked)
        return found

    def _ranked(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": self._text.name(token)}

    def _new_ids(self, piece: Piece) -> bytes:
        """The ids of a piece, as a field of an encoded choice."""
        return b',"token_ids":' + encode(piece.tokens) if self._has_ids else b""

    def _chunk(self, choice: bytes, *, is_last: bool, more: bytes = b"") -> bytes:
        """A chunk around one encoded choice, with `more` encoded fields at its root."""
        order = self._answer.order
        tail = more + self._no_usage
        if order.has_continuous_usage:
            tail = more + b',"usage":' + self._usage()
        if is_last and not order.includes_usage:
            tail += self._metrics()
        chunk = self._head + choice + b"]" + tail
        return (padded(chunk) if self._is_padded else chunk) + b"}\n\n"

    def _usage(self) -> bytes:
        """Counts up to the chunk that carries them: more may have been won, and wait to be sent."""
        return encode(usage_object(replace(self._answer.usage(), num_answer=sum(self._num_tokens))))

    def _metrics(self) -> bytes:
        if not self._answer.order.wants_metrics:
            return b""
        return b',"metrics":' + encode(metrics_object(self._answer.record(), self._answer.order.speculation.max_nodes))


class ChatWriter(Writer):
    """chat.completion and chat.completion.chunk."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def opening(self) -> list[bytes]:
        """The role of each choice."""
        return self._role_chunks(b'{"role":"assistant","content":""}')

    def _role_chunks(self, delta: bytes) -> list[bytes]:
        """The first chunk of each choice, and the ids of the prompt."""
        role = b',"delta":' + delta + b',"logprobs":null,"finish_reason":null}'
        more = b',"prompt_token_ids":' + encode(self.prompt_ids(0)) if self._has_ids else b""
        return [
            self._chunk(b'{"index":%d' % choice.index + role, is_last=False, more=more)
            for choice in self._answer.choices
        ]

    def more_of_answer(self) -> dict[str, Any]:
        """What is told of the one prompt."""
        more: dict[str, Any] = {"prompt_token_ids": self.prompt_ids(0)} if self._has_ids else {}
        if self._answer.order.telling.num_prompt_logprobs >= 0:
            more["prompt_logprobs"] = self.prompt_logprobs(0)
        return more

    def delta(self, piece: Piece) -> bytes:
        """What is new in the message."""
        delta = b'{"content":' + encode(piece.text) + b"}" if piece.text else b"{}"
        logprobs = b"null" if piece.entries is None else encode(self._logprobs(piece.entries))
        ids = self._new_ids(piece)
        return b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null%b}' % (piece.index, delta, logprobs, ids)

    def end(self, index: int, reason: bytes) -> bytes:
        """Nothing new."""
        return b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}' % (index, reason)

    def choice(self, index: int, text: str, entries: Sequence[Entry] | None, finish_reason: str) -> dict[str, Any]:
        """A message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if entries is None else self._logprobs(entries),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {"content": token_logprobs(entries, self._text, self._name), "refusal": None}


def token_logprobs(
    entries: Sequence[Entry], text: TokenText, name: Callable[[int], str] | None = None
) -> list[dict[str, Any]]:
    """Tokens of a chat's answer with their log-probabilities, as chat and responses tell them."""
    named = name or text.name

    def alternative(token: int, logprob: float) -> dict[str, Any]:
        return {"token": named(token), "logprob": finite(logprob), "bytes": list(text.spell(token))}

    def told(token: int, logprob: TokenLogprob) -> dict[str, Any]:
        top = [alternative(one.token, one.logprob) for one in logprob.top]
        return alternative(token, logprob.logprob) | {"top_logprobs": top}

    return [told(entry.token, entry.logprob) for entry in entries if entry.logprob is not None]


class CompletionWriter(Writer):
    """text_completion, streamed or not. Owns the texts to echo, one per prompt."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, answer: Answer, model: str, text: TokenText, echoes: list[str] | None):
        super().__init__(answer, model, text)
        self._echoes = echoes

    def opening(self) -> list[bytes]:
        """The echoed prompts, and their ids."""
        if self._echoes is None and not self._has_ids:
            return []
        return [
            self._chunk(
                self._piece(choice.index, self._echo(choice.index), self._prompt_field(choice.index)), is_last=False
            )
            for choice in self._answer.choices
        ]

    def more_of_choice(self, index: int) -> dict[str, Any]:
        """What is told of the choice and of its prompt."""
        more = super().more_of_choice(index)
        if self._has_ids:
            more["prompt_token_ids"] = self.prompt_ids(index)
        if self._answer.order.telling.num_prompt_logprobs >= 0:
            more["prompt_logprobs"] = self.prompt_logprobs(index)
        return more

    def _prompt_field(self, index: int) -> bytes:
        return b',"prompt_token_ids":' + encode(self.prompt_ids(index)) if self._has_ids else b""

    def _piece(self, index: int, text: str, more: bytes, logprobs: bytes = b"null") -> bytes:
        fields = (index, encode(text), logprobs, more)
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null%b}' % fields

    def delta(self, piece: Piece) -> bytes:
        """A piece of text."""
        logprobs = b"null" if piece.entries is None else encode(self._logprobs(piece.entries))
        return self._piece(piece.index, piece.text, self._new_ids(piece), logprobs)

    def end(self, index: int, reason: bytes) -> bytes:
        """No text."""
        return b'{"index":%d,"text":"","logprobs":null,"finish_reason":%b}' % (index, reason)

    def choice(self, index: int, text: str, entries: Sequence[Entry] | None, finish_reason: str) -> dict[str, Any]:
        """A text."""
        return {
            "index": index,
            "text": self._echo(index) + text,
            "logprobs": None if entries is None else self._logprobs(entries),
            "finish_reason": finish_reason,
        }

    def _echo(self, index: int) -> str:
        return "" if self._echoes is None else self._echoes[index // self._answer.order.n]

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {
            "tokens": [self._name(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob and finite(entry.logprob.logprob) for entry in entries],
            "top_logprobs": [self._top(entry.token, entry.logprob) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _top(self, token: int, logprob: TokenLogprob | None) -> dict[str, float] | None:
        """Alternatives by name, the chosen token among them."""
        if logprob is None:
            return None
        chosen = {self._name(token): finite(logprob.logprob)}
        return chosen | {self._name(top.token): finite(top.logprob) for top in logprob.top}


def _id_name(token: int) -> str:
    return f"token_id:{token}"


def padded(chunk: bytes) -> bytes:
    """An open chunk with random text that brings it, with its end, to a multiple of PADDED_BYTES."""
    size = len(chunk) + len(_PADDING) + len(b'"')
    missing = -(size + len(b"}\n\n")) % PADDED_BYTES
    return chunk + _PADDING + secrets.token_hex(missing // 2 + 1)[:missing].encode() + b'"'


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
