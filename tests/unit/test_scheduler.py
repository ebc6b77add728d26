"""Who runs, with how much, on which pages. Verdicts are made by hand: every row wins what the test says."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np

from server.messages import Delta, Submit
from server.worker.roster import Limits
from server.worker.scheduler import Committed, Scheduler
from server.worker.sequence import Sequence, Status
from tests.fakes import submit_of
from verifier.plan import StepPlan
from verifier.verdict import Verdict


def make(
    *submits: Submit, max_rows: int = 4, budget: int = 64, context: int = 100, num_pages: int = 100, page_size: int = 4
) -> Scheduler:
    limits = Limits(
        max_rows=max_rows, max_batched_tokens=budget, max_model_len=context, num_pages=num_pages, page_size=page_size
    )
    scheduler = Scheduler(limits)
    for submit in submits:
        assert scheduler.roster.submit(submit) is None
    return scheduler


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan(lambda rows, limits, *_: list(limits))
    assert plan is not None
    return plan


def commit(scheduler: Scheduler, plan: StepPlan, num_won: int = 1, failed: tuple[int, ...] = ()) -> Committed:
    """Every row with a tree wins `num_won` tokens (9), those that ended their prompt win one."""
    rows = [slot.row for slot in plan.trees] + [chunk.row for chunk in plan.chunks if chunk.is_last]
    num_accepted = np.zeros(len(rows), np.int32)
    num_accepted[: len(plan.trees)] = num_won - 1
    verdict = Verdict(
        rows=np.array(rows, np.int32),
        tokens=np.full((len(rows), num_won), 9, np.int64),
        num_accepted=num_accepted,
        nodes=np.zeros((len(rows), num_won - 1), np.int32),
        failed=failed,
    )
    committed = scheduler.commit(plan, verdict, [slot.max_nodes for slot in plan.trees])
    scheduler.roster.check_integrity()
    return committed


def step(scheduler: Scheduler, num_won: int = 1) -> StepPlan:
    plan = planned(scheduler)
    commit(scheduler, plan, num_won)
    return plan


def size(plan: StepPlan) -> int:
    return sum(slot.max_nodes for slot in plan.trees) + sum(len(chunk.tokens) for chunk in plan.chunks)


def test_a_prompt_runs_in_chunks_and_then_as_trees() -> None:
    scheduler = make(submit_of(range(20), drafter="x"), budget=8)
    chunks = [step(scheduler).chunks[0] for _ in range(3)]
    assert [(chunk.num_cached, len(chunk.tokens), chunk.is_last) for chunk in chunks] == [
        (0, 8, False),
        (8, 8, False),
        (16, 4, True),
    ]
    assert [token for chunk in chunks for token in chunk.tokens] == list(range(20))
    plan = planned(scheduler)
    assert not plan.chunks
    assert [(slot.num_cached, slot.max_nodes) for slot in plan.trees] == [(20, 8)]


def test_several_prompts_share_a_step_first_come_first_served() -> None:
    scheduler = make(*(submit_of(range(i, i + 6), f"r{i}") for i in range(3)), budget=16)
    plan = step(scheduler)
    assert [len(chunk.tokens) for chunk in plan.chunks] == [6, 6, 4]
    plan = planned(scheduler)
    assert len(plan.trees) == 2
    assert [len(chunk.tokens) for chunk in plan.chunks] == [2]


def test_no_step_is_over_budget_and_every_row_moves() -> None:
    submits = [submit_of(range(i, i + 17), f"r{i}", drafter="x", max_nodes=64, max_tokens=40) for i in range(6)]
    scheduler = make(*submits, budget=10)
    while scheduler.has_work:
        roster = scheduler.roster
        generating = {one.row for one in roster.running if one.status is Status.GENERATING}
        plan = planned(scheduler)
        assert 1 <= size(plan) <= 10
        assert {slot.row for slot in plan.trees} == generating
        if len(generating) < len(roster.running):
            assert plan.chunks, "a prompt starves"
        commit(scheduler, plan)


def test_while_prompts_wait_trees_take_half_a_step() -> None:
    scheduler = make(submit_of([1, 2], "old", drafter="x", max_nodes=64), budget=64)
    step(scheduler)
    assert planned(scheduler).trees[0].max_nodes == 64
    scheduler.roster.submit(submit_of(range(90), "new"))
    plan = planned(scheduler)
    assert plan.trees[0].max_nodes == 32
    assert len(plan.chunks[0].tokens) == 32


def test_rows_share_the_tree_nodes_of_a_step() -> None:
    scheduler = make(*(submit_of([1, i], f"r{i}", drafter="x", max_nodes=64) for i in range(4)), budget=64)
    step(scheduler)
    assert [slot.max_nodes for slot in planned(scheduler).trees] == [16] * 4


def test_trees_come_grouped_by_drafter() -> None:
    submits = [submit_of([1, i], f"r{i}", drafter=name) for i, name in enumerate(["x", "none", "y", "x"])]
    scheduler = make(*submits)
    step(scheduler)
    plan = planned(scheduler)
    assert [scheduler.roster.sequence(slot.row).drafter for slot in plan.trees] == ["none", "x", "x", "y"]


def test_the_last_token_needs_no_guesses() -> None:
    scheduler = make(submit_of([1, 2], drafter="x", max_tokens=3))
    step(scheduler)
    assert planned(scheduler).trees[0].max_nodes > 1
    scheduler = make(submit_of([1, 2], drafter="x", max_tokens=2))
    step(scheduler)
    assert planned(scheduler).trees[0].max_nodes == 1


def test_a_tree_stays_within_the_context() -> None:
    scheduler = make(submit_of(range(15), drafter="x", max_nodes=64), context=20)
    step(scheduler)
    assert planned(scheduler).trees[0].max_nodes == 5


def test_a_tree_shrinks_to_the_pages_there_are() -> None:
    scheduler = make(submit_of(range(10), drafter="x", max_nodes=64), num_pages=6, page_size=4)
    step(scheduler)
    plan = planned(scheduler)
    assert plan.trees[0].max_nodes == 10
    assert {page for _, _, page in plan.pages} <= set(range(1, 6))


def two_rows(num_pages: int) -> tuple[Scheduler, Sequence, Sequence]:
    """Two rows of 7 tokens on two pages each, the older one with a wide tree, of pages with 4 tokens."""
    old = submit_of(range(6), "old", drafter="x", max_nodes=64)
    young = submit_of(range(10, 16), "young")
    scheduler = make(old, young, num_pages=num_pages)
    step(scheduler)
    first, second = scheduler.roster.running
    return scheduler, first, second


def test_wide_trees_give_way_before_anybody_is_preempted() -> None:
    scheduler, old, young = two_rows(num_pages=8)
    step(scheduler)
    assert len(old.pages) == 5  # all there are, for the tree
    step(scheduler)
    plan = planned(scheduler)  # the young row needs its third page now
    assert scheduler.roster.counts.num_preempted == 0
    assert len(young.pages) == 3
    assert [scheduler.roster.sequence(slot.row).id for slot in plan.trees] == ["young", "old"]


def test_the_youngest_row_is_preempted_and_comes_back_first() -> None:
    scheduler, old, young = two_rows(num_pages=6)
    scheduler.roster.submit(submit_of([50], "later"))
    tokens = list(young.tokens)
    for _ in range(6):
        plan = planned(scheduler)
        if scheduler.roster.counts.num_preempted:
            break
        commit(scheduler, plan)
        tokens = list(young.tokens)
    assert young.status is Status.WAITING
    assert young.pages == []
    assert young.tokens == tokens, "a preempted row keeps its tokens"
    assert [one.id for one in scheduler.roster.waiting] == ["young", "later"]
    assert old.row >= 0
    assert len(plan.stops) == 1
    assert all(row == old.row for row, _, _ in plan.pages)
    scheduler.roster.abort("old")
    plan = planned(scheduler)
    assert plan.starts[0].tokens == tuple(tokens)
    assert plan.starts[0].num_prompt == 6


def test_a_sequence_that_has_all_pages_to_itself_reaches_the_context_end() -> None:
    scheduler = make(submit_of(range(3), drafter="x", max_tokens=1000), num_pages=4, page_size=4, context=100)
    assert scheduler.limits.context_len == 12
    deltas: list[Delta] = []
    while scheduler.has_work:
        deltas += commit(scheduler, planned(scheduler)).deltas
    assert sum(len(delta.tokens) for delta in deltas) == 9
    assert deltas[-1].finish_reason == "length"


def test_what_can_never_fit_is_refused_alone() -> None:
    scheduler = make(submit_of([1], "good"), num_pages=4, page_size=4)
    error = scheduler.roster.submit(submit_of(range(12), "bad"))
    assert error is not None
    assert error.id == "bad"
    assert "12" in error.message
    assert step(scheduler).starts[0].tokens == (1,)


def test_empty_prompts_and_taken_ids_are_refused() -> None:
    scheduler = make(submit_of([1], "r"))
    assert scheduler.roster.submit(submit_of([], "empty")) is not None
    assert scheduler.roster.submit(submit_of([2], "r")) is not None
    assert len(scheduler.roster.waiting) == 1


def test_a_known_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    scheduler = make(submit_of(range(8), "first", max_tokens=1))
    step(scheduler)
    scheduler.roster.submit(submit_of(range(8), "again", max_tokens=1))
    plan = planned(scheduler)
    assert [(chunk.num_cached, chunk.tokens) for chunk in plan.chunks] == [(4, (4, 5, 6, 7))]
    assert scheduler.roster.counts.num_prefix_hit_tokens == 4
    assert commit(scheduler, plan).deltas[0].num_cached_prompt == 4


def test_a_prefix_of_another_tenant_is_computed_again() -> None:
    scheduler = make(submit_of(range(8), "first", tenant="a", max_tokens=1))
    step(scheduler)
    scheduler.roster.submit(submit_of(range(8), "again", tenant="b", max_tokens=1))
    plan = planned(scheduler)
    assert plan.chunks[0].num_cached == 0
    assert commit(scheduler, plan).deltas[0].num_cached_prompt == 0


def test_an_answer_is_a_prefix_of_the_next_turn() -> None:
    scheduler = make(submit_of(range(4), "first", max_tokens=6))
    while scheduler.has_work:
        step(scheduler)
    scheduler.roster.submit(submit_of([0, 1, 2, 3, 9, 9, 9, 9, 9, 9, 5], "next"))
    assert planned(scheduler).chunks[0].num_cached == 8


def test_a_row_of_bad_numbers_fails_alone_and_its_pages_answer_nobody() -> None:
    scheduler = make(submit_of(range(9), "bad"), submit_of(range(20, 29), "good"), budget=12)
    step(scheduler)  # the first prompt is done, and its pages are known
    bad = scheduler.roster.running[0]
    plan = planned(scheduler)
    committed = commit(scheduler, plan, failed=(bad.row,) if bad.row >= 0 else ())
    assert [error.id for error in committed.errors] == ["bad"]
    assert [delta.id for delta in committed.deltas] == ["good"]
    scheduler.roster.submit(submit_of(range(9), "again"))
    chunk = planned(scheduler).chunks[0]
    assert (chunk.num_cached, len(chunk.tokens)) == (0, 9)


def test_stops_wait_for_the_next_plan_and_rows_are_used_again() -> None:
    scheduler = make(submit_of([1], "a", max_tokens=1), max_rows=1)
    plan = step(scheduler)
    row = plan.starts[0].row
    assert scheduler.plan(lambda rows, limits, *_: list(limits)) is None
    scheduler.roster.submit(submit_of([2], "b"))
    plan = planned(scheduler)
    assert plan.stops == (row,)
    assert plan.starts[0].row == row


def test_an_abort_frees_pages_at_once_wherever_the_request_stands() -> None:
    scheduler = make(*(submit_of(range(i, i + 30), f"r{i}") for i in range(4)), budget=40, max_rows=2)
    step(scheduler)  # r0 generates, r1 is in the middle of its prompt, r2 and r3 wait
    for request_id in ("r1", "r3", "r0"):
        assert scheduler.roster.abort(request_id)
        scheduler.roster.check_integrity()
    assert not scheduler.roster.abort("r1")
    assert scheduler.roster.book.num_free == scheduler.roster.book.num_usable
    assert [start.tokens[0] for start in planned(scheduler).starts] == [2]


class Chosen:
    """Lets the rows draft that it was told, with as many nodes, or as many as they may."""

    def __init__(self, drafting: dict[int, int]) -> None:
        self.drafting = drafting
        self.asked: list[tuple[list[int], int, bool]] = []

    def __call__(self, rows: Many[int], limits: Many[int], num_trees: int, has_prompts: bool) -> list[int]:
        self.asked.append((list(rows), num_trees, has_prompts))
        return [min(limit, self.drafting.get(row, 1)) for row, limit in zip(rows, limits, strict=True)]


def test_the_speculator_says_who_drafts_and_the_limits_say_how_much() -> None:
    """Rows that may not draft come last among those of their drafter, and take no pages for a tree."""
    names, nodes = ["x", "y", "x", "none", "x"], [64, 20, 7, 64, 64]
    submits = [submit_of([1, i], f"r{i}", drafter=names[i], max_nodes=nodes[i], max_tokens=90) for i in range(5)]
    scheduler = make(*submits, max_rows=8, budget=512, context=200, page_size=1, num_pages=400)
    step(scheduler)
    chosen = Chosen({0: 64, 1: 12, 2: 64})
    plan = scheduler.plan(chosen)
    assert plan is not None
    assert chosen.asked == [([0, 1, 2, 4], 5, False)]
    assert [(slot.row, slot.max_nodes) for slot in plan.trees] == [(3, 1), (0, 64), (2, 7), (4, 1), (1, 12)]
    assert len(scheduler.roster.sequence(4).pages) == 3


def test_a_row_that_ends_with_its_next_token_is_not_the_speculators_matter() -> None:
    scheduler = make(submit_of([1, 2], drafter="x", max_tokens=2))
    step(scheduler)
    chosen = Chosen({})
    plan = scheduler.plan(chosen)
    assert plan is not None
    assert plan.trees[0].max_nodes == 1
    assert chosen.asked == [([], 1, False)]
