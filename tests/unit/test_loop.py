"""Random traffic through the whole corridor over a toy target: the text is the plain function's, whatever happens."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import msgspec
import pytest

from drafters.base import Drafter, Int32, News, RowContext, Source
from server.config import Settings
from server.messages import Abort, Delta, Outcome, Submit
from server.worker.drafting import Drafting, Effort
from server.worker.loop import _LONG_S, Loop
from server.worker.speculator import Speculator
from tests.fakes import (
    FakeGeometry,
    FakeVerifier,
    FuzzDrafter,
    FuzzSpeculator,
    StatesDrafter,
    linear_cost,
    make_loop,
    plain_answer,
    submit_of,
)
from verifier.plan import StepPlan, Wanted
from verifier.tree import DraftTrees
from verifier.verdict import Verdict


class Listener:
    """Collects what the loop tells, by request."""

    def __init__(self) -> None:
        self.deltas: dict[str, list[Delta]] = {}
        self.errors: dict[str, str] = {}
        self.outcomes: list[Outcome] = []

    def hear(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        for delta in outcome.deltas:
            heard = self.deltas.setdefault(delta.id, [])
            assert not heard or heard[-1].finish_reason is None, f"{delta.id} goes on after its end"
            assert delta.id not in self.errors
            heard.append(delta)
        for error in outcome.errors:
            assert error.id not in self.errors, f"{error.id} fails twice"
            self.errors[error.id] = error.message

    def answer(self, request_id: str) -> tuple[list[int], str | None]:
        deltas = self.deltas.get(request_id, [])
        return [token for delta in deltas for token in delta.tokens], deltas[-1].finish_reason if deltas else None


def run(loop: Loop, *submits: Submit) -> Listener:
    listener = Listener()
    for submit in submits:
        loop.handle(submit)
    for _ in range(10_000):
        if not loop.has_work:
            break
        listener.hear(loop.step())
        loop.scheduler.roster.check_integrity()
    assert not loop.has_work, "the loop does not come to an end"
    return listener


def num_failures(listener: Listener) -> int:
    return sum(outcome.stats.num_drafter_failures for outcome in listener.outcomes if outcome.stats)


def assert_all_free(loop: Loop) -> None:
    roster = loop.scheduler.roster
    assert roster.book.num_free == roster.book.num_usable
    assert not roster.running
    assert not roster.waiting


def random_submit(rng: random.Random, index: int, prefixes: list[list[int]], geometry: FakeGeometry) -> Submit:
    tenant = rng.choice(["", "a", "b"])
    prompt = [*rng.choice(prefixes), *(rng.randrange(geometry.vocab_size) for _ in range(rng.randint(1, 12)))]
    return submit_of(
        prompt,
        f"r{index}",
        drafter=rng.choice(["none", "fuzz", "other", "fails", "near", "far"]),
        max_nodes=rng.choice([1, 2, 5, 16, 64]),
        tenant=tenant,
        max_tokens=rng.choice([1, 2, 9, 30, 500]),
        seed=rng.randrange(3),
        stop_ids=tuple(rng.sample(range(geometry.vocab_size), rng.choice([0, 1, 1]))),
        num_logprobs=rng.choice([-1, 0, 2]),
    )


def fuzz_geometry(rng: random.Random) -> FakeGeometry:
    max_rows = rng.choice([1, 3, 8])
    return FakeGeometry(
        max_model_len=rng.choice([48, 96]),
        num_pages=rng.choice([14, 24, 60]),
        page_size=rng.choice([1, 4, 7]),
        max_rows=max_rows,
        max_positions=max(max_rows, rng.choice([3, 8, 40, 400])),
    )


def random_speculator(rng: random.Random, geometry: FakeGeometry) -> Callable[[Drafting, int], Speculator]:
    """One that chooses at random, or the real one with costs that are as good as any."""
    seed, is_fuzzy = rng.randrange(1000), rng.random() < 0.5
    base_s, slope_s = rng.choice([1e-3, 1e-5]), rng.choice([1e-7, 1e-4])

    def make(drafting: Drafting, max_rows: int) -> Speculator:
        if is_fuzzy:
            return FuzzSpeculator(drafting, max_rows, seed)
        speculator = Speculator(drafting, max_rows)
        speculator.begin(linear_cost(base_s, slope_s, geometry.max_positions))
        return speculator

    return make


@pytest.mark.parametrize("knows_costs", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_random_traffic_gives_the_plain_text(seed: int, knows_costs: bool, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(seed)
    geometry = fuzz_geometry(rng)
    vocab = geometry.vocab_size
    drafters: dict[str, FuzzDrafter] = {
        "fuzz": FuzzDrafter(seed, vocab),
        "other": FuzzDrafter(seed + 1, vocab, hit_rate=0.95),
        "fails": FuzzDrafter(seed + 2, vocab, fail_rate=0.05),
        "near": StatesDrafter(seed + 3, vocab, 0),
        "far": StatesDrafter(seed + 4, vocab, 7),
    }
    make = random_speculator(random.Random(seed), geometry) if knows_costs else Speculator
    loop = make_loop(geometry, drafters, has_prefix_cache=rng.random() < 0.8, make_speculator=make)
    prefixes = [[], [rng.randrange(vocab) for _ in range(9)], [rng.randrange(vocab) for _ in range(20)]]
    submits = [random_submit(rng, index, prefixes, geometry) for index in range(20)]
    waiting, aborted, listener = list(submits), set(), Listener()
    while waiting or loop.has_work:
        if waiting and rng.random() < 0.5:
            loop.handle(waiting.pop())
        if rng.random() < 0.03:
            victim = rng.choice(submits)
            if victim not in waiting:
                loop.handle(Abort(victim.id))
                aborted.add(victim.id)
        listener.hear(loop.step())
        loop.scheduler.roster.check_integrity()
    context_len = loop.scheduler.limits.context_len
    for submit in submits:
        tokens, reason = listener.answer(submit.id)
        if len(submit.prompt) >= context_len:
            assert submit.id in listener.errors or submit.id in aborted
            assert not tokens
            continue
        assert submit.id not in listener.errors
        expected, why = plain_answer(submit, vocab, context_len)
        if submit.id in aborted and reason is None:
            assert tokens == expected[: len(tokens)]
        else:
            assert (tokens, reason) == (expected, why)
    assert_all_free(loop)
    assert not any(drafter.rows for drafter in drafters.values())
    num_gaps = sum(drafter.num_gaps for drafter in drafters.values() if isinstance(drafter, StatesDrafter))
    assert knows_costs or not num_gaps, "states are kept from a drafter that nobody let sleep"
    # What a fuzz drafter finds wrong in its news it raises, and the loop only logs it.
    assert {record.args[0] for record in caplog.records if isinstance(record.args, tuple)} <= {"fails"}


def biased(request_id: str, token: int) -> Submit:
    submit = submit_of([1], request_id)
    sampling = dataclasses.replace(submit.sampling, logit_bias=((token, 1.0),))
    return msgspec.structs.replace(submit, sampling=sampling)


def test_what_would_break_a_step_is_refused_alone() -> None:
    loop = make_loop()
    vocab = FakeGeometry().vocab_size
    listener = run(
        loop,
        submit_of([1, vocab], "beyond"),
        submit_of([-1], "negative"),
        submit_of([], "empty"),
        submit_of([1], "drafter", drafter="unheard"),
        submit_of([1], "nodes", drafter="none", max_nodes=0),
        submit_of([1], "stop", stop_ids=(2, vocab)),
        biased("bias", vocab),
        biased("negative bias", -1),
        submit_of([1, 2], "good"),
    )
    assert set(listener.errors) == {
        *("beyond", "negative", "empty", "drafter", "nodes", "stop", "bias", "negative bias")
    }
    assert "unheard" in listener.errors["drafter"]
    assert listener.answer("good")[1] == "length"


def test_an_abort_while_idle_tells_that_the_pages_are_free() -> None:
    loop = make_loop()
    loop.handle(submit_of([1, 2, 3], "r", max_tokens=100))
    assert loop.step().stats is not None
    loop.handle(Abort("r"))
    assert loop.has_work
    stats = loop.step().stats
    assert stats is not None
    assert stats.pages_free == stats.pages_total
    assert (stats.num_rows, stats.num_running, stats.num_waiting) == (0, 0, 0)
    assert not loop.has_work


def test_a_poisoned_row_fails_alone_while_others_go_on() -> None:
    drafters: dict[str, Drafter] = {"fuzz": FuzzDrafter(0, 50, hit_rate=1.0)}
    submits = [submit_of([1, 2, index], f"r{index}", drafter="fuzz", max_tokens=40, seed=index) for index in range(6)]
    answers = {submit.id: plain_answer(submit, 50, 256)[0] for submit in submits}
    poison = answers["r2"][5]
    doomed = {submit.id for submit in submits if poison in [*submit.prompt, *answers[submit.id]]}
    assert 0 < len(doomed) < len(submits)
    loop = make_loop(drafters=drafters, poison=poison)
    listener = run(loop, *submits)
    assert set(listener.errors) == doomed
    assert num_failures(listener) == 0, "a drafter was told of a row that won nothing"
    for submit in submits:
        if submit.id not in doomed:
            assert listener.answer(submit.id) == (answers[submit.id], "length")
    assert_all_free(loop)


def test_the_numbers_of_all_steps_add_up() -> None:
    drafter = FuzzDrafter(3, 50, hit_rate=0.8)
    loop = make_loop(drafters={"fuzz": drafter})
    # r3 stops in the middle of its answer: accepted drafts beyond a stop do not count.
    submits = [submit_of([1, 2, index], f"r{index}", drafter="fuzz", max_tokens=50, seed=index) for index in range(4)]
    stop = plain_answer(submits[3], 50, 256)[0][20]
    submits[3] = submit_of([1, 2, 3], "r3", drafter="fuzz", max_tokens=50, seed=3, stop_ids=(stop,))
    listener = run(loop, *submits)
    stats = [outcome.stats for outcome in listener.outcomes if outcome.stats is not None]
    records = [listener.deltas[submit.id][-1].record for submit in submits]
    num_tokens = sum(len(listener.answer(submit.id)[0]) for submit in submits)
    num_accepted = sum(one.num_accepted for one in stats)
    num_draft_tokens = sum(one.num_draft_tokens for one in stats)
    assert num_accepted > 0
    assert num_accepted == sum(record.num_accepted_tokens for record in records if record)
    assert num_accepted == sum(sum(one.accepted_by_depth) for one in stats)
    assert num_accepted == sum(one.accepted_by_source[Source.OTHER] for one in stats)
    assert num_draft_tokens == sum(record.num_draft_tokens for record in records if record)
    assert num_draft_tokens == sum(one.drafted_by_source[Source.OTHER] for one in stats)
    assert all(one.drafted_by_source[Source.ROOT] == 0 for one in stats)
    assert sum(one.num_drafts for one in stats) == sum(record.num_steps for record in records if record)
    assert sum(one.num_nodes for one in stats) == num_draft_tokens + sum(one.num_rows for one in stats) - 4
    assert sum(one.num_chunk_tokens for one in stats) == sum(len(submit.prompt) for submit in submits)
    for submit, record in zip(submits, records, strict=True):
        assert record is not None
        assert sum(record.histogram) == record.num_steps
        assert sum(count * steps for count, steps in enumerate(record.histogram)) == record.num_accepted_tokens
        assert record.num_accepted_tokens <= len(listener.answer(submit.id)[0])
    assert all(one.verify_s > 0 for one in stats if one.num_rows)
    assert num_tokens >= num_accepted
    assert drafter.num_verified > 0


def test_drafts_beyond_a_stop_do_not_count() -> None:
    """A drafter that is always right wins whole chains; the stop is the second token of one."""
    submit = submit_of([1, 2], drafter="fuzz", max_tokens=60)
    answer = plain_answer(submit, 50, 256)[0]
    stop = next(token for index, token in enumerate(answer) if index >= 2 and token not in answer[:index])
    loop = make_loop(drafters={"fuzz": Oracle(0, 50)})
    listener = run(loop, submit_of([1, 2], drafter="fuzz", max_tokens=60, stop_ids=(stop,)))
    tokens, reason = listener.answer("r")
    assert reason == "stop"
    assert tokens == answer[: answer.index(stop) + 1]
    record = listener.deltas["r"][-1].record
    assert record is not None
    assert record.num_accepted_tokens == len(tokens) - 1  # all but the first, which ended the prompt


class Oracle(FuzzDrafter):
    """Always the right chain, as long as it may be."""

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        for row, limit in zip(rows.tolist(), max_nodes.tolist(), strict=True):
            known, context = self.rows[row]
            tokens = list(known)
            for _ in range(limit - 1):
                tokens.append(self._oracle(tokens, context))
            chain = tokens[len(known) - 1 :]
            out.append(chain, list(range(-1, limit - 1)), [1] * limit, [Source.OTHER] * limit)


class Broken(FuzzDrafter):
    """Does one thing wrong, once it has proposed a few times."""

    def __init__(self, fault: str) -> None:
        super().__init__(0, 50)
        self.fault = fault
        self.num_calls = 0

    def start(self, row: int, context: RowContext) -> None:
        super().start(row, context)
        assert self.fault != "start"

    def stop(self, row: int) -> None:
        super().stop(row)
        assert self.fault != "stop"

    def update(self, news: News) -> None:
        super().update(news)
        assert self.fault != "read" or self.num_calls < 3

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        self.num_calls += 1
        if self.num_calls < 3:
            super().propose(rows, max_nodes, out)
            return
        roots = [self.rows[row][0][-1] for row in rows.tolist()]
        for index, (root, limit) in enumerate(zip(roots, max_nodes.tolist(), strict=True)):
            if self.fault == "propose" and index == 1:
                raise RuntimeError("half way")
            if self.fault == "few" and index == 1:
                return
            size = limit + 1 if self.fault == "wide" else limit
            tokens = [root] + [(root + node) % 50 for node in range(1, size)]
            parents = list(range(-1, size - 1))
            if self.fault == "root":
                tokens[0] = (root + 1) % 50
            if self.fault == "vocabulary":
                tokens[-1] = 50
            if self.fault == "siblings":
                tokens[1], parents[1], tokens[2], parents[2] = 7, 0, 7, 0
            out.append(tokens, parents, [1] * size, [Source.OTHER] * size)
            if self.fault == "ancestors":
                out.ancestors[out.num_nodes - 1] = 1
        if self.fault == "many":
            out.append_root(roots[0])


FAULTS = ["start", "stop", "read", "propose", "few", "many", "wide", "root", "vocabulary", "siblings", "ancestors"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_drafter_at_fault_costs_its_rows_their_drafts_and_nothing_else(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = Broken(fault), FuzzDrafter(1, 50)
    submits = [
        submit_of(
            [1, index], f"r{index}", drafter="broken" if index % 2 else "sound", max_nodes=8, max_tokens=40, seed=index
        )
        for index in range(6)
    ]
    loop = make_loop(drafters={"broken": broken, "sound": sound})
    listener = run(loop, *submits)
    for submit in submits:
        assert listener.answer(submit.id) == plain_answer(submit, 50, 256)
    assert not listener.errors
    # All three of its rows fail in one call, but for those that come and go one by one.
    assert num_failures(listener) == (3 if fault in ("start", "stop") else 1)
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == 1
    assert "broken" in logged[0].getMessage()
    assert not broken.rows
    assert not sound.rows
    assert_all_free(loop)


def test_no_candidates_are_asked_for_when_nobody_drafts() -> None:
    asked: list[int] = []
    loop = make_loop(drafters={"fuzz": FuzzDrafter(0, 50)})
    verifier = loop._verifier
    judge = verifier.run
    verifier.run = lambda plan, trees, wanted: asked.append(wanted.num_candidates) or judge(plan, trees, wanted)  # type: ignore[method-assign, func-returns-value]
    run(loop, submit_of([1], "a"), submit_of([2], "b", drafter="fuzz", max_nodes=1))
    assert set(asked) == {0}
    run(loop, submit_of([3], "c", drafter="fuzz"))
    assert max(asked) == FuzzDrafter.num_candidates


def spied(loop: Loop) -> list[tuple[StepPlan, Wanted, Verdict]]:
    """Every step that the loop has its verifier run from now on."""
    seen: list[tuple[StepPlan, Wanted, Verdict]] = []
    judge = loop._verifier.run

    def run(plan: StepPlan, trees: DraftTrees, wanted: Wanted) -> Verdict:
        seen.append((plan, wanted, judge(plan, trees, wanted)))
        return seen[-1][2]

    loop._verifier.run = run  # type: ignore[method-assign]
    return seen


def test_hidden_states_are_asked_for_as_far_as_somebody_looks() -> None:
    drafters = {"fuzz": FuzzDrafter(0, 50), "near": StatesDrafter(1, 50, 0), "far": StatesDrafter(2, 50, 7)}
    loop = make_loop(FakeGeometry(max_positions=20), drafters)
    steps = spied(loop)
    run(loop, submit_of(range(30), "a"), submit_of(range(1, 40), "b", drafter="fuzz"))
    assert {wanted.hidden_tail for _, wanted, _ in steps} == {0}
    assert all(verdict.hidden is None for _, _, verdict in steps)
    steps.clear()
    near, far = (
        submit_of(range(index, index + 40), f"r{index}", drafter=name) for index, name in ((2, "near"), (3, "far"))
    )
    assert num_failures(run(loop, near, far)) == 0
    tails = {bool(plan.chunks): 0 for plan, _, _ in steps}
    for plan, wanted, _ in steps:
        tails[bool(plan.chunks)] = max(tails[bool(plan.chunks)], wanted.hidden_tail)
    assert tails == {True: 7, False: 1}
    for name in ("near", "far"):
        drafter = drafters[name]
        assert isinstance(drafter, StatesDrafter)
        assert drafter.num_unfinished > 0
        assert drafter.num_drafted > 0


def test_the_record_comes_along_for_who_wants_it() -> None:
    """A stop string may end a text at any delta: whoever asked has the record by then."""
    drafters: dict[str, Drafter] = {"fuzz": FuzzDrafter(1, 50, hit_rate=0.9)}
    silent = submit_of([1, 2, 3], "silent", drafter="fuzz", max_tokens=30)
    asking = submit_of([1, 2, 4], "asking", drafter="fuzz", max_tokens=30)
    wish = msgspec.structs.replace(asking.speculation, wants_record=True)
    listener = run(make_loop(drafters=drafters), silent, msgspec.structs.replace(asking, speculation=wish))
    assert [delta.record for delta in listener.deltas["silent"][:-1]] == [None] * (len(listener.deltas["silent"]) - 1)
    records = [delta.record for delta in listener.deltas["asking"]]
    assert all(record is not None for record in records)
    steps = [record.num_steps for record in records if record is not None]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


class Breaking(FakeVerifier):
    """Raises in every step that runs a row with a 9 in it: before, amid or after its work."""

    when = "amid"
    failure: Exception = MemoryError("no more")

    def run(self, plan: StepPlan, trees: DraftTrees, wanted: Wanted) -> Verdict:
        known = {start.row: list(start.tokens) for start in plan.starts}
        rows = [work.row for work in (*plan.trees, *plan.chunks)]
        if not any(9 in (known[row] if row in known else self.rows[row].tokens) for row in rows):
            return super().run(plan, trees, wanted)
        if self.when == "amid":
            self._apply(plan)
        if self.when == "after":
            super().run(plan, trees, wanted)
        raise self.failure


def breaking_loop(drafters: dict[str, Drafter] | None = None) -> Loop:
    geometry = FakeGeometry()
    loop = make_loop(geometry, drafters)
    loop._verifier = Breaking(geometry)
    return loop


def test_a_step_that_raises_ends_its_requests_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    """Were the worker to die of it, the poisonous request would be resubmitted and kill the next worker too."""
    loop = breaking_loop()
    submits = [submit_of([1, 2, 4], "early", max_tokens=3), submit_of([9] * 7, "poison"), submit_of([4, 5], "late")]
    listener = run(loop, submits[0])
    loop.handle(submits[1])
    outcome = loop.step()
    assert [error.id for error in outcome.errors] == ["poison"]
    assert "MemoryError" in outcome.errors[0].message
    assert_all_free(loop)
    after = run(loop, submits[2])
    assert listener.answer("early") == plain_answer(submits[0], 50, 256)
    assert after.answer("late") == plain_answer(submits[2], 50, 256)
    assert "a step failed" in caplog.text


@pytest.mark.parametrize("when", ["before", "amid", "after"])
def test_who_breaks_a_step_fails_alone(when: str, caplog: pytest.LogCaptureFixture) -> None:
    """The rows that shared the step win, by trees or chunks, what they would have won; each on its own page table."""
    drafters: dict[str, Drafter] = {"fuzz": FuzzDrafter(0, 50, hit_rate=0.9)}
    submits = [
        submit_of(
            [1, 2, *range(10, 10 + 3 * index)],
            f"r{index}",
            drafter="fuzz" if index % 2 else "none",
            max_tokens=40,
            seed=index,
            num_logprobs=1,
        )
        for index in range(9)
    ]
    answers = {submit.id: plain_answer(submit, 50, 256)[0] for submit in submits}
    # A 9 that is the last token of an answer is never run.
    doomed = {id for id, answer in answers.items() if 9 in answer[:-1]}
    assert 0 < len(doomed) < len(submits)
    loop = breaking_loop(drafters)
    loop._verifier.when = when  # type: ignore[attr-defined]
    listener = run(loop, *submits)
    assert set(listener.errors) == doomed
    assert all("MemoryError" in message for message in listener.errors.values())
    for submit in submits:
        if submit.id not in doomed:
            assert listener.answer(submit.id) == (answers[submit.id], "length")
            told = [one.logprob for delta in listener.deltas[submit.id] for one in delta.logprobs or ()]
            assert told == [-token / 8 for token in answers[submit.id]]
    assert num_failures(listener) == 0, "a drafter was told wrong news"
    assert sum(record.exc_info is not None for record in caplog.records) == 1
    assert_all_free(loop)


def test_a_step_run_row_by_row_leaves_a_gap_in_the_states() -> None:
    drafter = StatesDrafter(0, 50, 7)
    loop = breaking_loop({"states": drafter})
    poison, other = submit_of([9, 8, 7], "poison"), submit_of([1, 2, 4], "other", drafter="states", max_tokens=30)
    listener = run(loop, other, poison)
    assert "poison" in listener.errors
    assert num_failures(listener) == 0
    assert drafter.num_gaps == 1
    assert drafter.num_drafted > 0, "the states come again with the next step"
    assert listener.answer("other") == plain_answer(other, 50, 256)


def test_a_full_device_memory_is_not_a_lost_device() -> None:
    loop = breaking_loop()
    loop._verifier.failure = RuntimeError("CUDA out of memory. Tried to allocate")  # type: ignore[attr-defined]
    good = submit_of([4, 5], "good")
    listener = run(loop, submit_of([9] * 7, "big"), good)
    assert set(listener.errors) == {"big"}
    assert listener.answer("good") == plain_answer(good, 50, 256)


def test_a_lost_device_ends_the_worker() -> None:
    loop = breaking_loop()
    loop._verifier.failure = RuntimeError("CUDA error: an illegal memory access")  # type: ignore[attr-defined]
    loop.handle(submit_of([9] * 7, "poison"))
    with pytest.raises(RuntimeError, match="CUDA"):
        loop.step()


def test_texts_are_the_same_whatever_the_speculator_chooses() -> None:
    """Promise 1: over random batches, whatever is bypassed, cut or kept from a drafter."""
    geometry = FakeGeometry()
    rng = random.Random(0)
    submits = [
        submit_of(
            [rng.randrange(50) for _ in range(rng.randint(1, 20))],
            f"r{index}",
            drafter=rng.choice(["fuzz", "near"]),
            max_nodes=rng.choice([2, 16, 64]),
            max_tokens=rng.randint(1, 60),
            seed=index,
        )
        for index in range(40)
    ]

    def texts(
        make: Callable[[Drafting, int], Speculator],
    ) -> tuple[list[tuple[list[int], str | None]], Listener, Speculator]:
        drafters: dict[str, Drafter] = {"fuzz": FuzzDrafter(1, 50, 0.8), "near": StatesDrafter(2, 50, 0)}
        loop = make_loop(geometry, drafters, make_speculator=make)
        listener = run(loop, *submits)
        assert num_failures(listener) == 0
        return [listener.answer(submit.id) for submit in submits], listener, loop.speculator

    def sane(drafting: Drafting, max_rows: int) -> Speculator:
        speculator = Speculator(drafting, max_rows)
        speculator.begin(linear_cost(1e-3, 1e-5, geometry.max_positions))
        return speculator

    plain, *_ = texts(Speculator)
    assert plain == [plain_answer(submit, 50, 256) for submit in submits]
    answers, listener, fuzzy = texts(FuzzSpeculator)
    assert answers == plain
    assert isinstance(fuzzy, FuzzSpeculator)
    assert fuzzy.num_cheap > 20
    assert fuzzy.num_cut > 100
    assert fuzzy.num_asleep > 10
    assert sum(outcome.stats.num_bypassed for outcome in listener.outcomes if outcome.stats) > 50
    assert texts(sane)[0] == plain


def test_with_no_effort_no_drafter_is_asked_and_all_hear_the_tokens() -> None:
    class Never(FuzzSpeculator):
        def choose(self, rows: Sequence[int], limits: Sequence[int], num_trees: int, has_prompts: bool) -> list[int]:
            super().choose(rows, limits, num_trees, has_prompts)
            self.effort, self._is_paired, self.drafting.hears_states = Effort.NONE, False, False
            self.num_bypassed = len(rows)
            return [1] * len(rows)

    class Unasked(StatesDrafter):
        def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
            raise AssertionError("asked")

    drafter = Unasked(0, 50, 7)
    loop = make_loop(drafters={"states": drafter}, make_speculator=Never)
    steps = spied(loop)
    submits = [submit_of([1, 2, index], f"r{index}", drafter="states", max_tokens=20, seed=index) for index in range(3)]
    listener = run(loop, *submits)
    assert num_failures(listener) == 0
    for submit in submits:
        assert listener.answer(submit.id) == plain_answer(submit, 50, 256)
    told = [(wanted.num_candidates, wanted.hidden_tail) for plan, wanted, _ in steps if len(plan.trees) == 3]
    assert set(told[:-1]) == {(0, 0)}, "states are kept from a drafter that is not asked for all it knows"
    assert drafter.num_gaps > 0


@pytest.mark.parametrize("is_awake", [False, True])
def test_with_cheap_effort_a_drafter_is_asked_for_nothing_else_and_hears_states_while_it_is_awake(
    is_awake: bool,
) -> None:
    class Cheap(FuzzSpeculator):
        def choose(self, rows: Sequence[int], limits: Sequence[int], num_trees: int, has_prompts: bool) -> list[int]:
            super().choose(rows, limits, num_trees, has_prompts)
            self.effort, self._is_paired, self.drafting.hears_states = Effort.CHEAP, False, is_awake
            return list(limits)

    class OnlyLight(StatesDrafter):
        def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
            raise AssertionError("asked")

        def propose_cheap(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
            self.num_cheap += rows.size
            super().propose(rows, max_nodes, out)

    drafter = OnlyLight(0, 50, 7)
    loop = make_loop(drafters={"states": drafter}, make_speculator=Cheap)
    submits = [submit_of([1, 2, index], f"r{index}", drafter="states", max_tokens=20, seed=index) for index in range(3)]
    listener = run(loop, *submits)
    assert num_failures(listener) == 0
    for submit in submits:
        assert listener.answer(submit.id) == plain_answer(submit, 50, 256)
    assert drafter.num_cheap > 20
    assert (drafter.num_drafted > 0) == is_awake


@pytest.mark.parametrize(("position_s", "announced"), [(0.5, [60.0]), (0.001, [])])
def test_a_step_that_a_long_prompt_makes_slow_is_announced(position_s: float, announced: list[float]) -> None:
    loop = make_loop()
    told: list[float] = []
    loop.announce = told.append
    loop.handle(submit_of(range(1, 41), "before costs are known", max_tokens=2))
    while loop.has_work:
        loop.step()
    loop.speculator.begin(linear_cost(0.0, position_s, 128))
    loop.handle(submit_of([7] * 60, "long", max_tokens=5))
    while loop.has_work:
        loop.step()
    assert told == pytest.approx(announced), "once, for the prompt: steps of answers are short"


def test_a_step_that_is_not_announced_takes_no_more_than_a_third_of_the_least_limit() -> None:
    least = next(entry.metadata["ge"] for entry in dataclasses.fields(Settings) if entry.name == "worker_timeout_s")
    assert least / 3 >= _LONG_S
