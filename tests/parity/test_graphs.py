"""A recorded step is the step that is not recorded, whatever is in it: chunks, trees, draws, lists, penalties, states.

On a CPU a tape stands in for CUDA graphs and Triton's interpreter for the compiled kernels; on a GPU both are real.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from drafters.base import News
from tests.devices import DEVICES, require_kernels
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, Run, make_loop, run_all, submit
from tests.tape import TapeRecorder
from verifier.plan import SamplingParams, StepPlan, Wanted
from verifier.recorder import CudaRecorder, Recorder
from verifier.runner import Verifier, VerifierOptions
from verifier.tree import DraftTrees
from verifier.verdict import Verdict

SAMPLING = (
    SamplingParams(max_tokens=6, seed=0, temperature=0.0),
    SamplingParams(max_tokens=5, seed=1, top_p=0.9, top_k=40, num_logprobs=2),
    SamplingParams(max_tokens=5, seed=2, logit_bias=((3, 4.0), (5, -9.0)), min_tokens=3, stop_ids=(3, 7)),
    SamplingParams(max_tokens=5, seed=3, presence_penalty=0.5, num_logprobs=1),
    SamplingParams(max_tokens=5, seed=4, temperature=0.0, num_logprobs=0),
)
PROMPTS = [[3, 4, 5, 6], list(range(5, 23)), [8, 9], [10, 11, 12], [6]]
ARRIVALS = [0, 0, 2, 3, 5]


class Direct:
    """Replays by running again: what differs from a recording is the recording's fault."""

    has_room = True

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run


class Counting(CudaRecorder):
    """CUDA graphs. Owns the number of replays."""

    num_replayed = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        replay = super().record(run)

        def counted() -> None:
            self.num_replayed += 1
            replay()

        return counted


class Curious(AnswerFuzz):
    """Wants to see everything, and keeps the states it is told. Owns them."""

    wants_hidden = True
    hidden_window = 3
    num_candidates = 2

    def __init__(self, seed: int, vocab_size: int, answers: Mapping[tuple[int, ...], Sequence[int]]) -> None:
        super().__init__(seed, vocab_size, answers)
        self.states: list[torch.Tensor] = []

    def read(self, news: News) -> None:
        super().read(news)
        if news.hidden is not None:
            self.states.append(news.hidden.states.clone())


@dataclasses.dataclass
class Scene:
    """What a verifier said to all requests, step by step."""

    run: Run
    verdicts: list[Verdict]
    states: list[torch.Tensor]


def make_verifier(folder: str, device: str, recorder: Recorder | None, **changes: Any) -> Verifier:
    numbers = {"max_rows": 2, "max_positions": 16, "page_size": 4, "max_model_len": 48, "num_pages": 25}
    kept = {"dtype": "float32", "device": device, "attention": "triton", "threads": 1, "is_compiled": False}
    options = VerifierOptions(model=folder, **{**numbers, **kept, "is_eager": recorder is None, **changes})
    return Verifier(options, recorder)


def play(verifier: Verifier, known: Mapping[tuple[int, ...], Sequence[int]], is_preparing: bool = True) -> Scene:
    """Answer everything; between steps, sizes are recorded while others' K/V lie in the pool."""
    verdicts: list[Verdict] = []
    run_step = verifier.run

    def run(plan: StepPlan, trees: DraftTrees, wanted: Wanted) -> Verdict:
        verdicts.append(run_step(plan, trees, wanted))
        return verdicts[-1]

    verifier.run = run  # type: ignore[method-assign]
    fuzz = Curious(3, VOCAB, known)
    loop = make_loop(verifier, {"fuzz": fuzz}, max_batched_tokens=16)
    if is_preparing:
        step = loop.step

        def prepared() -> Any:
            outcome = step()
            verifier.prepare_more(is_idle=True)
            return outcome

        loop.step = prepared  # type: ignore[method-assign]
    submits = [submit(str(i), prompt, SAMPLING[i], nodes=5) for i, prompt in enumerate(PROMPTS)]
    scene = Scene(run_all(loop, submits, ARRIVALS), verdicts, fuzz.states)
    verifier.run = run_step  # type: ignore[method-assign]
    return scene


def assert_equal(one: Scene, other: Scene, tolerance: float) -> None:
    """The same steps, won tokens and choices; numbers to `tolerance`."""
    assert one.run.answers == other.run.answers
    assert one.run.reasons == other.run.reasons
    assert len(one.verdicts) == len(other.verdicts)
    for mine, theirs in zip(one.verdicts, other.verdicts, strict=True):
        assert mine.rows.tolist() == theirs.rows.tolist()
        assert mine.num_accepted.tolist() == theirs.num_accepted.tolist()
        assert (mine.candidates is None) == (theirs.candidates is None)
        if mine.candidates is not None:
            assert np.array_equal(mine.candidates, theirs.candidates)
            np.testing.assert_allclose(mine.candidate_logits, theirs.candidate_logits, atol=tolerance, rtol=0)
        assert mine.logprobs.keys() == theirs.logprobs.keys()
        for tree, mines in mine.logprobs.items():
            for mine_of, theirs_of in zip(mines, theirs.logprobs[tree], strict=True):
                assert abs(mine_of.logprob - theirs_of.logprob) <= tolerance
                assert [token for token, _ in mine_of.top] == [token for token, _ in theirs_of.top]
    for mine_states, their_states in zip(one.states, other.states, strict=True):
        torch.testing.assert_close(mine_states, their_states, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def plain(folder: str) -> dict[str, Scene]:
    """Steps as they are, by device, with guesses that hit: they are told by another back end."""
    first = play(make_verifier(folder, "cpu", None, attention="sdpa"), {})
    known = {tuple(prompt): first.run.answers[str(index)] for index, prompt in enumerate(PROMPTS)}
    scenes = {}
    for param in DEVICES:
        device = param if isinstance(param, str) else str(param.values[0])
        require_kernels(device)
        scenes[device] = play(make_verifier(folder, device, None), known)
        assert scenes[device].run.answers == first.run.answers
        assert scenes[device].run.num_steps < first.run.num_steps, "nothing was guessed right"
    return scenes


@pytest.mark.parametrize("device", DEVICES)
def test_each_replay_equals_the_step_that_is_not_recorded(device: str, folder: str, plain: dict[str, Scene]) -> None:
    recorder: Any = TapeRecorder() if device == "cpu" else Counting(torch.device(device))
    verifier = make_verifier(folder, device, recorder)
    known = {tuple(prompt): plain[device].run.answers[str(index)] for index, prompt in enumerate(PROMPTS)}
    while verifier.prepare_more(is_idle=True):
        pass
    recorded = play(verifier, known)
    assert_equal(recorded, plain[device], tolerance=1e-4)
    steps = len(recorded.verdicts)
    assert steps < recorder.num_replayed < 2 * steps, "nearly every pass was replayed, and the walks that can be"
    if device != "cpu":
        assert_equal(recorded, play(make_verifier(folder, device, Direct()), known), tolerance=0.0)
