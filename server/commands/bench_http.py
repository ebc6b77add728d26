"""A lean streaming POST for the bench client: raw HTTP/1.1 over asyncio, Server-Sent Events, one clock.

A general HTTP client spends about as long on a chunk as a small model on a token; on one machine that would be
measured instead of the server. So the chunked body is cut here, and of each event only the fields that count are
decoded.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from server.config import SettingsError

_READ_BYTES = 1 << 16
_MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: a base URL such as http://127.0.0.1:8000/v1, taken apart."""

    host: str
    port: int
    prefix: str
    is_tls: bool
    api_key: str = ""

    @classmethod
    def parse(cls, url: str, api_key: str = "") -> Target:
        """Raises SettingsError for what is not an http or https URL."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise SettingsError(f"--url {url}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"--url {url}: expected something like http://127.0.0.1:8000/v1")
        is_tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if is_tls else 80), parts.path.rstrip("/"), is_tls, api_key)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of one request on a connection of its own."""
        lines = [
            f"{method} {self.prefix}{path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Connection: close",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class SpeculativeDecoding(msgspec.Struct, frozen=True):
    """The part of `metrics.speculative_decoding` that the bench adds up."""

    num_spec_steps: int = 0
    num_accepted_draft_tokens: int = 0
    num_draft_tokens: int = 0


class _Metrics(msgspec.Struct):
    speculative_decoding: SpeculativeDecoding | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    metrics: _Metrics | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


@dataclass(slots=True)
class Answer:
    """One streamed answer as the client saw it. Times are seconds since the request was sent."""

    text: str = ""
    num_prompt: int = 0
    num_completion: int = 0
    num_chunks: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    speculation: SpeculativeDecoding | None = None
    error: str = ""
    parts: list[str] = field(default_factory=list, repr=False)

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (last text - first text) / (tokens - 1)."""
        return (self.last_s - self.first_s) / (self.num_completion - 1) if self.num_completion > 1 else None


class Body:
    """Cuts a response into its status, its body and the body's lines. Owns the bytes not yet used."""

    def __init__(self) -> None:
        self.status = 0
        self._is_chunked = False
        self._raw = b""
        self._left = -1  # bytes still to come of the current chunk, its line end included; -1 before a size line
        self._line = b""
        self.is_over = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Lines of the body that `data` completes, without their line ends."""
        self._raw += data
        if not self.status and not self._read_head():
            return
        text = self._line + (self._dechunk() if self._is_chunked else self._take())
        *lines, self._line = text.split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")

    def rest(self) -> bytes:
        """The last line, if it had no line end."""
        return self._line

    def _take(self) -> bytes:
        taken, self._raw = self._raw, b""
        return taken

    def _read_head(self) -> bool:
        head, found, rest = self._raw.partition(b"\r\n\r\n")
        if not found:
            return False
        first, *headers = head.split(b"\r\n")
        self.status = int(first.split(b" ", 2)[1])
        self._is_chunked = any(h.lower().replace(b" ", b"") == b"transfer-encoding:chunked" for h in headers)
        self._raw = rest
        return True

    def _dechunk(self) -> bytes:
        out: list[bytes] = []
        while self._raw and not self.is_over:
            if self._left < 0:
                size, found, rest = self._raw.partition(b"\r\n")
                if not found:
                    break
                length = int(size.split(b";", 1)[0], 16)
                self.is_over = length == 0
                self._raw, self._left = rest, length + 2
            piece, self._raw = self._raw[: self._left], self._raw[self._left :]
            out.append(piece[: max(0, self._left - 2)])  # the line end may arrive apart from its chunk
            self._left -= len(piece)
            if self._left == 0:
                self._left = -1
        return b"".join(out)


async def post_stream(target: Target, path: str, body: bytes, timeout_s: float) -> Answer:
    """Send one request and read its stream to the end; failures come back in `Answer.error`, never as exceptions."""
    answer = Answer()
    try:
        async with asyncio.timeout(timeout_s):
            await _exchange(target, path, body, answer)
    except TimeoutError:
        answer.error = f"no end of the answer within {timeout_s:g} s"
    except (OSError, ValueError, IndexError, msgspec.MsgspecError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]
    answer.text = "".join(answer.parts)
    return answer


async def _exchange(target: Target, path: str, body: bytes, answer: Answer) -> None:
    tls = ssl.create_default_context() if target.is_tls else None
    reader, writer = await asyncio.open_connection(target.host, target.port, ssl=tls)
    try:
        begin = time.perf_counter()
        writer.write(target.request("POST", path, body))
        response, plain = Body(), list[bytes]()
        is_done = False
        while not response.is_over and (data := await reader.read(_READ_BYTES)):
            now = time.perf_counter() - begin
            for line in response.feed(data):
                if response.status != 200:
                    plain.append(line)
                elif line.startswith(b"data:"):
                    is_done |= _read_event(line[5:].strip(), now, answer)
        if response.status != 200:
            text = b"\n".join([*plain, response.rest()]).decode("utf-8", "replace").strip()
            answer.error = f"status {response.status}: {text}"[:_MAX_ERROR_CHARS]
        elif not is_done and not answer.error:
            answer.error = "the stream broke off before [DONE]"
    finally:
        writer.transport.abort()


_DECODE = msgspec.json.Decoder(_Event).decode


def _read_event(data: bytes, now: float, answer: Answer) -> bool:
    """Take one event into `answer`; True at the closing [DONE]."""
    if data.startswith(b"[DONE]"):
        return True
    event = _DECODE(data)
    if bytes(event.error) not in (b"", b"null"):
        answer.error = bytes(event.error).decode("utf-8", "replace")[:_MAX_ERROR_CHARS]
    for choice in event.choices:
        text = choice.text if choice.text is not None else choice.delta.content if choice.delta else None
        if text:
            answer.parts.append(text)
            answer.num_chunks += 1
            answer.last_s = now
            if not answer.first_s:
                answer.first_s = now
    if event.usage is not None:
        answer.num_prompt, answer.num_completion = event.usage.prompt_tokens, event.usage.completion_tokens
    if event.metrics is not None and event.metrics.speculative_decoding is not None:
        answer.speculation = event.metrics.speculative_decoding
    return False
