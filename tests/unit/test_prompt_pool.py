"""Prompts that take too long or too much: they end alone, with a reason, and others go on."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from server import prompt_pool
from server.config import Settings
from server.errors import ContextTooLong, EngineUnavailable, InvalidRequest, Overloaded
from server.prompt import Scribe
from tests.api.model_folder import END, TEMPLATE, make_folder

TRAPS = (
    "{% set text = messages[-1].content %}"
    "{% if text == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if text == 'memory' %}{{ 'x' * 20000000000 }}{% endif %}"
    "{% macro deep() %}{{ deep() }}{% endmacro %}{% if text == 'deep' %}{{ deep() }}{% endif %}"
    r"{% if text == 'half' %}{{ '\ud83d' }}{% endif %}"
)


@pytest.fixture(scope="module")
def scribe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scribe]:
    folder = make_folder(tmp_path_factory.mktemp("model"), template=TRAPS + TEMPLATE)
    scribe = Scribe(Settings(model=str(folder), prompt_timeout_s=0.4))
    yield scribe
    scribe.close()


def ask(scribe: Scribe, text: str) -> Awaitable[tuple[int, ...]]:
    return scribe.chat([{"role": "user", "content": text}], 1000)


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scene()

    asyncio.run(bounded())


async def is_well(scribe: Scribe) -> bool:
    return (await ask(scribe, "ok"))[2:-2] == tuple(b"ok")


async def busy(scribe: Scribe, num: int) -> None:
    while len(scribe._pool._tasks) < num:
        await asyncio.sleep(0.005)


def test_a_template_that_loops_is_ended(scribe: Scribe) -> None:
    async def scene() -> None:
        await scribe.start()
        loops = [asyncio.ensure_future(ask(scribe, "loop")) for _ in range(2)]
        await busy(scribe, 2)
        started = time.monotonic()
        assert await is_well(scribe)
        assert time.monotonic() - started < 10, "the time limit, and a start on a busy machine"
        for loop in loops:
            with pytest.raises(InvalidRequest, match=r"'messages' took longer than 0\.4 s"):
                await loop

    run(scene)


@pytest.mark.parametrize(
    ("text", "words"),
    [("memory", "1024 MiB of memory"), ("half", "half of a surrogate pair"), ("deep", "RecursionError")],
)
def test_a_template_that_cannot_be_borne_is_told(scribe: Scribe, text: str, words: str) -> None:
    async def scene() -> None:
        with pytest.raises(InvalidRequest, match=words) as caught:
            await ask(scribe, text)
        assert caught.value.param == "messages"
        assert await is_well(scribe)

    run(scene)


def test_a_process_that_was_killed_is_replaced(scribe: Scribe) -> None:
    async def scene() -> None:
        assert await is_well(scribe)
        for process in scribe._pool._living:
            os.kill(process._child.pid, signal.SIGKILL)
            process._child.wait()
        assert await is_well(scribe)

    run(scene)


def test_large_prompts_leave_room_for_others(scribe: Scribe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_pool, "LARGE_CHARS", len("user") + 3)

    async def scene() -> None:
        ended: list[float] = []
        large = [asyncio.ensure_future(ask(scribe, "loop")) for _ in range(3)]
        for one in large:
            one.add_done_callback(lambda _: ended.append(time.monotonic()))
        await busy(scribe, 1)
        assert await is_well(scribe)
        results = await asyncio.gather(*large, return_exceptions=True)
        assert [type(result) for result in results] == [InvalidRequest] * 3
        assert all(after - before > 0.3 for before, after in pairwise(ended)), "one after the other"

    run(scene)


def test_who_goes_away_leaves_the_queue(scribe: Scribe) -> None:
    async def scene() -> None:
        pool = scribe._pool
        loops = [asyncio.ensure_future(ask(scribe, "loop")) for _ in range(2)]
        await busy(scribe, 2)
        waiting = [asyncio.ensure_future(ask(scribe, "loop")) for _ in range(5)]
        await asyncio.sleep(0.05)
        for task in (*waiting, loops[0]):
            task.cancel()
        await asyncio.gather(*waiting, *loops, return_exceptions=True)
        assert not pool._waiting
        assert await is_well(scribe)
        assert pool._num_large == 0

    run(scene)


def test_closing_does_not_wait(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, template=TRAPS + TEMPLATE)
    scribe = Scribe(Settings(model=str(folder)))

    async def scene() -> None:
        await scribe.start()
        pids = [process._child.pid for process in scribe._pool._living]
        asked = [asyncio.ensure_future(ask(scribe, "loop")) for _ in range(3)]
        await busy(scribe, 2)
        scribe.close()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(result) for result in results] == [EngineUnavailable] * 3
        with pytest.raises(EngineUnavailable):
            await ask(scribe, "ok")
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)

    run(scene)


async def until_killed(scribe: Scribe, how: signal.Signals) -> None:
    """Kill the process that works on the only job."""
    await busy(scribe, 1)
    (process,) = scribe._pool._living - set(scribe._pool._idle)
    os.kill(process._child.pid, how)


async def settled(scribe: Scribe) -> None:
    """All processes are there and free."""
    await is_well(scribe)
    scribe._pool._replenish()
    while scribe._pool._tasks or len(scribe._pool._idle) < prompt_pool.NUM_PROCESSES:
        scribe._pool._replenish()
        await asyncio.sleep(0.005)


def test_a_job_survives_the_end_of_its_process(scribe: Scribe) -> None:
    async def scene() -> None:
        await settled(scribe)
        job = asyncio.ensure_future(ask(scribe, "loop"))
        await until_killed(scribe, signal.SIGKILL)
        with pytest.raises(InvalidRequest, match=r"took longer than 0\.4 s"):  # of its second process
            await job

    run(scene)


def test_who_loses_every_process_is_not_to_blame(scribe: Scribe, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        await settled(scribe)

        async def ask_dying(process: prompt_pool._Process, message: object) -> object:
            process.kill()
            raise EOFError

        with monkeypatch.context() as patch:
            patch.setattr(prompt_pool._Process, "ask", ask_dying)
            patch.setattr(scribe._pool, "_replenish", lambda: None)
            with pytest.raises(EngineUnavailable, match="ended unexpectedly") as caught:
                await ask(scribe, "ok")
            assert caught.value.retry_after_s
        assert await is_well(scribe)

    run(scene)


def test_many_requests_at_once_start_no_more_processes_than_there_are(tmp_path: Path) -> None:
    scribe = Scribe(Settings(model=str(make_folder(tmp_path))))

    async def scene() -> None:
        asked = [asyncio.ensure_future(ask(scribe, "ok")) for _ in range(50)]
        while not all(task.done() for task in asked):
            assert len(scribe._pool._living) <= prompt_pool.NUM_PROCESSES
            await asyncio.sleep(0)
        await asyncio.gather(*asked)
        assert not scribe._pool._coming

    run(scene)
    scribe.close()


def test_prompts_that_wait_are_bounded(scribe: Scribe, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        await settled(scribe)
        loops = [asyncio.ensure_future(ask(scribe, "loop")) for _ in range(2)]
        await busy(scribe, 2)
        monkeypatch.setattr(prompt_pool, "MAX_WAITING_CHARS", 5)
        alone = asyncio.ensure_future(ask(scribe, "more than five"))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await ask(scribe, "ok")
        assert caught.value.retry_after_s
        assert len(scribe._pool._waiting) == 1
        await asyncio.gather(*loops, return_exceptions=True)
        assert await alone

    run(scene)


def test_a_large_prompt_follows_one_that_failed(scribe: Scribe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is free all the time; none that is to be started is needed."""
    monkeypatch.setattr(prompt_pool, "LARGE_CHARS", 0)

    async def scene() -> None:
        await settled(scribe)
        with monkeypatch.context() as patch:
            patch.setattr(scribe._pool, "_replenish", lambda: None)
            failing = asyncio.ensure_future(ask(scribe, "loop"))
            await busy(scribe, 1)
            next_one = asyncio.ensure_future(ask(scribe, "ok"))
            async with asyncio.timeout(5):
                await asyncio.gather(failing, next_one, return_exceptions=True)
            assert next_one.exception() is None

    run(scene)


