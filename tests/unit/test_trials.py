"""The trial requests: they reach every drafter, leave nothing behind, and tell a model that cannot work."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from drafters.base import NOBODY, Drafter, RowContext
from server.errors import StartupError
from server.worker.loop import Loop
from server.worker.trials import try_all, try_target
from tests.fakes import FakeGeometry, FuzzDrafter, make_loop, plain_answer, submit_of


def test_every_drafter_is_tried_and_nothing_stays() -> None:
    drafters = {name: FuzzDrafter(0, 50) for name in ("a", "b")}
    given: dict[str, Drafter] = dict(drafters)
    loop = make_loop(drafters=given)
    try_all(loop, 50)
    assert all(drafter.num_verified > 0 and not drafter.rows for drafter in drafters.values())
    assert not loop.has_work
    book = loop.scheduler.roster.book
    assert book.num_free == book.num_usable
    loop.handle(submit_of([1, 2, 3, 4, 5, 6, 7, 8, 9], "client"))
    deltas = list(loop.step().deltas)
    assert deltas[0].num_cached_prompt == 0, "a client was answered from the trial's pages"
    while loop.has_work:
        deltas += loop.step().deltas
    answer = [token for delta in deltas for token in delta.tokens]
    assert answer == plain_answer(submit_of([1, 2, 3, 4, 5, 6, 7, 8, 9]), 50, 256)[0]


def test_a_tiny_context_is_warmed_up_too() -> None:
    loop = make_loop(FakeGeometry(max_model_len=3, num_pages=4, page_size=1))
    try_all(loop, 50)
    assert not loop.has_work


@pytest.mark.parametrize("trial", [try_target, try_all])
def test_a_model_without_finite_numbers_is_refused(trial: Callable[[Loop, int], None]) -> None:
    with pytest.raises(StartupError, match="not finite") as caught:
        trial(make_loop(poison=1), 50)
    assert not caught.value.is_final  # memory may have lacked: the same model served before, if this is a restart


def test_the_trials_come_from_nobody() -> None:
    tenants: set[str] = set()

    class Listening(FuzzDrafter):
        def start(self, row: int, context: RowContext) -> None:
            tenants.add(context.tenant)
            super().start(row, context)

    try_all(make_loop(drafters={"a": Listening(0, 50)}), 50)
    assert tenants == {NOBODY}
