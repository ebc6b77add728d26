"""Steps that raise after all their work, over a real model: run again row by row, the text stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.messages import Submit
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, Run, make_loop, run_all, submit
from verifier.backend import Backend
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import SamplingParams, StepPlan, Wanted
from verifier.tree import DraftTrees
from verifier.verdict import Verdict

NUM_REQUESTS = 5
NUM_TOKENS = 30


class Crowded:
    """Cannot bear more than one row; by then its tokens are counted for penalties and its K/V written and moved."""

    def __init__(self, verifier: Backend) -> None:
        self._verifier = verifier
        self.geometry = verifier.geometry
        self.num_raised = 0

    def run(self, plan: StepPlan, trees: DraftTrees, wanted: Wanted) -> Verdict:
        verdict = self._verifier.run(plan, trees, wanted)
        if len(plan.trees) + len(plan.chunks) > 1:
            self.num_raised += 1
            raise RuntimeError("too many rows")
        return verdict


def submits(drafter: str) -> list[Submit]:
    def sampling(index: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=NUM_TOKENS,
            seed=index,
            temperature=(0.0, 0.8)[index % 2],
            presence_penalty=0.3,
            frequency_penalty=0.4,
            repetition_penalty=1.2,
            num_logprobs=1,
        )

    def prompt(index: int) -> list[int]:
        return [1 + (index * 7 + step * 3) % (VOCAB - 1) for step in range(9 + 11 * index)]

    return [submit(f"r{index}", prompt(index), sampling(index), drafter) for index in range(NUM_REQUESTS)]


def told(run: Run) -> dict[str, list[float]]:
    return {
        name: [one.logprob for delta in deltas for one in delta.logprobs or ()] for name, deltas in run.deltas.items()
    }


def test_rows_that_run_again_alone_win_the_same_tokens(tmp_path: Path) -> None:
    verifier = load_backend(
        VerifierOptions(
            model=save_model("llama", tmp_path),
            device="cpu",
            threads=1,
            max_rows=8,
            max_model_len=128,
            max_positions=64,
        )
    )
    plain = run_all(make_loop(verifier, {}), submits("none"))
    answers = {one.prompt: plain.answers[one.id] for one in submits("none")}
    fuzz, crowded = AnswerFuzz(1, VOCAB, answers), Crowded(verifier)
    apart = run_all(make_loop(crowded, {"fuzz": fuzz}), submits("fuzz"))  # type: ignore[arg-type]
    assert crowded.num_raised > 5
    assert fuzz.num_accepted > NUM_TOKENS
    assert apart.answers == plain.answers
    for name, logprobs in told(plain).items():
        assert told(apart)[name] == pytest.approx(logprobs, abs=1e-4)
