"""The worker's conversation with the API process, in a thread over a socket pair and a toy target."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import pytest

from drafters.base import Drafter
from server.config import Settings
from server.errors import StartupError
from server.messages import (
    Abort,
    Awake,
    Busy,
    FromWorker,
    Outcome,
    Ping,
    Pong,
    Ready,
    Refused,
    Shutdown,
    frame,
)
from server.worker.channel import Channel, ChannelClosed
from server.worker.main import Work, load, serve
from tests.fakes import FuzzDrafter, make_loop, plain_answer, submit_of
from verifier.ipc import FrameReader

SETTINGS = Settings(model="toy", log_level="warning")
READY = Ready(256, 50, ("none", "fuzz"), "toy", "none")


class FakeWaking:
    """Has so many turns to do while nobody waits, and wakes with the last. Owns what it was told."""

    takes_long = False
    is_awake = False

    def __init__(self, num_turns: int = 3) -> None:
        self.told: list[bool] = []
        self.done = threading.Event()
        self._num_turns = num_turns

    def __call__(self, is_idle: bool) -> bool:
        self.told.append(is_idle)
        if self.told.count(True) == self._num_turns:
            self.is_awake = True
            self.done.set()
        return self.told.count(True) < self._num_turns


class Keeper(FuzzDrafter):
    num_saves = 0

    def save(self) -> None:
        self.num_saves += 1


@dataclass
class Talk:
    """The API process's side of one worker."""

    load: Callable[[Settings], Work]
    found: list[FromWorker] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        ours, self.socket = socket.socketpair()
        self.socket.settimeout(10)
        self._channel = Channel(ours)
        self._reader = FrameReader()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        try:
            serve(self._channel, self.load)
        except BaseException as error:
            self.errors.append(error)
        finally:
            self._channel.close()

    def send(self, *messages: object) -> None:
        self.socket.sendall(b"".join(frame(message) for message in messages))

    def hear(self) -> FromWorker:
        """The next message that is no sign of life."""
        while isinstance(message := self.hear_any(), Pong | Busy | Awake):
            pass
        return message

    def hear_any(self) -> FromWorker:
        while not self.found:
            data = self.socket.recv(65536)
            assert data, "the worker hung up"
            bodies = self._reader.feed(data)
            self.found += [msgspec.msgpack.Decoder(FromWorker).decode(body) for body in bodies]
        return self.found.pop(0)

    def answer(self) -> list[int]:
        tokens: list[int] = []
        while True:
            outcome = self.hear()
            assert isinstance(outcome, Outcome)
            for delta in outcome.deltas:
                tokens += delta.tokens
                if delta.finish_reason is not None:
                    return tokens

    def end(self) -> None:
        self.socket.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


def toy(drafter: Drafter) -> Callable[[Settings], Work]:
    def load_toy(settings: Settings) -> Work:
        assert settings == SETTINGS
        return Work(make_loop(drafters={"fuzz": drafter}), READY)

    return load_toy


@pytest.fixture
def keeper() -> Keeper:
    return Keeper(0, 50)


@pytest.fixture
def talk(keeper: Keeper) -> Iterator[Talk]:
    talk = Talk(toy(keeper))
    yield talk
    talk.end()


def test_requests_run_until_shutdown_and_then_drafters_keep_what_they_learned(talk: Talk, keeper: Keeper) -> None:
    submit = submit_of([1, 2], drafter="fuzz", max_tokens=30)
    talk.send(SETTINGS, submit)  # nobody has to wait for Ready to speak
    assert talk.hear() == READY
    assert talk.answer() == plain_answer(submit, 50, 256)[0]
    assert keeper.num_saves == 0
    talk.send(Shutdown())
    talk.thread.join(10)
    assert not talk.thread.is_alive()
    assert keeper.num_saves == 1
    assert not talk.errors


def test_shutdown_finishes_nothing_more(talk: Talk, keeper: Keeper) -> None:
    talk.send(SETTINGS, submit_of([1, 2], max_tokens=200), Shutdown())
    assert talk.hear() == READY
    talk.thread.join(10)
    assert talk.socket.recv(100) == b""
    assert keeper.num_saves == 1


