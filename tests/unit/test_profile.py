"""Trial steps: every size runs by the contract of the verifier, in bounded time, and leaves nothing behind."""

from __future__ import annotations

import time

import numpy as np
import pytest

from drafters.base import Int32
from server.errors import StartupError
from server.worker import profile
from server.worker.draft_selection import best_prefix
from server.worker.drafting import Effort
from server.worker.profile import finish, measure_steps
from server.worker.step_cost import Profile, StepCost, StepSample
from server.worker.trials import measure, try_all
from tests.fakes import FakeGeometry, FakeVerifier, FuzzDrafter, StatesDrafter, make_loop, plain_answer, submit_of
from verifier.plan import StepPlan, Wanted
from verifier.tree import DraftTrees
from verifier.verdict import Verdict


class Timed(FakeVerifier):
    """Takes as long as it is told to: a + b per position."""

    base_s = 0.0
    position_s = 0.0

    def run(self, plan: StepPlan, trees: DraftTrees, wanted: Wanted) -> Verdict:
        began = time.perf_counter()
        verdict = super().run(plan, trees, wanted)
        num_positions = trees.num_nodes + sum(len(chunk.tokens) for chunk in plan.chunks)
        self.sizes.append((len(plan.trees), num_positions))
        time.sleep(max(0.0, self.base_s + self.position_s * num_positions - (time.perf_counter() - began)))
        return verdict

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes: list[tuple[int, int]] = []


def test_the_curve_is_what_steps_take() -> None:
    judge = Timed(FakeGeometry(num_pages=200))
    judge.base_s, judge.position_s = 0.004, 0.0002
    loop = make_loop(judge.geometry)
    cost = StepCost(Profile(tuple(finish(measure_steps(judge, loop.scheduler.roster, 50)))), 128)
    for size in (1, 8, 64, 128):
        assert cost.table[size] == pytest.approx(0.004 + 0.0002 * size, rel=0.3)
    assert cost.row_s < 0.0005
    assert (8, 8) in judge.sizes
    assert max(size for _, size in judge.sizes) == 128


def test_a_slow_model_is_measured_at_fewer_sizes_and_in_bounded_time() -> None:
    judge = Timed(FakeGeometry())
    judge.base_s, judge.position_s = 0.02, 0.001
    loop = make_loop(judge.geometry)
    began = time.perf_counter()
    samples = finish(measure_steps(judge, loop.scheduler.roster, 50, limit_s=0.2))
    assert time.perf_counter() - began < 1.5
    assert {sample.num_positions for sample in samples if sample.num_rows == 1} <= {1, 4, 16, 64}
    assert len(samples) > 1
    assert samples[1].seconds > samples[0].seconds


def test_nothing_stays_of_the_measurement() -> None:
    judge = FakeVerifier()
    loop = make_loop(judge.geometry, {"fuzz": FuzzDrafter(0, 50)})
    loop._verifier = judge
    try_all(loop, 50)
    finish(measure(loop, judge, 50))
    book = loop.scheduler.roster.book
    assert book.num_free == book.num_usable
    assert loop.speculator.cost is not None
    submit = submit_of(range(1, 10), "client", drafter="fuzz", max_tokens=40)
    loop.handle(submit)
    answer: list[int] = []
    while loop.has_work:
        answer += [token for delta in loop.step().deltas for token in delta.tokens]
        loop.scheduler.roster.check_integrity()
    assert answer == plain_answer(submit, 50, 256)[0]


def test_both_efforts_are_tried_with_one_row_and_with_several() -> None:
    asked: dict[str, set[int]] = {"full": set(), "cheap": set()}

    class Watched(StatesDrafter):
        def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
            asked["full"].add(rows.size)
            time.sleep(0.004)  # it pays, but nobody would go this way again by choice
            FuzzDrafter.propose(self, rows, max_nodes, out)

        def propose_cheap(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
            asked["cheap"].add(rows.size)
            FuzzDrafter.propose(self, rows, max_nodes, out)

    judge = Timed()
    judge.base_s = 0.004
    loop = make_loop(judge.geometry, {"states": Watched(0, 50, 4)})
    loop._verifier = judge
    finish(measure(loop, judge, 50))
    assert {1, 8} <= asked["full"]
    assert {1, 8} <= asked["cheap"]
    assert loop.speculator.trial_effort is None
    cost = loop.speculator.cost
    assert cost is not None
    assert cost.draft_s(Effort.FULL, 8) > 2 * cost.draft_s(Effort.CHEAP, 8)


def test_a_trial_that_fails_leaves_nothing_behind() -> None:
    judge = FakeVerifier(poison=3)  # a token of the trial prompt
    loop = make_loop(judge.geometry, {"fuzz": FuzzDrafter(0, 50)}, poison=3)
    with pytest.raises(StartupError, match="not finite"):
        finish(measure(loop, FakeVerifier(judge.geometry), 50))
    assert loop.speculator.trial_effort is None
    loop.step()
    assert not loop.has_work


@pytest.mark.parametrize(("max_model_len", "num_pages"), [(3, 4), (5, 64), (256, 2)])
def test_where_hardly_anything_fits_it_measures_what_does(max_model_len: int, num_pages: int) -> None:
    judge = FakeVerifier(FakeGeometry(max_model_len=max_model_len, num_pages=num_pages, page_size=1))
    loop = make_loop(judge.geometry)
    samples = finish(measure_steps(judge, loop.scheduler.roster, 50))
    assert all(sample.seconds > 0 for sample in samples)
    assert (not samples) == (num_pages == 2)
    assert loop.scheduler.roster.book.num_free == num_pages - 1


def test_a_size_that_fails_ends_the_measurement_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    class Small(FakeVerifier):
        def run(self, plan: StepPlan, trees: DraftTrees, wanted: Wanted) -> Verdict:
            if trees.num_nodes > 8:
                raise MemoryError("too large")
            return super().run(plan, trees, wanted)

    loop = make_loop()
    samples = finish(measure_steps(Small(), loop.scheduler.roster, 50))
    assert max(sample.num_positions for sample in samples) == 8
    assert "too large" in caplog.text
    assert loop.scheduler.roster.book.num_free == loop.scheduler.roster.book.num_usable


def test_the_ladder_goes_from_small_steps_to_large_ones() -> None:
    loop = make_loop(FakeGeometry(max_rows=8, max_positions=100))
    sizes = [rows * nodes for rows, nodes in profile._ladder(loop.scheduler.roster)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] == 64


def test_a_step_costs_what_it_is_padded_to() -> None:
    profile = Profile(tuple(StepSample(size, 1, 0.001 * size) for size in (1, 64)))
    cost = StepCost(profile, 100, (1, 16, 48, 64))
    assert cost.table[[1, 2, 16, 17, 48, 49, 64]] == pytest.approx([0.001, 0.016, 0.016, 0.048, 0.048, 0.064, 0.064])
    assert cost.table[65] == pytest.approx(0.065, rel=0.1)
    values, order = np.array([2.0, *[0.001] * 40]), np.arange(1, 41)
    count, _ = best_prefix(values, order, (cost.table, 3, 0.0), 1.0)
    assert 3 + count == 16, "what fills the step is free"
    for _ in range(50):
        cost.observe_step(20, 1, 0.048)
        cost.observe_step(16, 1, 0.016)
    assert cost.step_s(33, 1) == pytest.approx(0.048, rel=0.05)
