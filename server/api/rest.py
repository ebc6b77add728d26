"""The rest of a body that an answer did not wait for: read and thrown away, so that the client can read the answer.

A connection that is closed with unread data in it is reset, and a reset takes the answer along that is still on its
way. So the answer is sent, then the rest is read within bounds, then the connection may close.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Send

LINGER_S = 30.0
LINGER_BYTES = 128 * 2**20
"""The bounds: a client that is told of a body too large has usually sent, or is sending, all of it."""
SMALL_BYTES = 256 * 2**10
"""A body of at most so many bytes is no reason to give a connection up."""


class Rest:
    """The body of one request as the app reads it. Owns what is known of the part that it has not read."""

    def __init__(self, headers: Headers, receive: Receive, send: Send):
        self._receive = receive
        self._send = send
        length = headers.get("content-length", "")
        is_chunked = "transfer-encoding" in headers
        self._is_read = not is_chunked and length in ("", "0")
        self._is_small = not is_chunked and len(length) < 10 and length.isdecimal() and int(length) <= SMALL_BYTES
        # It sends nothing before it is told to go on, or after it was told what became of its request.
        self._is_held_back = headers.get("expect", "").lower() == "100-continue"

    async def receive(self) -> Message:
        """The next message from the client, for the app."""
        self._is_held_back = False
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._is_read = True
        return message

    async def send(self, message: Message) -> None:
        """Send a message of the app; with the last one of an answer the rest of the body is read."""
        if self._is_read:
            await self._send(message)
        elif message["type"] == "http.response.start":
            if not self._is_small:
                MutableHeaders(scope=message)["Connection"] = "close"
            await self._send(message)
        elif message.get("more_body", False) or self._is_held_back:
            await self._send(message)
        else:
            # The server may close the connection with the last message, so the text goes first.
            await self._send({**message, "more_body": True})
            await self._throw_away()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _throw_away(self) -> None:
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self._is_read and size <= LINGER_BYTES:
                    size += len((await self.receive()).get("body", b""))