def test_a_lost_api_process_ends_the_worker_and_keeps_what_was_learned(talk: Talk, keeper: Keeper) -> None:
    talk.send(SETTINGS, submit_of([1, 2], max_tokens=200))
    assert talk.hear() == READY
    talk.end()
    assert keeper.num_saves == 1
    assert not talk.errors


def test_an_abort_is_heard_between_steps(talk: Talk) -> None:
    talk.send(SETTINGS, submit_of([1, 2], "a", max_tokens=250), Abort("a"), submit_of([3], "b", max_tokens=3))
    assert talk.hear() == READY
    assert talk.answer() == plain_answer(submit_of([3], max_tokens=3), 50, 256)[0]


def test_an_idle_worker_prepares_until_there_is_no_more_and_still_listens(keeper: Keeper) -> None:
    waking = FakeWaking()
    told, done = waking.told, waking.done
    talk = Talk(lambda _: Work(make_loop(drafters={"fuzz": keeper}), READY, waking))
    talk.send(SETTINGS)
    assert talk.hear() == READY
    assert done.wait(10)
    submit = submit_of([1, 2], drafter="fuzz", max_tokens=30)
    talk.send(submit)
    assert talk.answer() == plain_answer(submit, 50, 256)[0]
    talk.end()
    assert told[:3] == [True] * 3, "and then it waited"
    assert False in told[3:], "asked between steps, too"
    assert not talk.errors


def test_a_worker_answers_between_steps_and_says_when_it_prepares(keeper: Keeper) -> None:
    waking = FakeWaking(num_turns=1)
    waking.takes_long = waking.is_awake = True
    talk = Talk(lambda _: Work(make_loop(drafters={"fuzz": keeper}), READY, waking))
    talk.send(SETTINGS)
    assert [talk.hear_any() for _ in range(3)] == [READY, Busy(600), Pong()], "the first look at what there is to do"
    talk.send(Ping())
    assert talk.hear_any() == Pong(), "an idle worker answers at once, and does not say again that it prepares"
    talk.send(submit_of([1, 2], max_tokens=200), Ping())
    told = [talk.hear_any() for _ in range(20)]
    assert told.count(Pong()) == 1
    assert sum(isinstance(message, Outcome) for message in told) == 19
    talk.end()
    assert not talk.errors


def test_a_crash_keeps_nothing_and_is_not_hidden(keeper: Keeper) -> None:
    work = Work(make_loop(drafters={"fuzz": keeper}), READY)
    work.loop.scheduler.plan = lambda _: 1 // 0  # type: ignore[method-assign, assignment, return-value]
    talk = Talk(lambda _: work)
    talk.send(SETTINGS, submit_of([1]))
    talk.thread.join(10)
    talk.end()
    assert isinstance(talk.errors[0], ZeroDivisionError)
    assert keeper.num_saves == 0


def test_a_worker_that_cannot_load_says_why() -> None:
    def refuse(_: Settings) -> Work:
        raise StartupError("no such model")

    def fail(_: Settings) -> Work:
        raise KeyError("a library's\ntwo lines")

    talk = Talk(refuse)
    talk.send(SETTINGS)
    assert talk.hear() == Refused("no such model")
    talk.end()
    talk = Talk(fail)
    talk.send(SETTINGS)
    refused = talk.hear()
    assert isinstance(refused, Refused)
    assert not refused.is_final
    assert "KeyError" in refused.reason
    assert "\n" not in refused.reason
    talk.end()


def test_a_worker_without_an_api_process_ends() -> None:
    talk = Talk(toy(FuzzDrafter(0, 50)))
    talk.end()
    assert isinstance(talk.errors[0], ChannelClosed)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"max_num_seqs": 65, "max_num_batched_tokens": 64}, "max_num_batched_tokens"), ({"drafter": "what"}, "what")],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(changes: dict[str, object], word: str) -> None:
    with pytest.raises(StartupError, match=word):
        load(Settings(model="/nowhere", **changes))  # type: ignore[arg-type]
