"""A request body: bounded, UTF-8, JSON, not too deep. Everything else is refused before anyone looks inside."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from server.api.failures import ClientGone
from server.errors import BodyTooLarge, InvalidRequest, UnsupportedParameter

MAX_DEPTH = 64
MAX_CONTAINERS = 300_000
"""Arrays and objects of one body: 4096 messages of 64 text parts have fewer, and millions take seconds to build."""

_MAX_EXPLAINED = 256 * 2**10
"""Bytes of a broken body that is searched for the field at fault; of a longer one only the place is told."""

_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A text, closed or not: were the closing quote asked for, a body full of quotes would be scanned once for each."""

_NOT_FINITE = re.compile(rb"-?(?:NaN|Infinity)")
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body; of a key given twice the last one counts.

    Raises BodyTooLarge by Content-Length or as soon as more has come in (nothing more is kept), and InvalidRequest for
    bad UTF-8, bad JSON, NaN, infinities, half surrogate pairs, a nesting deeper than MAX_DEPTH, more than
    MAX_CONTAINERS arrays and objects, or no object.
    """
    body = await _read(request, max_bytes)
    _check_containers(body)
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body is not UTF-8 (byte {error.start}).") from None
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise _explain(body, error) from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    _check_depth(body, value)
    return value


async def _read(request: Request, max_bytes: int) -> bytes:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedParameter("A compressed request body is not supported.", param="Content-Encoding")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise _too_large(max_bytes)
            parts.append(part)
    except ClientDisconnect as error:
        raise ClientGone from error
    return b"".join(parts)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than the limit of {max_bytes} bytes.")


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The request body is nested deeper than {MAX_DEPTH} levels.")


def _check_containers(body: bytes) -> None:
    """Count brackets outside of texts; few bodies have so many at all that the texts have to be taken out."""
    if _num_brackets(body) > MAX_CONTAINERS and (found := _num_brackets(_TEXT.sub(b"", body))) > MAX_CONTAINERS:
        raise InvalidRequest(f"The request body may hold at most {MAX_CONTAINERS} arrays and objects, got {found}.")


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
    for path, leaf in _leaves(lenient):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            return InvalidRequest(f"'{path}' must be a finite number.", param=path)
        if isinstance(leaf, str) and any("\ud800" <= letter <= "\udfff" for letter in leaf):
            return InvalidRequest(f"'{path}' holds half of a surrogate pair, which is not a character.", param=path)
    return InvalidRequest(f"The request body is not valid JSON: {error}")


def _foreign(body: bytes, error: Exception) -> str:
    """What JSON does not have, found without building the values: NaN at the byte that `error` names, half a pair."""
    if place := re.search(r"\(byte (\d+)\)", str(error)):
        start = int(place.group(1))
        if found := _NOT_FINITE.match(body, max(0, start - 1)) or _NOT_FINITE.match(body, start):
            return f"numbers must be finite, got {found.group().decode()} at byte {found.start()}"
    if half := _HALF_PAIR.search(body):
        return f"half of a surrogate pair, which is not a character, at byte {half.start()}"
    return ""


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key, string and number below `value`, with its path; not recursive."""
    pending = [(path, value)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            for key, child in value.items():
                yield path or "body", key
                pending.append((f"{path}.{key}" if path else key, child))
        elif isinstance(value, list):
            pending.extend((f"{path}[{index}]", child) for index, child in enumerate(value))
        else:
            yield path or "body", value
