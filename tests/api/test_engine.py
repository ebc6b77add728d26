"""The engine gate and its supervisor over real child processes that run a toy target."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server import supervisor
from server.config import Settings
from server.engine import Engine
from server.errors import EngineUnavailable, Overloaded, RequestFailed, StartupError
from server.messages import Delta, StepStats, Submit
from tests.fakes import FakeGeometry, plain_answer, submit_of

VOCAB = FakeGeometry().vocab_size
CONTEXT = 400
WORKER = (sys.executable, "-m", "tests.fake_worker")


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
    engine = Engine(settings(**changes), stats.append, worker_command=(*WORKER, *options))
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

    before, children = len(os.listdir("/proc/self/fd")), own_children()
    asyncio.run(watched())
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("waitpid")]
    assert own_children() <= children


def own_children() -> set[str]:
    """Processes of this one, those that nobody has waited for included; tests of other files may have left some."""
    found: set[str] = set()
    for file in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that just ended
            found.update((file / "children").read_text().split())
    assert Path(f"/proc/self/task/{os.getpid()}/children").exists(), "this kernel does not tell of children"
    return found


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


def test_a_slow_client_gets_what_is_new_at_once() -> None:
    async def test() -> None:
        async with running("--step-s", "0") as (engine, _):
            submit = submit_of([1, 2], max_tokens=200, num_logprobs=2)
            deltas: list[Delta] = []
            async for delta in engine.stream(submit):
                deltas.append(delta)
                await asyncio.sleep(0.3)
            assert len(deltas) < 20
            assert text(deltas) == expected(submit)
            assert deltas[0].num_cached_prompt == 0
            assert deltas[-1].record is not None
            logprobs = [one for delta in deltas for one in delta.logprobs or ()]
            assert [one.logprob for one in logprobs] == [-token / 8 for token in expected(submit)[0]]
            assert all(len(one.top) == 2 for one in logprobs)

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


def test_a_worker_that_hangs_up_but_does_not_end_is_down_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "EXIT_GRACE_S", 2.5)

    async def test() -> None:
        async with running("--hang-up-on", "7", "--step-s", "0.05") as (engine, _):
            task = asyncio.create_task(collect(engine, submit_of([7], "fatal")))
            await until(lambda: not engine.is_ready, timeout_s=1)
            assert engine.num_restarts == 0
            with pytest.raises(EngineUnavailable):
                await collect(engine, submit_of([1], "late"))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: engine.num_restarts == 1 and engine.is_ready)

    run(test)


def test_the_worker_is_told_no_api_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORETOKEN_API_KEY", "sk-environment")
    monkeypatch.setenv("FORETOKEN_Api_Key", "sk-another-case")  # is read too

    async def test() -> None:
        told = tmp_path / "told"
        async with running("--tell", str(told), api_key=("sk-settings",)) as (engine, _):
            assert engine.is_ready
            assert "toy" in told.read_text()
            assert "sk-" not in told.read_text()

    run(test)


def test_a_closed_stream_aborts_and_frees_its_pages() -> None:
    async def test() -> None:
        async with running("--step-s", "0.02") as (engine, stats):
            stream = engine.stream(submit_of([1, 2, 3], max_tokens=390))  # would take eight seconds
            await anext(stream)
            assert engine.num_running == 1
            await stream.aclose()
            await until(lambda: stats[-1].pages_free == stats[-1].pages_total, timeout_s=1)
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


def test_a_refusal_is_one_line_and_not_tried_again() -> None:
    async def test() -> None:
        engine = Engine(settings(), worker_command=(*WORKER, "--refuse"))
        await engine.start()
        with pytest.raises(StartupError, match=r"^this model is not to be served$"):
            await engine.wait_ready()
        await until(lambda: engine.worker_pid is None)
        await asyncio.sleep(0.1)
        assert engine.worker_pid is None
        assert engine.num_restarts == 0
        assert engine.is_dead
        await engine.close()

    run(test)


def test_a_worker_that_cannot_start_is_given_up() -> None:
    async def test() -> None:
        with pytest.raises(StartupError, match="died 3 times"):
            async with running("--crash"):
                pass

    run(test)


def test_an_error_while_loading_is_final_at_first_and_a_death_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "loaded"
    monkeypatch.setattr(supervisor, "RESTART_PAUSE_S", 0.001)

    async def test() -> None:
        async with running("--load-once", str(flag)) as (engine, _):
            task = asyncio.create_task(collect(engine, submit_of([1], max_tokens=390)))
            await until(lambda: engine.num_running == 1)
            assert engine.worker_pid is not None
            os.kill(engine.worker_pid, signal.SIGKILL)
            with pytest.raises(EngineUnavailable, match="died 3 times; the last one said: cannot load toy: FileExists"):
                await task
            assert engine.num_restarts == 2
            assert engine.is_dead
        with pytest.raises(StartupError, match=r"^cannot load toy: FileExistsError"):
            async with running("--load-once", str(flag)):
                pass

    run(test)


def test_what_a_second_worker_lacks_may_be_there_some_pauses_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory, above all."""
    flag = tmp_path / "loaded"
    monkeypatch.setattr(supervisor, "RESTART_PAUSE_S", 0.25)
    monkeypatch.setattr(supervisor, "MAX_DEATHS", 4)
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(delay: float) -> None:
        if delay >= 0.25:
            pauses.append(delay)
            if len(pauses) == 2:
                flag.unlink()
        await sleep(delay)

    async def test() -> None:
        async with running("--load-once", str(flag)) as (engine, _):
            submit = submit_of([1], max_tokens=390)
            task = asyncio.create_task(collect(engine, submit))
            await until(lambda: engine.num_running == 1)
            assert engine.worker_pid is not None
            os.kill(engine.worker_pid, signal.SIGKILL)
            assert text(await task) == expected(submit)
            assert engine.num_restarts == 3
            assert pauses == [0.25, 0.5]

    monkeypatch.setattr(supervisor.asyncio, "sleep", noted)
    run(test)


