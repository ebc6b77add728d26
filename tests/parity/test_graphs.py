"""A recorded step is the step that is not recorded, whatever is in it: chunks, trees, draws, lists, penalties, states.

On a CPU a tape stands in for CUDA graphs and Triton's interpreter for the compiled kernels; on a GPU both are real.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafters.base import News
from tests.causal import Causal
from tests.devices import DEVICES, HAS_GPU, require_kernels
from tests.families import SERVED, VOCAB, save_model
from tests.parity.harness import AnswerFuzz, Run, make_loop, run_all, submit
from tests.syncs import watched
from tests.tape import Tape, TapeRecorder
from verifier.backend import Backend
from verifier.cuda import backend as steps_backend
from verifier.cuda.graphs import Bucket
from verifier.cuda.recorder import CudaRecorder, Recorder
from verifier.load import load_backend
from verifier.model import Target, load_network
from verifier.options import VerifierOptions
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot, Wanted
from verifier.tree import DraftTrees
from verifier.verdict import Verdict

SAMPLING = (
    SamplingParams(max_tokens=6, seed=0, temperature=0.0),
    SamplingParams(max_tokens=5, seed=1, top_p=0.9, top_k=4, num_logprobs=2),
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

    def update(self, news: News) -> None:
        super().update(news)
        if news.hidden is not None:
            self.states.append(news.hidden.states.clone())


@dataclasses.dataclass
class Scene:
    """What a verifier said to requests, step by step."""

    run: Run
    verdicts: list[Verdict]
    states: list[torch.Tensor]


def make_verifier(folder: str, device: str, recorder: Recorder | None, **changes: Any) -> Backend:
    numbers = {"max_rows": 2, "max_positions": 16, "page_size": 4, "max_model_len": 48, "num_pages": 25}
    kept = {"dtype": "float32", "device": device, "attention": "triton", "threads": 1, "is_compiled": False}
    options = VerifierOptions(model=folder, **{**numbers, **kept, "is_eager": recorder is None, **changes})
    return load_backend(options, recorder)


def play(verifier: Backend, known: Mapping[tuple[int, ...], Sequence[int]], requests: int = len(PROMPTS)) -> Scene:
    """Answer the first requests; between steps, sizes are recorded while others' K/V lie in the pool."""
    verdicts: list[Verdict] = []
    run_step = verifier.run

    def run(plan: StepPlan, trees: DraftTrees, wanted: Wanted) -> Verdict:
        verdicts.append(run_step(plan, trees, wanted))
        return verdicts[-1]

    verifier.run = run  # type: ignore[method-assign]
    fuzz = Curious(3, VOCAB, known)
    loop = make_loop(verifier, {"fuzz": fuzz}, max_batched_tokens=16)
    step = loop.step

    def prepared() -> Any:
        outcome = step()
        verifier.warm(is_idle=True)
        return outcome

    loop.step = prepared  # type: ignore[method-assign]
    submits = [submit(str(i), prompt, SAMPLING[i], nodes=5) for i, prompt in enumerate(PROMPTS[:requests])]
    scene = Scene(run_all(loop, submits, ARRIVALS[:requests]), verdicts, fuzz.states)
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
    while verifier.warm(is_idle=True):
        pass
    recorded = play(verifier, known)
    assert_equal(recorded, plain[device], tolerance=1e-4)
    steps = len(recorded.verdicts)
    assert steps < recorder.num_replayed < 2 * steps, "nearly every pass was replayed, and the walks that can be"
    if device != "cpu":
        assert_equal(recorded, play(make_verifier(folder, device, Direct()), known), tolerance=0.0)


def steps_of(verifier: Backend, sampling: Sequence[SamplingParams]) -> Callable[[], Verdict]:
    """Prompts of two rows, then the step to be looked at: a tree in each row, everything asked for."""
    trees = DraftTrees.allocate(2)
    starts = tuple(RowStart(row, (3 + row, 4, 5), 3, one) for row, one in enumerate(sampling))
    pages = tuple((row, index, 1 + 8 * row + index) for row in range(2) for index in range(8))
    chunks = tuple(Chunk(row, 0, (3 + row, 4), False) for row in range(2))
    verifier.run(StepPlan(starts=starts, pages=pages, chunks=chunks), trees)
    for _ in range(2):
        trees.append([5, 6, 7], [-1, 0, 0], [1.0] * 3, [0] * 3)
    plan = StepPlan(trees=tuple(TreeSlot(row, 2, 3) for row in range(2)))
    return lambda: verifier.run(plan, trees, Wanted(num_candidates=2, hidden_tail=1))


