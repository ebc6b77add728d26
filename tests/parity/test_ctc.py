"""Promise 1 with a head: its guesses, right or wrong, alone or merged with the others, change the speed only."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from drafters.base import Drafter
from drafters.head.head import Head, HeadShape
from drafters.head.source import HeadSource
from server.worker.speculator import Speculator
from tests.drafting import make_views
from tests.fakes import FuzzSpeculator
from tests.families import VOCAB, save_model
from tests.parity.harness import assert_same, generate, greedy, make_loop, run_all, submit
from verifier.backend import Backend
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import SamplingParams

NUM_TOKENS = 48
FAMILIES = ("llama", "gpt2", "gemma2")


def make_drafters(verifier: Backend) -> dict[str, Drafter]:
    """A head of random weights: it guesses boldly, and nearly always wrong."""
    torch.manual_seed(4)
    shared = verifier.shared_weights
    shape = HeadShape(
        vocab_size=verifier.geometry.vocab_size,
        embed_size=shared.input_embedding.shape[1],
        hidden_size=shared.hidden_size,
        width=32,
        ffn_size=48,
        window=16,
        bias_rank=4,
    )
    head = Head(shape)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return dict(make_views(verifier.geometry.vocab_size, head=HeadSource(head, shared, max_rows=4)))


def make_verifier(folder: str) -> Backend:
    return load_backend(
        VerifierOptions(model=folder, device="cpu", threads=1, max_rows=4, max_positions=48, num_pages=33, page_size=8)
    )


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(request.param, tmp_path_factory.mktemp("model"))


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(11)
    shared = rng.integers(3, VOCAB, 33).tolist()
    return [rng.integers(3, VOCAB, length).tolist() for length in (3, 41, 70)] + [
        shared + rng.integers(3, VOCAB, length).tolist() for length in (2, 9, 30)
    ]


def test_greedy_equals_generate(folder: str) -> None:
    answers, gaps = generate(folder, prompts(), NUM_TOKENS)
    verifier = make_verifier(folder)
    loop = make_loop(verifier, make_drafters(verifier), max_batched_tokens=48)
    kinds = ["ctc", "hybrid", "none", "hybrid", "ctc", "hybrid"]
    requests = [submit(f"r{i}", prompt, greedy(NUM_TOKENS), kinds[i]) for i, prompt in enumerate(prompts())]
    requests[5] = msgspec.structs.replace(requests[5], prediction=tuple(answers[5][:20] + answers[4][:20]))
    run = run_all(loop, requests, arrivals=[0, 0, 3, 5, 40, 60])
    for index, answer in enumerate(answers):
        assert_same(run.answers[f"r{index}"], answer, gaps[index], f"{folder} r{index}")
    assert run.num_preempted > 0
    assert run.num_prefix_hits > 0
    records = {name: deltas[-1].record for name, deltas in run.deltas.items()}
    for index in (0, 1, 3, 4, 5):
        record = records[f"r{index}"]
        assert record is not None
        assert record.num_draft_tokens > 0, f"r{index} was never drafted for"


@pytest.mark.parametrize("drafter", ["ctc", "hybrid"])
def test_same_seed_same_text(folder: str, drafter: str) -> None:
    fuzzy: list[FuzzSpeculator] = []

    def run(name: str, *, is_fuzzy: bool = False) -> dict[str, list[int]]:
        verifier = make_verifier(folder)
        sampling = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1}
        requests = [
            submit(f"r{i}", prompt, SamplingParams(max_tokens=NUM_TOKENS, seed=40 + i, **sampling), name)
            for i, prompt in enumerate(prompts())
        ]
        make = FuzzSpeculator if is_fuzzy else Speculator
        loop = make_loop(verifier, make_drafters(verifier), 48, make)
        if isinstance(loop.speculator, FuzzSpeculator):
            fuzzy.append(loop.speculator)
        return run_all(loop, requests).answers

    plain = run("none")
    assert run(drafter) == plain
    assert run(drafter, is_fuzzy=True) == plain
    assert fuzzy[0].num_cheap > 10


def test_a_drafter_with_a_head_fails_alone(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = make_verifier(folder)
    drafters = make_drafters(verifier)

    def broken(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(HeadSource, "guess", broken)
    requests = [submit(f"r{i}", prompt, greedy(12), "hybrid") for i, prompt in enumerate(prompts()[:3])]
    answers = generate(folder, prompts()[:3], 12)[0]
    run = run_all(make_loop(verifier, drafters, max_batched_tokens=48), requests)
    assert [run.answers[f"r{i}"] for i in range(3)] == answers