def test_closing_during_a_start_is_clean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scribes = [Scribe(Settings(model=str(make_folder(tmp_path)))) for _ in range(2)]

    async def scene() -> None:
        asked = [asyncio.ensure_future(ask(scribe, "ok")) for scribe in scribes]
        await asyncio.sleep(0)
        early, late = scribes
        early.close()  # its process is to be started by a task that has not run
        await asyncio.sleep(0)
        assert not early._pool._living
        assert late._pool._living
        late.close()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(result) for result in results] == [EngineUnavailable] * 2
        while any(scribe._pool._tasks for scribe in scribes):
            await asyncio.sleep(0.005)

    with caplog.at_level(logging.WARNING):
        run(scene)
    assert not caplog.records


def test_a_chat_of_special_tokens_is_refused_in_little_memory(tmp_path: Path) -> None:
    """Millions of characters: encoded as a whole they take gigabytes, and each mark for one token took more."""
    scribe = Scribe(Settings(model=str(make_folder(tmp_path))))
    texts = ("<|end|>" * 250, "words go on " * 146)
    messages = [{"role": ("user", "assistant")[i % 2], "content": texts[i % 2]} for i in range(1999)]

    async def scene() -> None:
        with pytest.raises(ContextTooLong, match="has more than 225000 tokens"):
            await scribe.chat(messages, 225_000)
        with pytest.raises(ContextTooLong, match="has more than 225000 tokens"):
            await scribe.chat([{"role": "user", "content": "<|end|>" * 500_000}], 225_000)
        for process in scribe._pool._living:
            peak = Path(f"/proc/{process._child.pid}/status").read_text().split("VmHWM:")[1].split()[0]
            assert int(peak) < 300 * 1024
        assert (await scribe.chat(messages[:3], 6000)).count(END) == 3

    run(scene)
    scribe.close()
