"""Errors on the wire: OpenAI's shape with a string code, Anthropic's under /v1/messages; some say when to come back."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.api.absent import why_absent
from server.errors import InvalidRequest, MethodNotAllowed, NotFound, NoThreads, ServingError

ANTHROPIC_PATH = "/v1/messages"
"""It and the routes below it answer in the shape of Anthropic."""

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class InternalError(ServingError):
    """A fault of ours; the log has the story, under the request's id."""


class ClientGone(ServingError):
    """Nobody reads this answer; the status is for the log."""

    status = 499
    code = "client_closed_request"

    def __init__(self) -> None:
        super().__init__("The client closed the connection.")


def error_object(error: ServingError) -> dict[str, Any]:
    """The value under "error"."""
    param = None if error.param is None else _safe(error.param)
    return {"message": _safe(error.message), "type": error.type, "param": param, "code": error.code}


def anthropic_error(error: ServingError) -> dict[str, Any]:
    """The whole body of an error in Anthropic's shape, which has no place for the field but the message."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    told: dict[str, Any] = {"type": kind, "message": _safe(error.message)}
    if isinstance(error, NoThreads):
        told["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": told}


def is_anthropic(path: str) -> bool:
    """Whether a route is one of Anthropic's."""
    return path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/")


def _safe(text: str) -> str:
    """Safe for JSON, whatever the client put into it."""
    return text.encode("utf-8", "replace").decode()


def error_body(error: ServingError) -> bytes:
    """The JSON body of an error answer, and the data of an error event."""
    return msgspec.json.encode({"error": error_object(error)})


def error_response(error: ServingError, path: str, headers: dict[str, str] | None = None) -> Response:
    """What the route `path` answers: the error, with Retry-After (whole seconds) and retry-after-ms if it says when."""
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, round(error.retry_after_s * 1000)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = msgspec.json.encode(anthropic_error(error)) if is_anthropic(path) else error_body(error)
    return Response(body, error.status, headers, "application/json")


def install(app: FastAPI) -> None:
    """Give the app's own errors, those of routing included, the same shape."""
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)


async def _on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_response(error, request.url.path)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 404:
        return error_response(NotFound(why_absent(path) or f"There is no route {method} {path}."), path)
    if error.status_code == 405:
        return error_response(MethodNotAllowed(f"{path} does not take {method}."), path, dict(error.headers or {}))
    if error.status_code < 500:
        return error_response(InvalidRequest(str(error.detail)), path)
    return error_response(InternalError(str(error.detail)), path)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return error_response(InvalidRequest(str(first["msg"]), param=str(first["loc"][-1])), request.url.path)
