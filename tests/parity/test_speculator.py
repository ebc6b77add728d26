"""Promise 1: the same texts, whatever the speculator drafts, verifies or keeps from a drafter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from drafters.base import Drafter
from server.messages import Submit
from server.worker.loop import Loop
from server.worker.profile import finish
from server.worker.speculator import Speculator
from server.worker.trials import measure
from tests.drafting import make_views
from tests.fakes import FuzzSpeculator
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, make_loop, run_all, submit
from verifier.backend import Backend
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import SamplingParams

NAMES = ("trigram", "suffix", "fuzz")


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    folder = save_model("qwen3", tmp_path_factory.mktemp("model"))
    return load_backend(
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


def make(verifier: Backend, seed: int, known: Mapping[tuple[int, ...], list[int]], *, is_fuzzy: bool = False) -> Loop:
    drafters: dict[str, Drafter] = {
        **make_views(VOCAB, max_rows=6),
        "fuzz": AnswerFuzz(seed, VOCAB, known),
    }
    return make_loop(verifier, drafters, 128, FuzzSpeculator if is_fuzzy else Speculator)


@pytest.mark.parametrize("seed", range(4))
def test_texts_are_the_same_whatever_the_speculator_chooses(verifier: Backend, seed: int) -> None:
    plain = run_all(make(verifier, seed, {}), *batch(seed))
    known = {one.prompt: plain.answers[one.id] for one in batch(seed)[0]}
    measured, fuzzy = make(verifier, seed, known), make(verifier, seed, known, is_fuzzy=True)
    finish(measure(measured, verifier, VOCAB))
    assert measured.speculator.cost is not None
    for loop in (measured, fuzzy):
        found = run_all(loop, *batch(seed))
        assert found.answers == plain.answers
        assert found.reasons == plain.reasons
    assert isinstance(fuzzy.speculator, FuzzSpeculator)
    assert fuzzy.speculator.num_cut > 50
