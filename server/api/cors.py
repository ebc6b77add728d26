"""Cross-origin requests: which pages of other origins a browser lets talk to this server."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANY = "*"
_METHODS = "GET, POST, DELETE, HEAD"
_EXPOSED = "X-Request-Id, Retry-After, retry-after-ms"
_PREFLIGHT_S = 600
"""How long a browser may remember what it was told."""


class Cors:
    """ASGI middleware around the door: a preflight carries no key, and a page may read a refusal too.

    Cookies are never allowed along: who asks is told by a key in a header, which a page has to have been given.
    """

    def __init__(self, app: ASGIApp, *, origins: tuple[str, ...]):
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight of an allowed origin; let all else through, and mark its answer."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin")
        if origin is None:
            await self._app(scope, receive, send)
            return
        is_allowed = ANY in self._origins or origin in self._origins
        if is_allowed and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            asked = headers.get("access-control-request-headers", "")
            told = {
                "Access-Control-Allow-Methods": _METHODS,
                "Access-Control-Max-Age": str(_PREFLIGHT_S),
                "Access-Control-Allow-Origin": self._allowed(origin),
                "Vary": "Origin",
                **({"Access-Control-Allow-Headers": asked} if asked else {}),
            }
            await Response(status_code=204, headers=told)(scope, receive, send)
            return

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                marked = MutableHeaders(scope=message)
                marked.add_vary_header("Origin")
                if is_allowed:
                    marked["Access-Control-Allow-Origin"] = self._allowed(origin)
                    marked["Access-Control-Expose-Headers"] = _EXPOSED
            await send(message)

        await self._app(scope, receive, send_marked)

    def _allowed(self, origin: str) -> str:
        return ANY if ANY in self._origins else origin
