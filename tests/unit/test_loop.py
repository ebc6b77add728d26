"""Random traffic through the whole corridor over a toy target: the text is the plain function's, whatever happens."""

from __future__ import annotations

import random

import pytest

from drafters.base import Drafter
from server.messages import Abort, Delta, Outcome, Submit
from server.worker.loop import Loop
from tests.fakes import FakeGeometry, FuzzDrafter, make_loop, plain_answer, submit_of


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
        drafter=rng.choice(["none", "fuzz", "other", "fails"]),
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


@pytest.mark.parametrize("seed", range(60))
def test_random_traffic_gives_the_plain_text(seed: int) -> None:
    rng = random.Random(seed)
    geometry = fuzz_geometry(rng)
    vocab = geometry.vocab_size
    drafters: dict[str, Drafter] = {
        "fuzz": FuzzDrafter(seed, vocab),
        "other": FuzzDrafter(seed + 1, vocab, hit_rate=0.95),
        "fails": FuzzDrafter(seed + 2, vocab, fail_rate=0.05),
    }
    loop = make_loop(geometry, drafters, has_prefix_cache=rng.random() < 0.8)
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
