"""The compiled pass gives what the plain one gives, at any size; where it cannot, the plain one runs and says why."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, assert_same, generate, greedy, make_loop, run_all, submit
from verifier.cpu.compiled import CompiledForward, CompileError
from verifier.options import VerifierOptions
from verifier.runner import Verifier

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is absent")


def options(folder: str, **changes: object) -> VerifierOptions:
    numbers = {"device": "cpu", "threads": 1, "max_rows": 4, "max_positions": 48, "num_pages": 33, "page_size": 8}
    return VerifierOptions(model=folder, **{**numbers, **changes})  # type: ignore[arg-type]


@needs_compiler
def test_mixed_traffic_comes_to_the_text_of_generate(tmp_path: Path) -> None:
    """Chunks, trees of any size, bare roots, preemption: every shape that the one graph must serve."""
    folder = save_model("llama", tmp_path)
    verifier = Verifier(options(folder, is_compiled=True))
    assert verifier.is_compiled
    assert verifier.is_captured == (False, False)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (1, 3, 70, 41, 20)]
    answers, gaps = generate(folder, prompts, 40)
    fuzz = AnswerFuzz(7, VOCAB, {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)})
    loop = make_loop(verifier, {"fuzz": fuzz}, max_batched_tokens=48)
    drafters = ("fuzz", "fuzz", "none", "fuzz", "none")
    requests = [submit(f"r{i}", prompt, greedy(40), drafters[i]) for i, prompt in enumerate(prompts)]
    run = run_all(loop, requests, arrivals=[0, 0, 3, 5, 30])
    for index, answer in enumerate(answers):
        assert_same(run.answers[f"r{index}"], answer, gaps[index], f"r{index}")
    assert fuzz.num_accepted > 50


@needs_compiler
def test_a_pass_that_differs_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CompiledForward, "_compile", lambda self: _noisy(self))
    with caplog.at_level(logging.WARNING):
        verifier = Verifier(options(save_model("llama", tmp_path), is_compiled=True))
    assert not verifier.is_compiled
    assert "times the tolerance" in caplog.text


def _noisy(forward: CompiledForward):  # type: ignore[no-untyped-def]
    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, states = forward._target(inputs[0], inputs[1], forward._planned, inputs[2], inputs[3])
        assert states is not None
        return logits + 0.1 * logits.abs().max(), states

    return run


def test_without_a_compiler_the_pass_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        verifier = Verifier(options(save_model("llama", tmp_path), is_compiled=True))
    assert not verifier.is_compiled
    assert all(verifier.is_captured)
    assert "needs g++" in caplog.text
    with pytest.raises(CompileError):
        CompiledForward(verifier._target, [], VOCAB)
