"""When a silent worker counts as one that hangs."""

from __future__ import annotations

from itertools import count

import pytest

from server.messages import Busy, Outcome, Pong, Ready
from server.watch import TICKS, Watch
from server.worker.step_cost import Profile, StepCost, StepSample

READY = Ready(256, 50, ("none",), "toy", "none")


def silence(watch: Watch) -> tuple[list[int], int]:
    """(ticks at which the worker is asked for a sign of life, tick at which the silence is too long)."""
    asked = []
    for number in count(1):
        if watch.tick():
            asked.append(number)
        if watch.is_over:
            return asked, number


def watch_of(*messages: object) -> Watch:
    watch = Watch(answer_s=60.0, load_s=600.0)
    for message in messages:
        watch.on_bytes()
        watch.on_message(message)  # type: ignore[arg-type]
    return watch


def test_a_worker_that_loads_has_its_own_limit_and_is_not_asked() -> None:
    assert silence(watch_of()) == ([], 10 * TICKS)
    assert silence(watch_of(Busy(1e6))) == ([], 10 * TICKS), "who has not loaded cannot ask for more"


def test_a_ready_worker_is_asked_once_long_before_it_is_given_up() -> None:
    assert silence(watch_of(READY)) == ([TICKS // 3], TICKS)


def test_any_byte_breaks_the_silence() -> None:
    watch = watch_of(READY)
    for _ in range(3 * TICKS):
        watch.tick()
        watch.on_bytes()
        assert not watch.is_over
    assert silence(watch) == ([TICKS // 3], TICKS)


@pytest.mark.parametrize("ended", [Pong(), Outcome((), (), None)])
def test_the_limit_is_longer_by_what_is_announced_and_only_until_it_is_over(ended: object) -> None:
    assert silence(watch_of(READY, Busy(300)))[1] == 6 * TICKS
    assert silence(watch_of(READY, Busy(300), ended))[1] == TICKS


def cost_of(**seconds: float) -> StepCost:
    """Of single rows: n4=0.1 are 4 positions in 0.1 s."""
    return StepCost(Profile(tuple(StepSample(int(name[1:]), 1, took) for name, took in seconds.items())), 2048)


def test_the_bound_of_a_step_grows_in_proportion_beyond_what_was_measured() -> None:
    """Steps of 1 and 4 positions that wait for memory take the same time; a line through them would stay flat."""
    cost = cost_of(n1=1.0, n4=1.0)
    assert cost.shape_s(2048, 1) == pytest.approx(1.0)
    assert cost.bound_s(2048, 1) == pytest.approx(512.0)
    assert cost.bound_s(3, 1) == pytest.approx(1.0)
    assert cost_of(n1=0.1, n2048=2.0).bound_s(2048, 1) == pytest.approx(2.0)


def test_the_bound_of_a_step_survives_a_measurement_that_was_disturbed() -> None:
    assert cost_of(n1=0.03, n2=0.03, n4=0.7).bound_s(2048, 1) == pytest.approx(0.03 * 1024)
