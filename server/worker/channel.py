"""The worker's end of the socket to the API process."""

from __future__ import annotations

import select
import socket

from server.messages import FromWorker, frame
from verifier.ipc import FrameReader

MAX_UNSENT_BYTES = 64 * 2**20
"""Steps wait for the API process when it is this far behind."""

_READ_BYTES = 2**18


class ChannelClosed(Exception):
    """The API process is gone: nobody is left to work for."""


class Channel:
    """Frames in and out of a stream socket without ever losing one or blocking a step for nothing.

    Owns the socket, the bytes that did not go out yet and the frame that is not complete yet.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._reader = FrameReader()
        self._unsent = bytearray()

    def receive(self, *, is_waiting: bool, most_s: float | None = None) -> list[bytes]:
        """Bodies of the frames that arrived; waits for at least one if `is_waiting`, at most `most_s` seconds.

        Raises: ChannelClosed.
        """
        while True:
            bodies: list[bytes] = []
            while data := self._read():
                bodies += self._reader.feed(data)
            if bodies or not is_waiting:
                return bodies
            if not self._wait(select.POLLIN | (select.POLLOUT if self._unsent else 0), most_s):
                return bodies

    def send(self, message: FromWorker) -> None:
        """Queue a message and send what the socket takes; waits only beyond MAX_UNSENT_BYTES. Raises: ChannelClosed."""
        self._unsent += frame(message)
        self._flush()
        while len(self._unsent) > MAX_UNSENT_BYTES:
            self._wait(select.POLLOUT)

    def close(self) -> None:
        """Send what is left, as far as anybody listens, and close."""
        try:
            while self._unsent:
                self._wait(select.POLLOUT)
        except ChannelClosed:
            self._unsent.clear()
        self._socket.close()

    def _read(self) -> bytes | None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return None
        except ConnectionError as error:
            raise ChannelClosed from error
        if not data:
            raise ChannelClosed
        return data

    def _flush(self) -> None:
        while self._unsent:
            try:
                num_sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except ConnectionError as error:
                raise ChannelClosed from error
            del self._unsent[:num_sent]

    def _wait(self, events: int, most_s: float | None = None) -> bool:
        """Sleep until one of the events, and send what can be sent. Returns: whether one came in time."""
        poll = select.poll()  # unlike select(), it takes descriptors of any number
        poll.register(self._socket, events)
        has_come = bool(poll.poll(None if most_s is None else most_s * 1000))
        self._flush()
        return has_come
