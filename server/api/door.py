"""The door: who is asking, under which request id, and what happens when something of ours breaks."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.failures import InternalError, error_response
from server.api.rest import Rest
from server.errors import InvalidApiKey
from server.metrics import Metrics

PUBLIC_TENANT = "public"
OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
"""Routes without a key: probes and scrapes, which hold nothing that clients sent.

OPTIONS asks for none either: a browser's preflight cannot carry one. No route takes it, so the answer is 405 or 404.
"""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_log = logging.getLogger(__name__)


class Keys:
    """The accepted API keys. Owns nothing but their digests; a comparison takes the same time whichever key matches."""

    def __init__(self, keys: tuple[str, ...]):
        self._digests = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys]

    def tenant(self, headers: Headers) -> str:
        """The tenant of a request: a short hash of its key. Raises InvalidApiKey.

        `Authorization` counts before `x-api-key`, which Anthropic's clients send.
        """
        if not self._digests:
            return PUBLIC_TENANT
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        if not (key := key.strip(" \t")):
            raise InvalidApiKey(
                "You did not provide an API key: send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`."
            )
        digest = hashlib.sha256(key.encode("latin-1")).digest()  # the bytes as they came
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise InvalidApiKey("Incorrect API key provided.")
        return digest.hex()[:16]


class Door:
    """ASGI middleware around every route. Puts `tenant` and `request_id` into the scope's state."""

    def __init__(self, app: ASGIApp, *, keys: Keys, metrics: Metrics):
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex
        rest = Rest(headers, receive, send)
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await rest.send(message)

        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        try:
            if scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
                state["tenant"] = self._keys.tenant(headers)
            await self._app(scope, rest.receive, send_named)
        except InvalidApiKey as error:
            await error_response(error, scope["path"])(scope, rest.receive, send_named)
        except Exception:
            _log.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if status:
                raise  # the answer is under way: all that is left is to cut the connection
            failure = InternalError(f"Something went wrong on our side; the log has it under request {request_id}.")
            await error_response(failure, scope["path"])(scope, rest.receive, send_named)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.http_request(route, status)
