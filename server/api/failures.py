"""Errors on the wire: every failure has OpenAI's shape, a string code, and says when to come back."""

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
from server.errors import InvalidRequest, MethodNotAllowed, NotFound, ServingError


class InternalError(ServingError):
    """A fault of ours; the log has the story, under the request's id."""


class ClientGone(ServingError):
    """Nobody reads this answer; the status is for the log."""

    status = 499
    code = "client_closed_request"

    def __init__(self) -> None:
        super().__init__("The client closed the connection.")


def error_object(error: ServingError) -> dict[str, Any]:
    """The value under "error". The text is made safe for JSON, whatever the client put into it."""
    message = error.message.encode("utf-8", "replace").decode()
    param = None if error.param is None else error.param.encode("utf-8", "replace").decode()
    return {"message": message, "type": error.type, "param": param, "code": error.code}


def error_body(error: ServingError) -> bytes:
    """The JSON body of an error answer, and the data of an error event."""
    return msgspec.json.encode({"error": error_object(error)})


def error_response(error: ServingError, headers: dict[str, str] | None = None) -> Response:
    """An error answer; with `retry_after_s` it carries Retry-After (whole seconds) and retry-after-ms."""
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, round(error.retry_after_s * 1000)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(error_body(error), error.status, headers, "application/json")


def install(app: FastAPI) -> None:
    """Give the app's own errors, those of routing included, the same shape."""
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)


async def _on_serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 404:
        return error_response(NotFound(why_absent(path) or f"There is no route {method} {path}."))
    if error.status_code == 405:
        return error_response(MethodNotAllowed(f"{path} does not take {method}."), dict(error.headers or {}))
    if error.status_code < 500:
        return error_response(InvalidRequest(str(error.detail)))
    return error_response(InternalError(str(error.detail)))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return error_response(InvalidRequest(str(first["msg"]), param=str(first["loc"][-1])))
