"""The engine gate and its supervisor over real child processes that run a toy target."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from server.config import Settings
from server.engine import Engine
from server.errors import EngineUnavailable, Overloaded, RequestFailed, StartupError
from server.messages import Delta, StepStats, Submit
from tests.fakes import FakeGeometry, plain_answer, submit_of

VOCAB = FakeGeometry().vocab_size
CONTEXT = 400


def settings(**changes: object) -> Settings:
    values: dict[str, object] = {
        "model": "toy",
        "max_model_len": CONTEXT,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "page_size": 4,
        "num_pages": 512,
        "max_queued": 4,
        "log_level": "warning",
        "drafter": "none",
    }
    return Settings(**{**values, **changes})  # type: ignore[arg-type]


@asynccontextmanager
async def running(*options: str, **changes: object) -> AsyncIterator[tuple[Engine, list[StepStats]]]:
    """A ready engine over the toy worker; afterwards nothing of it may be left."""
    stats: list[StepStats] = []
    command = (sys.executable, "-m", "tests.fake_worker", *options)
    engine = Engine(settings(**changes), stats.append, worker_command=command)
    await engine.start()
    try:
        await engine.wait_ready()
        yield engine, stats
    finally:
        await engine.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine and check that it leaves no task, descriptor, process or thread behind."""

    async def watched() -> None:
        await asyncio.wait_for(test(), 30)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left: {left}"

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(watched())
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("waitpid")]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


async def collect(engine: Engine, submit: Submit, on_delta: Callable[[int], None] | None = None) -> list[Delta]:
    deltas: list[Delta] = []
    async for delta in engine.stream(submit):
        deltas.append(delta)
        if on_delta is not None:
            on_delta(sum(len(one.tokens) for one in deltas))
    return deltas


def text(deltas: list[Delta]) -> tuple[list[int], str | None]:
    return [token for delta in deltas for token in delta.tokens], deltas[-1].finish_reason


def expected(submit: Submit) -> tuple[list[int], str]:
    return plain_answer(submit, VOCAB, CONTEXT)


def make_submits(count: int, max_tokens: int = 60) -> list[Submit]:
    return [
        submit_of(
            [1 + index, 2, 3], f"r{index}", drafter=("none", "fuzz")[index % 2], max_tokens=max_tokens, seed=index
        )
        for index in range(count)
    ]


def test_streams_give_the_plain_text() -> None:
    async def test() -> None:
        async with running("--step-s", "0") as (engine, stats):
            assert engine.is_ready
            assert engine.info is not None
            assert engine.info.drafters == ("none", "fuzz")
            submits = make_submits(8)
            answers = await asyncio.gather(*(collect(engine, submit) for submit in submits))
            assert [text(deltas) for deltas in answers] == [expected(submit) for submit in submits]
            assert answers[0][0].num_cached_prompt == 0
            assert answers[1][-1].record is not None
            assert answers[1][-1].record.num_accepted_tokens > 0
            assert stats[-1].pages_free == stats[-1].pages_total
            assert engine.num_running == engine.num_waiting == 0

    run(test)


def test_a_killed_worker_is_replaced_and_the_text_goes_on() -> None:
    async def test() -> None:
        async with running("--step-s", "0.004") as (engine, _):
            first = engine.worker_pid
            kills: list[int] = []

            def kill_at_ten(num_tokens: int) -> None:
                if num_tokens >= 10 and not kills:
                    assert engine.worker_pid is not None
                    os.kill(engine.worker_pid, signal.SIGKILL)
                    kills.append(engine.worker_pid)

            submits = make_submits(7)  # more than rows: some wait while the worker dies
            answers = await asyncio.gather(*(collect(engine, submit, kill_at_ten) for submit in submits))
            assert kills == [first]
            assert [text(deltas) for deltas in answers] == [expected(submit) for submit in submits]
            assert all(sum(delta.num_cached_prompt is not None for delta in deltas) == 1 for deltas in answers)
            assert engine.num_restarts == 1
            assert engine.worker_pid != first

    run(test)


