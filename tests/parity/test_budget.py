"""Promise 1 with the budget: the same texts, whoever drafts, whatever is verified or kept from a drafter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from drafters.base import Drafter
from server.messages import Submit
from server.worker.budget import Budget
from server.worker.warmup import begin_budget
from tests.drafting import make_views
from tests.fakes import FuzzBudget
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, Run, make_loop, run_all, submit
from verifier.options import VerifierOptions
from verifier.plan import SamplingParams
from verifier.runner import Verifier

NAMES = ("trigram", "suffix", "fuzz")


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    folder = save_model("qwen3", tmp_path_factory.mktemp("model"))
    return Verifier(
        VerifierOptions(
            model=folder, device="cpu", threads=1, max_rows=6, max_positions=128, page_size=8, kv_cache_gib=0.05
        )
    )


def batch(seed: int) -> tuple[list[Submit], list[int]]:
    """Requests of all kinds, and when they arrive."""
    rng = np.random.default_rng(seed)
    submits = []
    for index in range(10):
        sampling = SamplingParams(
            max_tokens=int(rng.integers(5, 40)),
            seed=index,
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_p=float(rng.choice([1.0, 0.9])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
        )
        prompt = rng.integers(3, VOCAB, int(rng.integers(2, 60))).tolist()
        submits.append(submit(f"r{index}", prompt, sampling, str(rng.choice(NAMES)), int(rng.choice([4, 16, 64]))))
    return submits, rng.integers(0, 30, 10).tolist()


def run(verifier: Verifier, seed: int, known: Mapping[tuple[int, ...], list[int]], budget: Budget | None) -> Run:
    drafters: dict[str, Drafter] = {
        **make_views(VOCAB, max_rows=6),
        "fuzz": AnswerFuzz(seed, VOCAB, known),
    }
    loop = make_loop(verifier, drafters, 128, budget)
    if budget is not None and not budget.is_ready:
        begin_budget(loop, verifier, VOCAB)
        assert budget.is_ready
    return run_all(loop, *batch(seed))


@pytest.mark.parametrize("seed", range(4))
def test_texts_are_the_same_with_the_budget_on_and_off(verifier: Verifier, seed: int) -> None:
    off = run(verifier, seed, {}, None)
    known = {one.prompt: off.answers[one.id] for one in batch(seed)[0]}
    measured, mad = Budget(6, NAMES), FuzzBudget(seed, 6, NAMES)
    for budget in (measured, mad):
        on = run(verifier, seed, known, budget)
        assert on.answers == off.answers
        assert on.reasons == off.reasons
    assert mad.num_cut > 50
    assert mad.num_asleep > 5
