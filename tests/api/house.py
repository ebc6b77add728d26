"""The app over a fake engine, and ways to talk to it without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI

from server.app import create_app
from server.config import Settings
from server.messages import Submit
from server.metrics import Metrics
from server.prompt import Scribe
from server.prompt_pool import PromptPool
from tests.api.fake_engine import FakeEngine
from tests.api.model_folder import END, make_folder

Result = TypeVar("Result")
HELLO = "Hello, wörld! €"


def say(text: str) -> Callable[[Submit], list[int]]:
    return lambda submit: [*text.encode(), END]


@dataclass
class House:
    engine: FakeEngine
    app: FastAPI
    metrics: Metrics
    scribe: Scribe

    def client(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test", **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.client() as client:
                if isinstance(body, bytes):
                    return await client.post(path, content=body, **options)
                return await client.post(path, json=body, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.client() as client:
                return await client.get(path, **options)

        return asyncio.run(send())

    def chat(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", chat_body(**fields))

    def complete(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "m", "prompt": "Hi", "max_tokens": 100, **fields})


_pools: dict[str, PromptPool] = {}


def share_processes(scribe: Scribe) -> Scribe:
    """Houses of the same files share what renders and encodes: starting it takes longer than a test."""
    scribe._pool = _pools.setdefault(repr(scribe._pool._files), scribe._pool)
    return scribe


def close_processes() -> None:
    for pool in _pools.values():
        pool.close()
    _pools.clear()


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}


def make_house(
    folder: Path, engine: FakeEngine | None = None, model: dict[str, Any] | None = None, **options: Any
) -> House:
    make_folder(folder, **(model or {}))
    engine = engine or FakeEngine(say(HELLO))
    settings = Settings(model=str(folder), served_model_name=("m", "org/name"), **options)
    scribe, metrics = share_processes(Scribe(settings)), Metrics()
    return House(engine, create_app(engine, scribe, metrics, settings), metrics, scribe)


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream, parsed; [DONE] stays a text."""
    found = []
    for line in response.text.split("\n"):
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        else:
            assert line == "" or line.startswith((":", "event: ")), line
    return found


@dataclass
class RawCall:
    """One request spoken in ASGI itself: the client may go away whenever it wants. Owns what came back."""

    app: FastAPI
    body: bytes
    path: str = "/v1/chat/completions"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    sent: list[dict[str, Any]] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    chunks_read: int = 0
    chunks_before: int = 0
    """Those that were read before the answer began."""
    send_s: float = 0.0

    async def run(self, chunk_size: int = 1 << 20) -> None:
        parts = [self.body[start : start + chunk_size] for start in range(0, len(self.body), chunk_size)] or [b""]
        pending = iter(range(len(parts)))

        async def receive() -> dict[str, Any]:
            index = next(pending, None)
            if index is None:
                await self.gone.wait()
                return {"type": "http.disconnect"}
            self.chunks_read += 1
            return {"type": "http.request", "body": parts[index], "more_body": index + 1 < len(parts)}

        async def send(message: dict[str, Any]) -> None:
            if self.gone.is_set():
                raise OSError("connection lost")
            if not self.sent:
                self.chunks_before = self.chunks_read
            self.sent.append(message)
            if self.send_s:
                await asyncio.sleep(self.send_s)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"test"), (b"content-type", b"application/json"), *self.headers],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        await self.app(scope, receive, send)  # type: ignore[arg-type]

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(work)
