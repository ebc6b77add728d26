"""A worker that hangs is a death like any other: noticed, killed, replaced, and the streams go on to the same text."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress

import pytest

from server import supervisor
from server.errors import Overloaded, StartupError
from server.worker_process import WorkerProcess
from tests.api.test_engine import collect, expected, make_submits, run, running, submit_of, text, until


def test_a_stopped_worker_is_replaced_and_the_text_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with running("--step-s", "0.004", worker_timeout_s=1.0) as (engine, _):
            first = engine.worker_pid
            assert first is not None
            stops: list[float] = []

            def stop_at_ten(num_tokens: int) -> None:
                if num_tokens >= 10 and not stops:
                    os.kill(first, signal.SIGSTOP)
                    stops.append(time.monotonic())

            submits = make_submits(7)
            tasks = [asyncio.create_task(collect(engine, submit, stop_at_ten)) for submit in submits]
            await until(lambda: engine.num_restarts == 1)  # it may be ready again within a millisecond
            assert 0.9 < time.monotonic() - stops[0] < 3
            assert [text(deltas) for deltas in await asyncio.gather(*tasks)] == [expected(one) for one in submits]
            assert engine.num_restarts == 1
            assert engine.worker_pid != first
            with pytest.raises(ProcessLookupError):
                os.kill(first, signal.SIGCONT)  # it will not come back beside the new one

    run(test)
    assert "the worker process has not answered for 1 s and is killed" in caplog.text
    assert "the worker process died (exit code -9), death 1 of 3" in caplog.text


def test_a_worker_that_cannot_be_killed_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that waits in the kernel for a device that does not come back."""
    monkeypatch.setattr(supervisor, "EXIT_GRACE_S", 0.2)
    monkeypatch.setattr(supervisor, "LAST_WORDS_S", 0.1)

    async def test() -> None:
        async with running("--step-s", "0.004", worker_timeout_s=0.6) as (engine, _):
            first = engine.worker_pid
            assert first is not None
            with monkeypatch.context() as patch:
                patch.setattr(WorkerProcess, "kill", lambda process: None)
                os.kill(first, signal.SIGSTOP)
                await until(lambda: engine.num_restarts == 1 and engine.is_ready)
            assert engine.worker_pid != first
            submit = submit_of([1, 2], max_tokens=20)
            assert text(await collect(engine, submit)) == expected(submit)
            os.kill(first, signal.SIGKILL)
            await asyncio.sleep(0.2)  # until it is gone

    run(test)
    assert "cannot be ended" in caplog.text


def test_a_server_ends_although_its_worker_cannot_be_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "EXIT_GRACE_S", 0.2)

    async def test() -> None:
        with monkeypatch.context() as patch:
            async with running() as (engine, _):
                pid = engine.worker_pid
                assert pid is not None
                patch.setattr(WorkerProcess, "kill", lambda process: None)
                os.kill(pid, signal.SIGSTOP)
                began = time.monotonic()
            assert time.monotonic() - began < 3
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.2)  # until it is gone

    run(test)
    assert "cannot be ended" in caplog.text


def test_an_idle_worker_that_is_stopped_is_noticed_and_one_that_answers_stays() -> None:
    async def test() -> None:
        async with running(worker_timeout_s=0.6) as (engine, _):
            pid = engine.worker_pid
            assert pid is not None
            await asyncio.sleep(1.3)
            assert engine.worker_pid == pid, "idle, but not silent: it is asked and answers"
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: engine.num_restarts == 1 and engine.is_ready)

    run(test)


def test_slow_steps_and_long_preparation_are_no_hang() -> None:
    async def test() -> None:
        async with running("--step-s", "0.5", "--prepare-s", "1.7", worker_timeout_s=0.8) as (engine, _):
            await asyncio.sleep(0.1)  # the worker has begun to prepare
            submit = submit_of([1, 2], max_tokens=3)
            assert text(await collect(engine, submit)) == expected(submit)
            assert engine.num_restarts == 0

    run(test)


def test_a_worker_that_never_loads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_DEATHS", 1)

    async def test() -> None:
        with pytest.raises(StartupError, match=r"died 1 times; the last one has not finished loading for 0\.3 s"):
            async with running("--load-s", "60", worker_timeout_s=0.6, load_timeout_s=0.3):
                pass

    run(test)


def test_what_waits_for_a_stopped_worker_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_UNSENT_BYTES", 100_000)

    async def test() -> None:
        async with running(max_queued=100_000) as (engine, _):
            assert engine.worker_pid is not None
            os.kill(engine.worker_pid, signal.SIGSTOP)
            refused = 0
            for index in range(40):  # 800 kB, from clients that do not stay
                stream = engine.stream(submit_of([1] * 20_000, f"r{index}"))
                try:
                    await asyncio.wait_for(anext(stream), 0.01)
                except Overloaded as error:
                    refused += error.retry_after_s is not None
                except TimeoutError:
                    pass
                with suppress(TimeoutError):
                    await stream.aclose()  # type: ignore[attr-defined]
            assert 5 < refused < 40
            os.kill(engine.worker_pid, signal.SIGCONT)
            await until(lambda: not engine._supervisor.is_behind)
            submit = submit_of([1, 2], "late")
            assert text(await collect(engine, submit)) == expected(submit)

    run(test)
