"""The app behind a real socket: cut connections, keep-alive after refusals, bodies that are too large."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from server.api import rest
from server.commands.serve import MAX_HEADER_BYTES
from tests.api.house import House, chat_body, make_house, say


@contextlib.asynccontextmanager
async def serving(house: House, **more: object) -> AsyncIterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        options = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none", **more}
        server = uvicorn.Server(uvicorn.Config(house.app, **options))  # type: ignore[arg-type]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path)


async def until_idle(house: House) -> None:
    async with asyncio.timeout(2):
        while house.engine.num_running:
            await asyncio.sleep(0.01)


def test_stream_comes_piece_by_piece(house: House) -> None:
    house.engine.script = say("ZZZ")
    house.engine.pause_s = 0.05

    async def scene() -> None:
        async with serving(house) as url, httpx.AsyncClient() as client:
            seen: list[int] = []
            async with client.stream("POST", f"{url}/v1/chat/completions", json=chat_body(stream=True)) as response:
                async for data in response.aiter_bytes():
                    if b"Z" in data:
                        seen.append(house.engine.num_running)
            assert seen == [1, 1, 1]

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [True, False])
def test_cut_connection_aborts(house: House, stream: bool) -> None:
    house.engine.script = say("Z" * 500)
    house.engine.pause_s = 0.01

    async def scene() -> None:
        async with serving(house) as url:
            with contextlib.suppress(httpx.ReadTimeout):
                async with httpx.AsyncClient(timeout=0.2) as client:
                    body = chat_body(stream=stream)
                    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                        async for data in response.aiter_bytes():
                            if b"Z" in data:
                                break
            await until_idle(house)
            assert len(house.engine.aborted) == 1

    asyncio.run(scene())


@pytest.mark.parametrize("chunked", [True, False])
def test_huge_body_is_answered(house: House, chunked: bool) -> None:
    block = b" " * 2**20

    async def blocks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield block

    async def scene() -> None:
        async with serving(house) as url, httpx.AsyncClient(timeout=20) as client:
            headers = {} if chunked else {"Content-Length": str(100 * 2**20)}
            response = await client.post(f"{url}/v1/completions", content=blocks(), headers=headers)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
            assert (await client.get(f"{url}/health")).status_code == 200

    asyncio.run(scene())


BIG = 30_000_000


def big_request(port: int, *, length: int, path: str = "/v1/completions", more: bytes = b"") -> tuple[bytes, bytes]:
    """What a plain socket reads after it has sent all of a large body: the answer, and how the connection ends."""
    head = b"POST " + path.encode() + b" HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n" % length + more + b"\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(head + b" " * length)
        answer = b""
        while not answer.endswith(b"}}"):
            answer += client.recv(65536)
        return answer, client.recv(1)


@pytest.mark.parametrize(
    ("path", "more", "status"),
    [
        ("/v1/completions", b"", 413),
        ("/v1/completions", b"Connection: close\r\n", 413),
        ("/nowhere", b"Connection: close\r\n", 404),
        ("/health", b"Connection: close\r\n", 405),
        ("/v1/completions", b"Content-Encoding: br\r\n", 400),
    ],
)
def test_a_body_that_nobody_reads_does_not_cost_the_answer(house: House, path: str, more: bytes, status: int) -> None:
    async def scene() -> None:
        async with serving(house, http="h11") as url:
            port = int(url.rsplit(":", 1)[1])
            answer, end = await asyncio.to_thread(big_request, port, length=BIG, path=path, more=more)
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            assert b"connection: close" in answer.lower()
            assert end == b""

    asyncio.run(scene())


def test_a_body_without_a_key_does_not_cost_the_answer(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(make_house(tmp_path, api_key=("k",)), http="h11") as url:
            port = int(url.rsplit(":", 1)[1])
            answer, _ = await asyncio.to_thread(big_request, port, length=BIG, more=b"Connection: close\r\n")
            assert answer.startswith(b"HTTP/1.1 401 ")

    asyncio.run(scene())


def test_urllib_reads_why_its_body_is_too_large(house: House) -> None:
    def post(url: str) -> tuple[int, bytes]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", data=b" " * BIG), timeout=20)
        with caught.value as error:
            return error.code, error.read()

    async def scene() -> None:
        async with serving(house, http="h11") as url:
            status, text = await asyncio.to_thread(post, url)
            assert (status, b"request_too_large" in text) == (413, True)

    asyncio.run(scene())


def test_a_rest_without_end_is_left(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "LINGER_S", 0.2)

    async def scene() -> None:
        async with serving(house, http="h11") as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            writer.write(b"POST /nowhere HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
            async with asyncio.timeout(5):
                assert (await reader.readline()).startswith(b"HTTP/1.1 404")
                assert (await reader.read()).endswith(b"}}")
            writer.close()

    asyncio.run(scene())


def test_a_small_rest_leaves_the_connection_as_it_is(house: House) -> None:
    async def scene() -> None:
        async with serving(house, http="h11") as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            head = b"POST /nowhere HTTP/1.1\r\nHost: t\r\nContent-Length: 100000\r\n\r\n"
            writer.write(head + b"x" * 100_000 + b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
            seen = b""
            async with asyncio.timeout(5):
                while b"HTTP/1.1 200" not in seen:
                    seen += await reader.read(65536)
            assert seen.startswith(b"HTTP/1.1 404")
            writer.close()

    asyncio.run(scene())


def test_who_waits_to_be_told_to_go_on_is_told_at_once(house: House) -> None:
    async def scene() -> None:
        async with serving(house, http="h11") as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 30000000\r\nExpect: 100-continue"
            writer.write(head + b"\r\n\r\n")
            async with asyncio.timeout(5):
                assert (await reader.readline()).startswith(b"HTTP/1.1 413")
                assert (await reader.read()).endswith(b"}}")
            writer.close()

    asyncio.run(scene())


def test_one_connection_serves_on_after_an_error(house: House) -> None:
    async def scene() -> None:
        async with serving(house) as url, httpx.AsyncClient() as client:
            assert (await client.post(f"{url}/v1/completions", content=b"{")).status_code == 400
            good = await client.post(f"{url}/v1/completions", json={"model": "m", "prompt": "x"})
            assert good.status_code == 200

    asyncio.run(scene())


def test_a_client_that_leaves_while_it_sends_is_no_fault_of_ours(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        async with serving(house) as url:
            port = int(url.rsplit(":", 1)[1])
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 500\r\n\r\n{")
            await writer.drain()
            await asyncio.sleep(0.1)
            writer.close()
            await asyncio.sleep(0.2)

    asyncio.run(scene())
    assert "failed" not in caplog.text
    assert 'route="/v1/chat/completions",status="500"} 0.0' in house.metrics.render().decode()


@pytest.mark.parametrize(("num_more", "is_taken"), [(0, True), (300 * 2**10, False)])
def test_a_request_head_has_a_limit(house: House, num_more: int, is_taken: bool) -> None:
    begin = b"GET /health HTTP/1.1\r\nHost: t\r\nX-Long: "
    head = begin + b"x" * (MAX_HEADER_BYTES + num_more - len(begin) - 4) + b"\r\n\r\n"

    async def scene() -> None:
        async with serving(house, http="h11", h11_max_incomplete_event_size=MAX_HEADER_BYTES) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            writer.write(head)
            line = b""
            with contextlib.suppress(ConnectionResetError):  # what is not read when the server closes may cost its 400
                line = await reader.readline()
            assert (b" 200 " in line) is is_taken
            writer.transport.abort()

    asyncio.run(scene())
