"""When a silent worker counts as one that hangs."""

from __future__ import annotations

from itertools import count

import pytest
from server.worker.cost import CostCurve, Sample, StepCost

from server.messages import Busy, Outcome, Pong, Ready
from server.watch import TICKS, Watch

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


def test_the_bound_of_a_step_grows_in_proportion_beyond_what_was_measured() -> None:
    """Steps of 1 and 4 positions that wait for memory take the same time; a line through them would stay flat."""
    cost = StepCost.fit([Sample(1, 1, 1.0), Sample(4, 1, 1.0)], 2048)
    assert cost.positions.at(2048) == pytest.approx(1.0)
    assert cost.bound_s(2048, 1) == pytest.approx(512.0)
    assert cost.bound_s(3, 1) == pytest.approx(1.0)
    assert CostCurve([1, 2048], [0.1, 2.0]).bound(2048) == pytest.approx(2.0)


def test_the_bound_of_a_step_survives_a_measurement_that_was_disturbed() -> None:
    cost = StepCost.fit([Sample(1, 1, 0.03), Sample(2, 1, 0.03), Sample(4, 1, 0.7)], 2048)
    assert cost.bound_s(2048, 1) == pytest.approx(0.03 * 1024)