def test_the_third_death_ends_every_stream_with_one_error() -> None:
    async def test() -> None:
        async with running("--crash-on", "7") as (engine, _):
            deadly = submit_of([7], "deadly")
            others = make_submits(3, max_tokens=300)
            outcomes = await asyncio.gather(
                *(collect(engine, submit) for submit in [deadly, *others]), return_exceptions=True
            )
            assert all(isinstance(outcome, EngineUnavailable) for outcome in outcomes), outcomes
            assert engine.is_dead
            assert not engine.is_ready
            assert engine.num_restarts == 2
            with pytest.raises(EngineUnavailable, match="died 3 times"):
                await collect(engine, make_submits(1)[0])

    run(test)


def test_a_closed_stream_aborts_and_frees_its_pages() -> None:
    async def test() -> None:
        async with running("--step-s", "0.004") as (engine, stats):
            stream = engine.stream(submit_of([1, 2, 3], max_tokens=390))
            await anext(stream)
            assert engine.num_running == 1
            await stream.aclose()
            await until(lambda: stats[-1].pages_free == stats[-1].pages_total)
            assert stats[-1].num_running == 0
            assert engine.num_running == engine.num_waiting == 0

    run(test)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_full_queue_refuses_with_retry_after() -> None:
    async def test() -> None:
        async with running("--step-s", "0.004") as (engine, _):
            tasks = [asyncio.create_task(collect(engine, submit)) for submit in make_submits(8)]
            await until(lambda: engine.num_running == 4)
            assert engine.num_waiting == 4
            with pytest.raises(Overloaded) as caught:
                await collect(engine, submit_of([1], "late"))
            assert caught.value.retry_after_s is not None
            await asyncio.gather(*tasks)
            assert text(await collect(engine, submit_of([1], "late"))) == expected(submit_of([1], "late"))

    run(test)


def test_one_bad_request_fails_alone() -> None:
    async def test() -> None:
        async with running() as (engine, _):
            good = make_submits(2)
            bad = submit_of([VOCAB], "bad")
            outcomes = await asyncio.gather(
                *(collect(engine, submit) for submit in [bad, *good]), return_exceptions=True
            )
            assert isinstance(outcomes[0], RequestFailed)
            assert [text(deltas) for deltas in outcomes[1:]] == [expected(submit) for submit in good]  # type: ignore[arg-type]

    run(test)


def test_drain_lets_answers_end_and_admits_no_more() -> None:
    async def test() -> None:
        async with running("--step-s", "0.004") as (engine, _):
            submit = make_submits(1)[0]
            task = asyncio.create_task(collect(engine, submit))
            await until(lambda: engine.num_running == 1)
            assert not await engine.drain(0.01)
            assert engine.is_draining
            assert not engine.is_ready
            with pytest.raises(EngineUnavailable):
                await collect(engine, submit_of([1], "late"))
            assert await engine.drain(10)
            assert text(task.result() if task.done() else await task) == expected(submit)

    run(test)


def test_close_ends_live_streams_with_an_error() -> None:
    async def test() -> None:
        async with running("--step-s", "0.01") as (engine, _):
            task = asyncio.create_task(collect(engine, submit_of([1], max_tokens=390)))
            await until(lambda: engine.num_running == 1)
            await engine.close()
            with pytest.raises(EngineUnavailable):
                await task

    run(test)


def test_a_refusal_is_one_line() -> None:
    async def test() -> None:
        with pytest.raises(StartupError, match=r"^this model is not to be served$"):
            async with running("--refuse"):
                pass

    run(test)


def test_a_worker_that_cannot_start_is_given_up() -> None:
    async def test() -> None:
        with pytest.raises(StartupError, match="died 3 times"):
            async with running("--crash"):
                pass

    run(test)


def test_requests_before_ready_are_unavailable_and_close_does_not_wait_for_loading() -> None:
    async def test() -> None:
        engine = Engine(settings(), worker_command=(sys.executable, "-m", "tests.fake_worker"))
        await engine.start()
        with pytest.raises(EngineUnavailable) as caught:
            await collect(engine, submit_of([1]))
        assert caught.value.retry_after_s is not None
        await engine.close()
        assert engine.worker_pid is None

    run(test)