def test_requests_before_ready_are_unavailable_and_close_does_not_wait_for_loading() -> None:
    async def test() -> None:
        engine = Engine(settings(), worker_command=(*WORKER, "--load-s", "60"))
        await engine.start()
        with pytest.raises(EngineUnavailable) as caught:
            await collect(engine, submit_of([1]))
        assert caught.value.retry_after_s is not None
        await until(lambda: engine.worker_pid is not None)
        async with asyncio.timeout(3):
            await engine.close()
        assert engine.worker_pid is None

    run(test)


def test_many_streams_cut_at_random_leave_nothing_behind() -> None:
    async def test() -> None:
        rng = random.Random(5)
        async with running("--step-s", "0", max_num_seqs=16, max_queued=64, num_pages=120) as (engine, stats):
            for round_ in range(4):
                await asyncio.gather(*(visit(engine, rng, f"{round_}.{index}") for index in range(64)))
                await until(lambda: stats[-1].pages_free == stats[-1].pages_total, timeout_s=1)
                assert engine.num_running == engine.num_waiting == 0

    async def visit(engine: Engine, rng: random.Random, request_id: str) -> None:
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
        submit = submit_of(prompt, request_id, drafter="fuzz", max_tokens=rng.randint(1, 80), seed=rng.randrange(9))
        limit = rng.randrange(20) if rng.random() < 1 / 3 else 1000
        stream = engine.stream(submit)
        tokens: list[int] = []
        async for delta in stream:
            tokens += delta.tokens
            if len(tokens) > limit:
                await stream.aclose()  # type: ignore[attr-defined]
                break
        wanted = expected(submit)[0]
        assert tokens == (wanted if limit == 1000 else wanted[: len(tokens)])

    run(test)


def test_ctrl_c_is_not_for_the_worker_but_sigterm_is() -> None:
    async def test() -> None:
        async with running() as (engine, _):
            pid = engine.worker_pid
            assert pid is not None
            assert os.getpgid(pid) != os.getpgid(0)
            os.kill(pid, signal.SIGINT)
            submit = make_submits(1)[0]
            assert text(await collect(engine, submit)) == expected(submit)
            assert engine.worker_pid == pid
            os.kill(pid, signal.SIGTERM)
            await until(lambda: engine.num_restarts == 1)
            await until(lambda: engine.is_ready)
            assert text(await collect(engine, submit)) == expected(submit)

    run(test)


ORPHAN = """
import asyncio, sys
from tests.api.test_engine import WORKER, settings
from server.engine import Engine

async def main():
    engine = Engine(settings(), worker_command=WORKER)
    await engine.start()
    await engine.wait_ready()
    print(engine.worker_pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_worker_does_not_outlive_a_killed_api_process() -> None:
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    ) as api:
        assert api.stdout is not None
        pid = int(api.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        api.kill()
    deadline = time.monotonic() + 5
    while is_running(pid):
        assert time.monotonic() < deadline, "the worker is an orphan"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_after_a_lost_device_the_next_worker_is_more_careful(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with running("--lose-device") as (engine, _):
            assert engine.num_restarts == 2
            submit = submit_of([1, 2], max_tokens=5)
            assert text(await collect(engine, submit)) == expected(submit)

    run(test)
    assert "(--eager)" in caplog.text
    assert "(--attention sdpa)" in caplog.text


def test_a_process_in_reserve_takes_over() -> None:
    async def test() -> None:
        async with running("--step-s", "0.004") as (engine, _):
            first, reserve = engine.worker_pid, engine._supervisor._reserve
            assert first is not None
            assert reserve is not None
            os.kill(first, signal.SIGKILL)
            await until(lambda: engine.num_restarts == 1 and engine.is_ready)
            assert engine.worker_pid == reserve.pid
            again = engine._supervisor._reserve
            assert again is not None
            again.kill()  # it may die too: then a new one is started
            await again.wait(5)
            os.kill(reserve.pid, signal.SIGKILL)
            await until(lambda: engine.num_restarts == 2 and engine.is_ready)
            assert engine.worker_pid not in (first, reserve.pid, again.pid)
            submit = submit_of([1, 2], max_tokens=5)
            assert text(await collect(engine, submit)) == expected(submit)

    run(test)
