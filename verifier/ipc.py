"""Frames on a stream: a length in 4 bytes, big endian, then so many bytes. So travels what our processes say.

Without torch: the API process reads frames too.
"""

from __future__ import annotations

HEADER_BYTES = 4
MAX_FRAME_BYTES = 2**30
"""A longer frame means that the other side lost its place in the stream."""


def framed(body: bytes) -> bytes:
    """A body as it travels."""
    assert len(body) <= MAX_FRAME_BYTES, f"a frame of {len(body)} bytes, limit {MAX_FRAME_BYTES}"
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def length_of(header: bytes | bytearray) -> int:
    """The length in a header. Raises: ValueError if it makes no sense."""
    length = int.from_bytes(header, "big")
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes, limit {MAX_FRAME_BYTES}")
    return length


class FrameReader:
    """Cuts a byte stream into the bodies of frames. Owns the bytes of the frame that is not complete yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add what arrived; returns the bodies that are now complete. Raises: ValueError on a senseless length."""
        buffer = self._buffer
        buffer += data
        bodies = []
        start = 0
        while len(buffer) - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            length = length_of(buffer[start:body])
            if len(buffer) - body < length:
                break
            start = body + length
            bodies.append(bytes(buffer[body:start]))
        del buffer[:start]
        return bodies
