"""A server that runs on our kernels says what transformers says, and draws what the other back ends draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.devices import DEVICES, require_kernels
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, Run, assert_same, generate, greedy, make_loop, run_all, submit
from verifier.backend import Backend
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import SamplingParams

PROMPTS = [list(range(3, 23)), [5, 6, 7, 8, 9]]
NUM_TOKENS = 8


def make_verifier(folder: str, device: str, attention: str) -> Backend:
    return load_backend(
        VerifierOptions(
            model=folder,
            dtype="float32",
            device=device,
            attention=attention,
            threads=1,
            max_rows=4,
            max_positions=64,
            page_size=4,
            max_model_len=64,
            num_pages=80,
            is_eager=True,
        )
    )


def answer(verifier: Backend, fuzz: AnswerFuzz, sampling: list[SamplingParams]) -> Run:
    loop = make_loop(verifier, {"fuzz": fuzz})
    submits = [submit(str(index), prompt, sampling[index], nodes=8) for index, prompt in enumerate(PROMPTS)]
    return run_all(loop, submits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_greedy_answers_are_those_of_generate(family: str, device: str, tmp_path: Path) -> None:
    require_kernels(device)
    folder = save_model(family, tmp_path, num_hidden_layers=2)
    answers, gaps = generate(folder, PROMPTS, NUM_TOKENS)
    fuzz = AnswerFuzz(0, VOCAB, {tuple(prompt): answers[index] for index, prompt in enumerate(PROMPTS)})
    run = answer(make_verifier(folder, device, "triton"), fuzz, [greedy(NUM_TOKENS)] * 2)
    assert fuzz.num_accepted > NUM_TOKENS // 2
    for index in range(2):
        assert_same(run.answers[str(index)], answers[index], gaps[index], f"{family} {index}")


@pytest.mark.parametrize("device", DEVICES)
def test_sampled_answers_are_those_of_sdpa(device: str, tmp_path: Path) -> None:
    """With truncation in one row, and penalties, which are walked level by level, in the other."""
    require_kernels(device)
    folder = save_model("llama", tmp_path, num_hidden_layers=2)
    sampling = [
        SamplingParams(max_tokens=5, seed=1, top_p=0.9, top_k=40),
        SamplingParams(max_tokens=5, seed=2, presence_penalty=0.5, logit_bias=((3, 2.0),)),
    ]
    runs = [
        answer(make_verifier(folder, device, name), AnswerFuzz(1, VOCAB, {}), sampling) for name in ("sdpa", "triton")
    ]
    assert runs[0].answers == runs[1].answers
