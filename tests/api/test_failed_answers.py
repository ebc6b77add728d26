"""How answers that fail are counted: those the engine admitted as errors, those it refused not at all."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.app import create_app
from server.config import Settings
from server.engine import Engine
from server.errors import RequestFailed
from server.metrics import FINISH_REASONS, Metrics
from server.prompt import Scribe
from tests.api.fake_engine import FakeEngine
from tests.api.house import House, RawCall, chat_body, make_house, say
from tests.api.model_folder import make_folder

DEADLY = 7
WORKER = (sys.executable, "-m", "tests.fake_worker", "--crash-on", str(DEADLY), "--step-s", "0.02")


def counted(metrics: Metrics) -> dict[str, float]:
    """Answers by how they ended, without those ways that no answer went."""
    values = {
        reason: metrics.registry.get_sample_value("foretoken_requests_total", {"finish_reason": reason})
        for reason in FINISH_REASONS
    }
    return {reason: value for reason, value in values.items() if value}


@asynccontextmanager
async def one_row(folder: Path) -> AsyncIterator[tuple[Engine, Metrics, Any]]:
    """(engine, metrics, app) over a toy worker that runs one request at a time."""
    make_folder(folder)
    settings = Settings(
        model=str(folder),
        served_model_name=("m",),
        drafter="none",
        max_model_len=400,
        max_num_seqs=1,
        num_pages=512,
        max_num_batched_tokens=256,
    )
    metrics = Metrics()
    engine = Engine(settings, metrics.observe_step, metrics.worker_ready, worker_command=WORKER)
    await engine.start()
    try:
        await engine.wait_ready()
        yield engine, metrics, create_app(engine, Scribe(settings), metrics, settings)
    finally:
        await engine.close()


def ask(app: Any, token: int, stream: bool) -> RawCall:
    words = f'{{"model":"m","prompt":[{token}],"max_tokens":390,"ignore_eos":true,"stream":{str(stream).lower()}}}'
    return RawCall(app, words.encode(), "/v1/completions")


async def all_admitted(engine: Engine, count: int) -> None:
    async with asyncio.timeout(10):
        while engine.num_running + engine.num_waiting < count:
            await asyncio.sleep(0.005)


def test_streams_that_fail_in_the_queue_are_errors(tmp_path: Path) -> None:
    async def scene() -> None:
        async with one_row(tmp_path) as (_, metrics, app):
            calls = [ask(app, DEADLY, stream=False), *(ask(app, 3, stream=True) for _ in range(4))]
            await asyncio.wait_for(asyncio.gather(*(call.run() for call in calls)), 60)
            assert [call.status for call in calls] == [503, 200, 200, 200, 200]
            assert all("died 3 times" in call.text for call in calls)
            assert counted(metrics) == {"error": 5}
            refused = ask(app, 3, stream=True)
            await refused.run()
            assert refused.status == 503
            assert counted(metrics) == {"error": 5}

    asyncio.run(scene())


def test_streams_that_a_drain_leaves_in_the_queue_are_errors(tmp_path: Path) -> None:
    async def scene() -> None:
        async with one_row(tmp_path) as (engine, metrics, app):
            calls = [ask(app, 3, stream=True) for _ in range(3)]
            tasks = [asyncio.create_task(call.run()) for call in calls]
            await all_admitted(engine, 3)
            assert not await engine.drain(0.2)
            await engine.close()
            await asyncio.wait_for(asyncio.gather(*tasks), 10)
            assert all("engine_unavailable" in call.text for call in calls)
            assert counted(metrics) == {"error": 3}

    asyncio.run(scene())


def slow_house(folder: Path, **engine: Any) -> House:
    return make_house(folder, FakeEngine(say("x" * 50), pause_s=0.03, **engine))


def test_siblings_of_a_refused_choice_are_no_answers(tmp_path: Path) -> None:
    house = slow_house(tmp_path, num_places=2)
    assert house.chat(n=4).status_code == 429
    assert len(house.engine.aborted) == 2
    assert counted(house.metrics) == {}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fails_after", [0, 2])
def test_siblings_of_a_failed_choice_are_errors(tmp_path: Path, fails_after: int, stream: bool) -> None:
    house = slow_house(
        tmp_path,
        fails_after=fails_after,
        failure=RequestFailed("NaN in the logits"),
        failing=lambda submit: submit.id.endswith("-1"),
    )
    response = house.post("/v1/chat/completions", chat_body(n=3, stream=stream))
    assert "NaN in the logits" in response.text
    assert len(house.engine.aborted) == 3
    assert counted(house.metrics) == {"error": 3}
