"""A request body: bounded, UTF-8, JSON, not too deep. Everything else is refused before anyone looks inside."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from server.api.failures import ClientGone
from server.api.fields import MAX_PATH
from server.errors import BodyTooLarge, InvalidRequest, Overloaded, UnsupportedParameter

MAX_DEPTH = 64
MAX_CONTAINERS = 300_000
"""Arrays and objects of one body: 4096 messages of 64 text parts have fewer, and millions take seconds to build."""
MAX_TEXTS = 262_144
"""Keys and strings of one body: 4096 messages of 14 text parts have fewer."""
MAX_VALUES = 1_200_000
"""Commas between the values of one body: token ids of a context of a million have fewer."""
MAX_FLOATS = 4096
"""Numbers with a point or an exponent: all fields together take 1100. Some, as 1e308, cost the decoder 15 microseconds
each, two hundred times what an integer of that length does."""
MAX_DIGITS = 1000
"""Digits of one number. The decoder's time for an integer grows with their square."""

_MAX_SMALL = 4 * 2**10
"""Bytes of a body that is decoded within a millisecond whatever it holds, so that it need not wait for its turn."""
_MAX_READ = 256 * 2**20
"""Bytes of all bodies that are read or wait for their turn. One that alone is larger still passes."""
_RETRY_S = 1.0
_MAX_EXPLAINED = 256 * 2**10
"""Bytes of a broken body that is searched for the field at fault; of a longer one only the place is told."""

_Place = tuple[Any, str | int] | None
"""Of a value in a body: the place of what holds it, and the key or number there."""

_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_NOT_FINITE = re.compile(rb"-?(?:NaN|Infinity)")
_HALF_PAIR = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F])"
)
"""Begins with two plain letters, which is what makes a search through millions of other escapes quick."""


class Intake:
    """What all bodies under way share. Owns the turn of those that take long, and the count of bytes read."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.num_bytes = 0

    def check(self, num_more: int) -> None:
        """Raises Overloaded if there is no room for so many bytes more."""
        if self.num_bytes and self.num_bytes + num_more > _MAX_READ:
            raise Overloaded("Too many large request bodies are being read; come back later.", retry_after_s=_RETRY_S)


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body; of a key given twice the last one counts.

    Raises Overloaded while too many bytes are being read, BodyTooLarge by Content-Length or as soon as more has come
    in (nothing more is kept), and InvalidRequest for
    bad UTF-8, bad JSON, NaN, infinities, half surrogate pairs, a nesting deeper than MAX_DEPTH, more of anything than
    the limits above allow, or no object. What is slow to decode is counted before it is decoded: the decoder cannot be
    stopped, and while it works nobody else is answered.
    """
    intake: Intake = request.app.state.intake
    parts: list[bytes] = []
    try:
        await _read(request, max_bytes, parts, intake)
        body = b"".join(parts)
        if len(body) <= _MAX_SMALL:
            return _decode(body)
        async with intake.turn:  # one at a time, and others are answered between two passes
            _check_counts(body)
            await asyncio.sleep(0)
            value = _decode(body)
            await asyncio.sleep(0)
        return value
    finally:
        intake.num_bytes -= sum(map(len, parts))
        parts.clear()  # an error keeps this frame alive while the rest is read and thrown away


def _decode(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.MsgspecError, ValueError) as error:
        try:
            body.decode()  # msgspec raises what it likes of such bytes, from release to release
        except UnicodeDecodeError as where:
            raise InvalidRequest(f"The request body is not UTF-8 (byte {where.start}).") from None
        raise _explain(body, error) from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    _check_depth(body, value)
    return value


async def _read(request: Request, max_bytes: int, parts: list[bytes], intake: Intake) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedParameter("A compressed request body is not supported.", param="Content-Encoding")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise _too_large(max_bytes)
            intake.check(len(part))
            intake.num_bytes += len(part)
            parts.append(part)
    except ClientDisconnect as error:
        raise ClientGone from error


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than the limit of {max_bytes} bytes.")


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The request body is nested deeper than {MAX_DEPTH} levels.")


