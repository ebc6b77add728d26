"""Promise 1, greedy: for every family that the probe accepts, the text equals transformers' own generate.

Mixed batch, chunked prefill, a drafter that fuzzes, so few pages that rows are preempted, prefix-cache hits.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.drafting import make_view
from tests.families import SERVED, VOCAB, save_model
from tests.parity.harness import AnswerFuzz, assert_same, generate, greedy, make_loop, run_all, submit
from verifier.load import load_backend
from verifier.options import VerifierOptions

NUM_TOKENS = 64


@pytest.mark.parametrize("family", SERVED)
def test_greedy_equals_generate(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path)
    rng = np.random.default_rng(sum(family.encode()))
    shared = rng.integers(3, VOCAB, 33).tolist()
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (3, 41, 70)]
    prompts += [shared + rng.integers(3, VOCAB, length).tolist() for length in (2, 9, 30)]
    answers, gaps = generate(folder, prompts, NUM_TOKENS)
    assert len({token for answer in answers for token in answer}) > 8, "a target that repeats itself proves nothing"
    # 33 pages of 8 hold one longest row and no more than two or three of these: somebody is preempted.
    verifier = load_backend(
        VerifierOptions(
            model=folder, device="cpu", threads=1, max_rows=4, max_positions=48, num_pages=33, page_size=8,
            is_compiled=True,
        )
    )  # fmt: skip
    known = {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}
    fuzz = AnswerFuzz(7, VOCAB, known)
    loop = make_loop(verifier, {"fuzz": fuzz, "suffix": make_view("suffix", VOCAB)}, max_batched_tokens=48)
    drafters = ["fuzz", "fuzz", "none", "fuzz", "fuzz", "suffix"]
    requests = [submit(f"r{i}", prompt, greedy(NUM_TOKENS), drafters[i]) for i, prompt in enumerate(prompts)]
    requests[5] = msgspec.structs.replace(requests[5], prediction=tuple(answers[5][:20] + answers[4][:20]))
    run = run_all(loop, requests, arrivals=[0, 0, 3, 5, 40, 60])
    for index in range(len(prompts)):
        assert_same(run.answers[f"r{index}"], answers[index], gaps[index], f"{family} r{index}")
        assert run.reasons[f"r{index}"] == "length"
    assert run.num_preempted > 0
    assert run.num_prefix_hits > 0
    assert fuzz.num_accepted > 50
