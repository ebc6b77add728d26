"""A recorded step says what the same step says that is not recorded, whatever is in it."""

from __future__ import annotations

from pathlib import Path

from tests.devices import require_kernels
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, Run, greedy, make_loop, run_all, submit
from tests.tape import TapeRecorder
from verifier.plan import SamplingParams
from verifier.runner import Verifier, VerifierOptions

PROMPTS = [list(range(3, 9)), [5, 6, 7], [8, 9, 10, 11]]


def make_verifier(folder: str, recorder: TapeRecorder | None, **changes: object) -> Verifier:
    numbers = {"max_rows": 4, "max_positions": 32, "page_size": 4, "max_model_len": 64, "num_pages": 60}
    kept = {"dtype": "float32", "device": "cpu", "attention": "triton", "threads": 1, "is_eager": recorder is None}
    return Verifier(VerifierOptions(model=folder, **{**numbers, **kept, **changes}), recorder)  # type: ignore[arg-type]


def answer(verifier: Verifier, sampling: list[SamplingParams], known: dict[tuple[int, ...], list[int]]) -> Run:
    fuzz = AnswerFuzz(3, VOCAB, known)
    loop = make_loop(verifier, {"fuzz": fuzz}, max_batched_tokens=32)
    submits = [submit(str(i), prompt, sampling[i], nodes=6) for i, prompt in enumerate(PROMPTS)]
    return run_all(loop, submits, arrivals=[0, 0, 2])


def test_it(tmp_path: Path) -> None:
    require_kernels("cpu")
    folder = save_model("llama", tmp_path, num_hidden_layers=1)
    sampling = [
        greedy(6),
        SamplingParams(max_tokens=6, seed=1, top_p=0.9, top_k=40),
        SamplingParams(max_tokens=4, seed=2),
    ]
    plain = answer(make_verifier(folder, None), sampling, {})
    known = {tuple(prompt): plain.answers[str(i)] for i, prompt in enumerate(PROMPTS)}
    recorder = TapeRecorder()
    verifier = make_verifier(folder, recorder)
    for _ in range(4):
        while verifier.prepare_more(True):
            pass
        print(recorder.num_recorded, recorder.num_replayed, verifier._steps.graphs.buckets)
        assert answer(verifier, sampling, known).answers == plain.answers
