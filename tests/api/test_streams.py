"""What happens to a stream: pings, failures half way, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from server.api.failures import ClientGone
from server.api.sse import aborting
from server.errors import RequestFailed
from tests.api.fake_engine import FakeEngine
from tests.api.house import House, RawCall, chat_body, events, make_house, say


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path)


def call(house: House, **fields: Any) -> RawCall:
    return RawCall(house.app, json.dumps(chat_body(**fields)).encode())


def test_pings_from_the_start(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(say("a"), pause_s=0.35), keep_alive_s=0.1)
    response = house.chat(stream=True)
    role, _, _ = response.text.partition('"content":"a"')
    assert role.count(": keep-alive\n\n") >= 2
    assert events(response)[-1] == "[DONE]"


@pytest.mark.parametrize("n", [1, 2])
def test_failure_half_way_is_one_event(house: House, n: int) -> None:
    house.engine.pause_s = 0.03
    house.engine.fails_after = 2
    house.engine.failure = RequestFailed("NaN in the logits")
    response = house.chat(stream=True, n=n)
    assert response.status_code == 200
    *_, error, done = events(response)
    assert error == {
        "error": {"message": "NaN in the logits", "type": "server_error", "param": None, "code": "request_failed"}
    }
    assert done == "[DONE]"
    assert house.engine.num_running == 0
    assert len(house.engine.aborted) == n
    text = house.get("/metrics").text
    assert f'foretoken_requests_total{{finish_reason="error"}} {n}.0' in text
    assert 'foretoken_requests_total{finish_reason="abort"} 0.0' in text


def test_failure_of_one_piece_answer_is_a_status(house: House) -> None:
    house.engine.pause_s = 0.03
    house.engine.fails_after = 2
    house.engine.failure = RequestFailed("NaN in the logits")
    response = house.chat()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "request_failed"


def test_unexpected_failure_in_a_stream_tells_no_details(house: House) -> None:
    house.engine.pause_s = 0.03
    house.engine.fails_after = 1
    house.engine.failure = KeyError("secret")
    response = house.chat(stream=True)
    *_, error, done = events(response)
    assert error["error"]["code"] == "request_failed"
    assert done == "[DONE]"
    assert "secret" not in response.text
    assert house.chat().status_code == 500
    assert "secret" not in house.chat().text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_client_that_goes_away_aborts(house: House, stream: bool, n: int) -> None:
    house.engine.script = say("x" * 500)
    house.engine.pause_s = 0.01

    async def scene() -> None:
        one = call(house, stream=stream, n=n)
        task = asyncio.create_task(one.run())
        await asyncio.sleep(0.1)
        assert house.engine.num_running == n
        one.gone.set()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 2)
        assert house.engine.num_running == 0
        assert len(house.engine.aborted) == n
        rest = [other.get_name() for other in asyncio.all_tasks() if other is not asyncio.current_task()]
        assert len(rest) <= 1, rest  # the event library keeps one watcher per loop

    asyncio.run(scene())
    assert f'foretoken_requests_total{{finish_reason="abort"}} {n}.0' in house.get("/metrics").text


def test_client_gone_before_the_first_byte(house: House) -> None:
    house.engine.pause_s = 0.05

    async def scene() -> None:
        one = call(house, stream=True)

        async def leave() -> None:
            while not house.engine.submits:
                await asyncio.sleep(0.001)
            one.gone.set()

        await asyncio.wait_for(asyncio.gather(one.run(), leave(), return_exceptions=True), 5)
        assert house.engine.num_running == 0
        assert len(house.engine.aborted) == 1

    asyncio.run(scene())


def test_shutdown_of_a_task_aborts(house: House) -> None:
    house.engine.script = say("x" * 500)
    house.engine.pause_s = 0.01

    async def scene() -> None:
        task = asyncio.create_task(call(house, stream=True, n=2).run())
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert house.engine.num_running == 0

    asyncio.run(scene())


def test_a_slow_client_gets_fewer_chunks(house: House) -> None:
    house.engine.script = say("Z" * 200)
    house.engine.pause_s = 0.001

    async def scene() -> None:
        one = call(house, stream=True)
        one.send_s = 0.02
        await asyncio.wait_for(one.run(), 10)
        assert len(one.sent) < 60
        assert one.text.count("Z") == 200
        assert one.text.endswith("data: [DONE]\n\n")

    asyncio.run(scene())


def test_the_first_token_is_timed_when_it_comes(house: House) -> None:
    house.engine.script = say("x" * 500)
    house.engine.pause_s = 0.01
    names = ("time_to_first_token_seconds", "request_queue_seconds")

    def counts() -> list[float | None]:
        return [house.metrics.registry.get_sample_value(f"foretoken_{name}_count") for name in names]

    async def scene() -> None:
        one = call(house, stream=True)
        task = asyncio.create_task(one.run())
        while "x" not in one.text:
            await asyncio.sleep(0.01)
        assert counts() == [1.0, 1.0]
        one.gone.set()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 2)
        assert house.engine.num_running == 0
        assert counts() == [1.0, 1.0]
        house.engine.fails_after = 0
        house.engine.failure = RequestFailed("before its first token")
        await call(house, stream=True).run()
        assert counts() == [1.0, 1.0]

    asyncio.run(scene())


def test_many_streams_at_once(house: House) -> None:
    house.engine.script = say("x" * 30)
    house.engine.pause_s = 0.001

    async def scene() -> None:
        calls = [call(house, stream=True) for _ in range(64)]
        tasks = [asyncio.create_task(one.run()) for one in calls]
        await asyncio.sleep(0.05)
        for one in calls[::3]:
            one.gone.set()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert all(one.text.endswith("data: [DONE]\n\n") for index, one in enumerate(calls) if index % 3)
        assert house.engine.num_running == 0

    asyncio.run(scene())


def test_body_is_not_buffered_beyond_the_limit(house: House) -> None:
    async def scene() -> None:
        one = RawCall(house.app, b" " * (100 * 2**20))
        await asyncio.wait_for(one.run(), 5)
        assert one.status == 413
        assert json.loads(one.sent[1]["body"])["error"]["code"] == "request_too_large"
        assert "8388608" in one.text
        assert one.chunks_before <= 10
        declared = RawCall(house.app, b"{}", headers=((b"content-length", b"104857600"),))
        await declared.run()
        assert declared.status == 413
        assert declared.chunks_before == 0

    asyncio.run(scene())
    assert house.engine.submits == []


def test_client_that_leaves_while_its_answer_is_done() -> None:
    async def scene() -> None:
        async def receive() -> Message:
            with contextlib.suppress(asyncio.CancelledError):  # the disconnect comes before the watcher is stopped
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        with pytest.raises(ClientGone):
            async with aborting(Request({"type": "http"}, receive)):
                await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(scene())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_goes_away_while_its_prompt_is_encoded(
    house: House, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_given_up = asyncio.Event()

    async def encode(*_: object, **__: object) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            is_given_up.set()

    async def scene() -> None:
        body = chat_body() if "chat" in path else {"model": "m", "prompt": "x"}
        call = RawCall(house.app, json.dumps(body).encode(), path)
        monkeypatch.setattr(house.scribe, "chat", encode)
        monkeypatch.setattr(house.scribe, "encode", encode)
        asyncio.get_running_loop().call_later(0.05, call.gone.set)
        with contextlib.suppress(OSError):
            await asyncio.wait_for(call.run(), 5)
        assert is_given_up.is_set()
        assert not house.engine.submits

    asyncio.run(scene())