@pytest.mark.parametrize("is_recorded", [False, True])
def test_the_host_waits_once(is_recorded: bool, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it reads what was won; whatever is brought to the device goes through pinned memory."""
    require_kernels("cpu")

    verifier = make_verifier(folder, "cpu", TapeRecorder() if is_recorded else None)
    step = steps_of(verifier, SAMPLING[1:3])
    step()
    if is_recorded:
        verifier.warm(is_idle=False)  # what was missed comes first
        verifier.warm(is_idle=True)
    reads: list[int] = []
    read_back = steps_backend.read_back
    monkeypatch.setattr(steps_backend, "read_back", lambda tensors: reads.append(1) or read_back(tensors))
    with watched(monkeypatch) as found:
        step()
    assert len(reads) == 1
    assert set(found) <= {("numpy", "read_back"), ("from_numpy", "to_device"), ("from_numpy", "StepBuffers._tensor")}
    assert ("numpy", "read_back") in found
    # Penalties are the exception: their counts are the host's.
    counted = steps_of(verifier, (SAMPLING[3], SAMPLING[0]))
    with watched(monkeypatch) as found:
        counted()
    assert {("tensor", "walk_levels"), ("tolist", "walk_levels")} <= set(found)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("is_recorded", [False, True])
def test_cuda_sees_no_other_wait(is_recorded: bool, folder: str) -> None:
    """The wait for what was won is one for an event, which this mode does not count."""
    verifier = make_verifier(folder, "cuda", Counting(torch.device("cuda")) if is_recorded else None)
    step = steps_of(verifier, SAMPLING[1:3])
    step()
    while verifier.warm(is_idle=True):
        pass
    step()  # what is allocated on first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
def test_a_larger_recording_serves_smaller_steps(device: str, folder: str) -> None:
    """Padding of a step is not what a larger one has left behind: no trees, no slots, nothing of the attention's."""
    require_kernels(device)
    recorder: Any = TapeRecorder() if device == "cpu" else Counting(torch.device(device))
    verifiers = [make_verifier(folder, device, None), make_verifier(folder, device, recorder)]
    said = []
    for verifier in verifiers:
        steps_of(verifier, (SAMPLING[0], SAMPLING[4]))
        if verifier is verifiers[1]:
            with torch.inference_mode():
                verifier._graphs._record(Bucket(8, 2, 8))
        trees, verdicts = DraftTrees.allocate(2), []
        for rows in ((0, 1), (0,), (1,), (0, 1)):
            trees.clear()
            for _ in rows:
                trees.append([5, 6, 7, 5], [-1, 0, 0, 2], [1.0] * 4, [0] * 4)
            plan = StepPlan(trees=tuple(TreeSlot(row, 2, 4) for row in rows))
            verdicts.append(verifier.run(plan, trees, Wanted(num_candidates=VOCAB)))
        said.append(verdicts)
    assert recorder.num_replayed == 8
    for plain_one, recorded in zip(*said, strict=True):
        assert plain_one.num_accepted.tolist() == recorded.num_accepted.tolist()
        assert plain_one.tokens[:, 0].tolist() == recorded.tokens[:, 0].tolist()
        np.testing.assert_allclose(recorded.candidate_logits, plain_one.candidate_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", SERVED)
def test_no_pass_waits_for_the_device(family: str, tmp_path: Path) -> None:
    """What looks into a tensor on the way cannot be recorded; nor may a step of such a family be slowed down by it."""
    layers = {"n_layer" if "n_embd" in SERVED[family] else "num_hidden_layers": 2}
    target = Target(load_network(save_model(family, tmp_path, **layers), "", torch.float32, "cpu"))
    ids = torch.arange(8)[None]
    with torch.inference_mode(), Tape() as tape:
        target(ids, ids % 4, Causal(), None, torch.arange(3))
    assert len(tape.calls) > 20


@pytest.mark.parametrize("fault", ["operation not permitted when stream is capturing", "no room"])
def test_what_cannot_be_recorded_runs_as_it_is(
    fault: str, folder: str, plain: dict[str, Scene], caplog: pytest.LogCaptureFixture
) -> None:
    """A line for each try, of which there are few, and the same text."""
    device = next(iter(plain))

    class Broken(Direct):
        has_room = fault != "no room"
        num_asked = 0

        def record(self, run: Callable[[], None]) -> Callable[[], None]:
            self.num_asked += 1
            run()
            raise RuntimeError(f"CUDA error: {fault}\nand a long trace")

    recorder = Broken()
    verifier = make_verifier(folder, device, recorder)
    with caplog.at_level(logging.INFO, logger="verifier.cuda.graphs"):
        while verifier.warm(is_idle=True):
            pass
        verifier.prepare_first()
        assert not verifier.warm(is_idle=True)
    assert len(caplog.records) == (1 if fault == "no room" else 3)
    for record in caplog.records:
        assert "no memory for more" in record.message if fault == "no room" else fault in record.message
        assert "\n" not in record.message
    known = {tuple(prompt): plain[device].run.answers[str(index)] for index, prompt in enumerate(PROMPTS[:1])}
    run = play(verifier, known, requests=1).run
    assert run.answers["0"] == plain[device].run.answers["0"]
    assert recorder.num_asked == (0 if fault == "no room" else 3)