def _check_counts(body: bytes) -> None:
    """Count what takes the decoder long. Every pass over the body is one of C, whatever it holds."""
    # Escapes are read from the left; without the two that can hide a quote, each quote opens or closes a text.
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    _check_count(bare.count(b'"') // 2, MAX_TEXTS, "keys and strings")
    outside = b"".join(bare.split(b'"')[::2])
    _check_count(_num_brackets(outside), MAX_CONTAINERS, "arrays and objects")
    _check_count(outside.count(b","), MAX_VALUES, "values")
    numbers = outside.replace(b"true", b"").replace(b"false", b"")
    num_floats = numbers.count(b".") + numbers.count(b"e") + numbers.count(b"E")
    _check_count(num_floats, MAX_FLOATS, "numbers with a point or an exponent")
    if b"0" * (MAX_DIGITS + 1) in outside.translate(_ZEROS):
        raise InvalidRequest(f"A number in the request body may have at most {MAX_DIGITS} digits.")


def _check_count(found: int, most: int, what: str) -> None:
    if found > most:
        raise InvalidRequest(f"The request body may hold at most {most} {what}, got {found}.")


def _num_brackets(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def _check_depth(body: bytes, value: Any) -> None:
    """Level by level; most bodies have too few brackets to be deep, which is known without a walk."""
    if _num_brackets(body) <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent) if type(child) in (dict, list)]
        if not level:
            return
    raise _too_deep()


def _children(value: Any) -> Any:
    return value.values() if type(value) is dict else value


def _explain(body: bytes, error: Exception) -> InvalidRequest:
    """Name the field, when the body would be JSON but for a number or a character that JSON does not have."""
    if len(body) > _MAX_EXPLAINED:
        return InvalidRequest(f"The request body is not valid JSON: {_foreign(body, error) or error}")
    try:
        lenient = json.loads(body)
    except (ValueError, RecursionError):
        return InvalidRequest(f"The request body is not valid JSON: {error}")
    for place, leaf in _leaves(lenient):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            path = _path_of(place)
            return InvalidRequest(f"'{path}' must be a finite number.", param=path)
        if isinstance(leaf, str) and any("\ud800" <= letter <= "\udfff" for letter in leaf):
            path = _path_of(place)
            return InvalidRequest(f"'{path}' holds half of a surrogate pair, which is not a character.", param=path)
    return InvalidRequest(f"The request body is not valid JSON: {error}")


def _foreign(body: bytes, error: Exception) -> str:
    """What JSON does not have, found without building the values: NaN at the byte that `error` names, half a pair."""
    if place := re.search(r"\(byte (\d+)\)", str(error)):
        start = int(place.group(1))
        if found := _NOT_FINITE.match(body, max(0, start - 1)) or _NOT_FINITE.match(body, start):
            return f"numbers must be finite, got {found.group().decode()} at byte {found.start()}"
    # Half a pair at the end of a text is a truncated one to the decoder, without a place.
    if ("surrogate" in str(error) or "truncated" in str(error)) and (half := _HALF_PAIR.search(body)):
        return f"half of a surrogate pair, which is not a character, at byte {half.start()}"
    return ""


def _leaves(value: Any) -> Iterator[tuple[_Place, Any]]:
    """Every key, string and number below `value`, with its place; not recursive."""
    pending: list[tuple[_Place, Any]] = [(None, value)]
    while pending:
        place, value = pending.pop()
        if isinstance(value, dict):
            for key, child in value.items():
                yield place, key
                pending.append(((place, f".{key[:MAX_PATH]}"), child))
        elif isinstance(value, list):
            pending.extend(((place, index), child) for index, child in enumerate(value))
        else:
            yield place, value


def _path_of(place: _Place) -> str:
    """A place in words; built only for the one that is told, since a long key may stand above millions of values."""
    steps: list[str] = []
    while place is not None:
        place, step = place
        steps.append(f"[{step}]" if isinstance(step, int) else step)
    return "".join(reversed(steps)).removeprefix(".")[:MAX_PATH] or "body"
