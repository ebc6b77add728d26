"""Promise 1 for sampling parameters nobody thought of: drawn at random, plain against fuzzed, many rows together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from server.messages import Submit
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, make_loop, run_all, submit
from tests.unit.test_sampling import random_sampling
from verifier.load import load_backend
from verifier.options import VerifierOptions

NUM_REQUESTS = 24


def requests(seed: int, drafter: str) -> list[Submit]:
    rng = np.random.default_rng(seed)
    made = []
    for index in range(NUM_REQUESTS):
        prompt = rng.integers(3, VOCAB, int(rng.integers(1, 40))).tolist()
        sampling = replace(random_sampling(rng, VOCAB), max_tokens=int(rng.integers(1, 40)))
        made.append(submit(f"r{index}", prompt, sampling, drafter, int(rng.integers(2, 40))))
    return made


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("seed", range(2))
def test_text_does_not_depend_on_drafts(family: str, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_model(family, tmp_path_factory.mktemp("model"))
    options = VerifierOptions(model=folder, device="cpu", threads=1, max_rows=6, max_positions=96, page_size=8)
    verifier = load_backend(options)
    plain = run_all(make_loop(verifier, {}, max_batched_tokens=96), requests(seed, "none"))
    known = {one.prompt: plain.answers[one.id] for one in requests(seed, "none")}
    fuzz = AnswerFuzz(seed, VOCAB, known)
    fuzzed = run_all(make_loop(verifier, {"fuzz": fuzz}, max_batched_tokens=96), requests(seed, "fuzz"))
    for one in requests(seed, "fuzz"):
        assert fuzzed.answers[one.id] == plain.answers[one.id], one
    assert fuzzed.reasons == plain.reasons
    assert fuzz.num_accepted > 100
