"""How an answer reaches the client: as server-sent events, or in one piece."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import anyio
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.answer import Answer, Entry, Piece, as_serving_error
from server.api.failures import ClientGone
from server.errors import ServingError

_log = logging.getLogger(__name__)


def leave_shutdown_to_us() -> None:
    """Keep the library from cutting streams at a shutdown: the engine ends them, each with its terminal event."""
    AppStatus.enable_automatic_graceful_drain = False


class AnswerWriter(Protocol):
    """The words of one API for one answer. A stream is `opening`, events, then either `closing` or `failure`."""

    def opening(self) -> Sequence[bytes]:
        """Events that need no token."""

    def event(self, piece: Piece) -> bytes:
        """The events of a piece."""

    def closing(self) -> Sequence[bytes]:
        """The events behind the last piece, the terminal one included."""

    def failure(self, error: ServingError) -> bytes:
        """The terminal event of an answer that failed."""

    def keep_alive(self) -> ServerSentEvent:
        """What a stream sends while nothing happens."""

    def read(self, piece: Piece) -> None:
        """Look at a piece of an answer that is sent whole."""

    def choice(self, index: int, text: str, entries: Sequence[Entry] | None, finish_reason: str) -> Any:
        """One choice of a whole answer."""

    def whole(self, choices: list[Any]) -> bytes:
        """The body of an answer that is not streamed."""


class AnswerStream(EventSourceResponse):
    """A stream of events. Owns the answer from here on: however the response ends, the answer is closed."""

    def __init__(self, answer: Answer, writer: AnswerWriter, keep_alive_s: float):
        super().__init__(
            _events(answer, writer),
            headers={"Cache-Control": "no-cache"},
            ping=keep_alive_s,
            ping_message_factory=writer.keep_alive,
            sep="\n",
        )
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. A client that goes away, even before the first byte, aborts the answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._answer.close()


async def _events(answer: Answer, writer: AnswerWriter) -> AsyncIterator[bytes]:
    try:
        for event in writer.opening():
            yield event
        async for piece in answer.pieces():
            yield writer.event(piece)
        for event in writer.closing():
            yield event
    except ServingError as error:
        yield writer.failure(error)
    except Exception as error:
        _log.exception("answer %s failed", answer.id)
        yield writer.failure(as_serving_error(error))


async def respond(request: Request, answer: Answer, writer: AnswerWriter, keep_alive_s: float) -> Response:
    """Run an answer and send it the way it was ordered. Raises what the engine refuses at once."""
    await answer.open()
    if answer.order.is_stream:
        return AnswerStream(answer, writer, keep_alive_s)
    try:
        async with aborting(request):
            return Response(await _collect(answer, writer), media_type="application/json")
    finally:
        await answer.close()


async def _collect(answer: Answer, writer: AnswerWriter) -> bytes:
    num_choices = len(answer.choices)
    texts: list[list[str]] = [[] for _ in range(num_choices)]
    entries: list[list[Entry] | None] = [None] * num_choices
    reasons = [""] * num_choices
    async for piece in answer.pieces():
        texts[piece.index].append(piece.text)
        writer.read(piece)
        if piece.entries is not None:
            entries[piece.index] = [*(entries[piece.index] or ()), *piece.entries]
        reasons[piece.index] = piece.finish_reason or ""
    return writer.whole(
        [writer.choice(index, "".join(texts[index]), entries[index], reasons[index]) for index in range(num_choices)]
    )


@contextlib.asynccontextmanager
async def aborting(request: Request) -> AsyncIterator[None]:
    """Cancel the body when the client goes away: there is nobody left to answer."""
    task = asyncio.current_task()
    assert task is not None, "routes run in tasks"
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)  # the client may still leave while we wait here
    except asyncio.CancelledError:
        if not is_gone:
            raise
        task.uncancel()
        raise ClientGone from None
