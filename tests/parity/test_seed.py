"""Promise 1, sampled: same seed, same text, whatever the drafter, the batch mates, the chunk size or the pages."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
import pytest

from drafters.base import Drafter
from server.messages import Submit
from tests.drafting import make_view, make_views
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, Run, make_loop, run_all, submit
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import SamplingParams

SETTINGS = {
    "nucleus": {"top_p": 0.9},
    "min-p": {"min_p": 0.05, "top_k": 40},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "everything": {
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "logit_bias": ((5, 2.0), (9, -100.0)),
        "min_tokens": 10,
        "stop_ids": (11, 12),
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("qwen3", tmp_path_factory.mktemp("model"))


def requests(drafter: str, nodes: int = 16) -> list[Submit]:
    rng = np.random.default_rng(3)
    made = []
    for index, (name, values) in enumerate(SETTINGS.items()):
        prompt = rng.integers(3, VOCAB, 12 + 9 * index).tolist()
        sampling = SamplingParams(max_tokens=48, seed=100 + index, temperature=0.8, num_logprobs=2, **values)
        made.append(submit(name, prompt, sampling, drafter, nodes))
    return made


def run_once(folder: str, drafters: Mapping[str, Drafter], submits: list[Submit], **options: int) -> Run:
    settings = {"max_rows": 4, "max_positions": 96, "page_size": 8, **options}
    verifier = load_backend(VerifierOptions(model=folder, device="cpu", threads=1, **settings))
    return run_all(make_loop(verifier, drafters, max_batched_tokens=settings["max_positions"]), submits)


@pytest.fixture(scope="module")
def plain(folder: str) -> Run:
    """Every request alone, no drafts."""
    merged = Run()
    for one in requests("none", nodes=1):
        alone = run_once(folder, {}, [one])
        merged.answers.update(alone.answers)
        merged.deltas.update(alone.deltas)
        merged.reasons.update(alone.reasons)
    return merged


def trigram() -> Drafter:
    return make_view("trigram", VOCAB)


def test_plain_answers_are_worth_comparing(plain: Run) -> None:
    for name, answer in plain.answers.items():
        assert len(set(answer)) > 10, (name, answer)
    assert len(plain.answers["everything"]) > 10


@pytest.mark.parametrize("case", ["fuzz", "trigram", "suffix", "small chunks", "few pages", "many nodes"])
def test_same_seed_same_text(folder: str, plain: Run, case: str) -> None:
    known = {one.prompt: plain.answers[one.id] for one in requests("fuzz")}
    fuzz = AnswerFuzz(5, VOCAB, known)
    if case == "trigram":
        run = run_once(folder, {"trigram": trigram()}, requests("trigram"))
    elif case == "suffix":
        run = run_once(folder, {"suffix": make_view("suffix", VOCAB)}, requests("suffix"))
    elif case == "small chunks":
        run = run_once(folder, {"fuzz": fuzz}, requests("fuzz", 4), max_positions=8)
    elif case == "few pages":
        run = run_once(folder, {"fuzz": fuzz}, requests("fuzz"), num_pages=33, max_positions=64)
    else:
        run = run_once(folder, {"fuzz": fuzz}, requests("fuzz", 64 if case == "many nodes" else 16), max_positions=256)
    assert run.answers == plain.answers
    assert run.reasons == plain.reasons
    if case not in ("trigram", "suffix"):
        assert fuzz.num_accepted > 30


@pytest.mark.parametrize("kind", ["right", "wrong", "half right"])
@pytest.mark.parametrize("drafter", ["suffix", "trigram", "none"])
def test_a_prediction_changes_the_speed_only(folder: str, plain: Run, drafter: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    submits = []
    for one in requests(drafter):
        answer = plain.answers[one.id]
        other = rng.integers(3, VOCAB, len(answer)).tolist()
        prediction = {"right": answer, "wrong": other, "half right": answer[:20] + other[:3] + answer[24:]}[kind]
        submits.append(msgspec.structs.replace(one, prediction=tuple(prediction)))
    run = run_once(folder, dict(make_views(VOCAB)), submits)
    assert run.answers == plain.answers
    assert run.reasons == plain.reasons
    records = [deltas[-1].record for deltas in run.deltas.values()]
    drafted = sum(record.num_prediction_drafted for record in records if record)
    accepted = sum(record.num_prediction_accepted for record in records if record)
    num_tokens = sum(map(len, plain.answers.values()))
    if drafter != "suffix":
        assert (drafted, accepted) == (0, 0)
    elif kind == "right":
        assert accepted > 0.8 * num_tokens
        assert accepted <= drafted <= num_tokens + len(submits)
    elif kind == "wrong":
        assert accepted < 0.1 * num_tokens
        assert drafted > accepted
    else:
        assert accepted > 0.5 * num_tokens


def test_logprobs_do_not_depend_on_drafts(folder: str, plain: Run) -> None:
    """Raw log-probabilities of the same tokens, to what a float32 forward pass of another shape may round."""
    known = {one.prompt: plain.answers[one.id] for one in requests("fuzz")}
    run = run_once(folder, {"fuzz": AnswerFuzz(9, VOCAB, known)}, requests("fuzz"))
    for name in plain.answers:
        mine = [one for delta in run.deltas[name] for one in delta.logprobs or ()]
        theirs = [one for delta in plain.deltas[name] for one in delta.logprobs or ()]
        assert [one.logprob for one in mine] == pytest.approx([one.logprob for one in theirs], abs=1e-4)
        assert [[top.token for top in one.top] for one in mine] == [[top.token for top in one.top] for one in theirs]
        assert all(len(one.top) == 2 for one in mine)


def test_resumed_request_goes_on_to_the_same_text(folder: str, plain: Run) -> None:
    """What the supervisor does after a worker's death: prompt plus the tokens already sent."""
    for one in requests("none", nodes=1):
        answer = plain.answers[one.id]
        cut = len(answer) // 2
        again = Submit(one.id, one.prompt, one.sampling, one.speculation, one.tenant, tuple(answer[:cut]))
        run = run_once(folder, {}, [again])
        assert answer[:cut] + run.answers[one.id] == answer
