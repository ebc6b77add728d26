"""Log-probabilities of prompts, as lm-eval reads them: those of transformers, however the prompt was cut into steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import server.demo
from server.messages import Submit, TokenLogprob
from server.worker import scheduler
from tests.devices import DEVICES, require_kernels
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, Run, generate, greedy, make_loop, run_all, submit
from tests.parity.test_apart import Crowded
from tests.tape import TapeRecorder
from verifier.backend import Backend
from verifier.load import load_backend
from verifier.options import VerifierOptions

DEMO = Path(server.demo.__file__).parent / "model"
NUM_TOP = 4


@torch.inference_mode()
def truth(folder: str, prompt: list[int]) -> torch.Tensor:
    """transformers' own log-probabilities [tokens - 1, V] of what follows each token of a prompt but the last."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: torch.Tensor = model(torch.tensor([prompt])).logits
    return logits[0, :-1].double().log_softmax(dim=-1)


def scores(run: Run, name: str) -> list[TokenLogprob]:
    deltas = run.deltas[name]
    told = [one for delta in deltas for one in delta.prompt_logprobs or ()]
    first = next(index for index, delta in enumerate(deltas) if delta.tokens)
    assert not any(delta.prompt_logprobs for delta in deltas[first:]), "scores come before the answer"
    return told


def assert_right(found: list[TokenLogprob], prompt: list[int], expected: torch.Tensor, num_top: int = NUM_TOP) -> None:
    assert len(found) == len(prompt) - 1
    for place, (one, token) in enumerate(zip(found, prompt[1:], strict=True)):
        row = expected[place]
        assert one.logprob == pytest.approx(row[token].item(), abs=1e-4)
        near = (row - row[token]).abs() < 1e-4
        above = int((row > row[token] + 1e-4).sum())
        assert above < one.rank <= above + int(near.sum()), "a rank is only as certain as the numbers"
        assert len(one.top) == num_top
        best = row.topk(num_top).values.tolist() if num_top else []
        assert [top.logprob for top in one.top] == pytest.approx(best, abs=1e-4)
        assert all(top.logprob == pytest.approx(row[top.token].item(), abs=1e-4) for top in one.top)


def scored(name: str, prompt: list[int], num_tokens: int = 6, num_top: int = NUM_TOP, drafter: str = "none") -> Submit:
    plain = submit(name, prompt, greedy(num_tokens), drafter, 1 if drafter == "none" else 8)
    return msgspec.structs.replace(plain, num_prompt_logprobs=num_top)


def demo_prompt() -> list[int]:
    size = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    return [int(token) for token in np.random.default_rng(5).integers(3, size, 150)]


@pytest.mark.parametrize("attention", ["sdpa", "auto"])
def test_the_demo_model_scores_as_transformers_does(attention: str) -> None:
    prompt = demo_prompt()
    options: dict[str, Any] = {"model": str(DEMO), "device": "cpu", "dtype": "float32", "threads": 1}
    verifier = load_backend(VerifierOptions(**options, attention=attention, max_rows=2, max_positions=64))
    run = run_all(make_loop(verifier, {}), [scored("a", prompt), scored("b", prompt[:40], num_top=0)])
    expected = truth(str(DEMO), prompt)
    assert_right(scores(run, "a"), prompt, expected)
    assert_right(scores(run, "b"), prompt[:40], expected[:39], num_top=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("llama", tmp_path_factory.mktemp("model"))


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [[int(token) for token in rng.integers(1, VOCAB, size)] for size in (41, 1, 2, 30)]


def make_verifier(folder: str, **changes: Any) -> Backend:
    numbers = {"max_rows": 4, "max_positions": 64, "page_size": 8, "max_model_len": 128}
    return load_backend(VerifierOptions(**{"model": folder, "device": "cpu", "threads": 1, **numbers, **changes}))


@pytest.mark.parametrize("case", ["together", "small steps", "few pages", "few scored", "apart", "warm cache"])
def test_scores_do_not_depend_on_how_a_prompt_ran(folder: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "few scored":
        monkeypatch.setattr(scheduler, "MAX_SCORED", 3)
    few = {"num_pages": 10, "max_model_len": 64} if case == "few pages" else {}
    verifier: Any = make_verifier(folder, **few)
    if case == "apart":
        verifier = Crowded(verifier)
    known, _ = generate(folder, prompts(), 20)
    fuzz = AnswerFuzz(1, VOCAB, {tuple(p): answer for p, answer in zip(prompts(), known, strict=True)})
    loop = make_loop(verifier, {"fuzz": fuzz}, max_batched_tokens=16 if case == "small steps" else 64)
    if case == "warm cache":
        run_all(loop, [submit("first", prompts()[0], greedy(4), "none", 1)])
    run = run_all(loop, [scored(str(i), prompt, 20, drafter="fuzz") for i, prompt in enumerate(prompts())])
    assert [run.answers[str(index)] for index in range(len(known))] == known
    assert run.num_prefix_hits == 0 or case == "few pages", "a prompt whose tokens are scored runs whole"
    assert (run.num_preempted > 0) == (case == "few pages")
    for index, prompt in enumerate(prompts()):
        assert_right(scores(run, str(index)), prompt, truth(folder, prompt))


@pytest.mark.parametrize("num_told", [0, 7, 39, 40])
def test_a_next_worker_tells_only_what_was_not_told(folder: str, num_told: int) -> None:
    prompt, expected = prompts()[0], truth(folder, prompts()[0])
    answer = generate(folder, [prompt], 6)[0][0]
    again = msgspec.structs.replace(
        scored("a", prompt), num_prompt_told=num_told, answer=tuple(answer[:2]) if num_told == 40 else ()
    )
    run = run_all(make_loop(make_verifier(folder), {}, max_batched_tokens=16), [again])
    found = scores(run, "a")
    assert len(found) == 40 - num_told
    for one, place in zip(found, range(num_told, 40), strict=True):
        assert one.logprob == pytest.approx(expected[place, prompt[place + 1]].item(), abs=1e-4)
    assert answer[-len(run.answers["a"]) :] == run.answers["a"]


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_and_recordings_score_alike(folder: str, device: str) -> None:
    require_kernels(device)
    options = {"device": device, "attention": "triton", "dtype": "float32", "is_eager": device != "cpu"}
    numbers = {"max_rows": 2, "max_positions": 16, "page_size": 4, "max_model_len": 64, "num_pages": 40}
    recorder = TapeRecorder() if device == "cpu" else None
    verifier = load_backend(VerifierOptions(model=folder, threads=1, **{**options, **numbers}), recorder)
    while recorder is not None and verifier.warm(is_idle=True):
        pass
    prompt = prompts()[0][:23]
    run = run_all(make_loop(verifier, {}, max_batched_tokens=16), [scored("a", prompt)])
    assert_right(scores(run, "a"), prompt, truth(folder, prompt))
