"""Hidden states reach drafters as transformers itself computes them, and asking for them changes no bit of the logits.

Mixed batch, chunked prefill, fuzzed trees, so few pages that rows are preempted, prefix-cache hits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from drafters.base import News, RowContext
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, greedy, make_loop, run_all, submit
from verifier.backend import Backend
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot, Wanted
from verifier.tree import DraftTrees

NUM_TOKENS = 40
WINDOW = 12


class Recorder(AnswerFuzz):
    """Keeps every state it is told, by seed of the request and position. Owns them."""

    wants_hidden = True
    hidden_window = WINDOW

    def __init__(self, seed: int, vocab_size: int, answers: Mapping[tuple[int, ...], Sequence[int]]) -> None:
        super().__init__(seed, vocab_size, answers)
        self._seeds: dict[int, int] = {}
        self.states: dict[int, dict[int, torch.Tensor]] = {}
        self.num_unfinished = 0

    def start(self, row: int, context: RowContext) -> None:
        super().start(row, context)
        self._seeds[row] = context.seed

    def update(self, news: News) -> None:
        super().update(news)
        assert news.hidden is not None
        self.num_unfinished += not news.rows.size
        starts, states = news.hidden.starts.tolist(), news.hidden.states.clone()
        for index, (row, first) in enumerate(zip(news.hidden.rows.tolist(), news.hidden.first.tolist(), strict=True)):
            known = self.states.setdefault(self._seeds[row], {})
            known.update(enumerate(states[starts[index] : starts[index + 1]], first))


@torch.inference_mode()
def expected(folder: str, tokens: Sequence[int]) -> torch.Tensor:
    """transformers' own states [length, H], in one pass over the whole text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states: torch.Tensor = model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states[-1][0]
    return states


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_states_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path)
    rng = np.random.default_rng(1)
    shared = rng.integers(3, VOCAB, 33).tolist()
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (3, 70, 41)]
    prompts += [shared + rng.integers(3, VOCAB, length).tolist() for length in (2, 9, 30)]
    options = VerifierOptions(
        model=folder,
        device="cpu",
        threads=1,
        max_rows=4,
        max_positions=48,
        num_pages=33,
        page_size=8,
    )
    verifier = load_backend(options)

    def sampling(index: int) -> SamplingParams:
        return SamplingParams(max_tokens=NUM_TOKENS, seed=index, temperature=(0.0, 0.7)[index % 2])

    texts = [submit(f"r{index}", prompt, sampling(index), "none") for index, prompt in enumerate(prompts)]
    plain = run_all(make_loop(verifier, {}, max_batched_tokens=48), texts)
    answers = {one.prompt: plain.answers[one.id] for one in texts}
    recorder = Recorder(3, VOCAB, answers)
    loop = make_loop(verifier, {"recorder": recorder, "fuzz": AnswerFuzz(4, VOCAB, answers)}, max_batched_tokens=48)
    drafters = ["recorder", "recorder", "fuzz", "recorder", "recorder", "recorder"]
    texts = [submit(f"r{index}", prompt, sampling(index), drafters[index]) for index, prompt in enumerate(prompts)]
    run = run_all(loop, texts, arrivals=[0, 0, 2, 5, 40, 60])
    assert run.answers == plain.answers
    assert run.num_preempted > 0
    assert run.num_prefix_hits > 0
    assert recorder.num_accepted > 50
    assert recorder.num_unfinished > 0
    assert sorted(recorder.states) == [0, 1, 3, 4, 5]
    for index, states in recorder.states.items():
        tokens = [*prompts[index], *plain.answers[f"r{index}"]]
        right = expected(folder, tokens)
        first = len(prompts[index]) - 1
        assert set(range(first, len(tokens) - 1)) <= set(states), "not every token's state is known"
        places = sorted(states)
        torch.testing.assert_close(torch.stack([states[place] for place in places]), right[places], atol=1e-5, rtol=0)


def script(verifier: Backend, hidden_tail: int) -> list[tuple[np.ndarray, torch.Tensor | None]]:
    """Steps of chunks, trees and both: the raw logits of all tree nodes, best first, and the states."""
    trees = DraftTrees.allocate(3)
    prompt = tuple(range(5, 25))
    starts = tuple(RowStart(row, prompt, len(prompt), greedy(9)) for row in range(3))
    pages = tuple((row, index, 1 + 8 * row + index) for row in range(3) for index in range(8))
    chunks = (Chunk(0, 0, prompt[:-1], False), Chunk(1, 0, prompt[:3], False), Chunk(2, 0, prompt, True))
    wanted = Wanted(VOCAB, hidden_tail)
    out = [verifier.run(StepPlan(starts=starts, pages=pages, chunks=chunks), trees, wanted)]
    trees.append([prompt[-1], 7, 8, 9], [-1, 0, 0, 2], [1.0] * 4, [0] * 4)
    slot, chunk = TreeSlot(0, len(prompt) - 1, 4), Chunk(1, 3, prompt[3:12], False)
    out.append(verifier.run(StepPlan(trees=(slot,), chunks=(chunk,)), trees, wanted))
    out.append(verifier.run(StepPlan(trees=(slot,)), trees, wanted))
    logits = [np.zeros((0, VOCAB), np.float32) if one.candidate_logits is None else one.candidate_logits for one in out]
    return [
        (values, None if one.hidden is None else one.hidden.states.clone())
        for one, values in zip(out, logits, strict=True)
    ]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_asking_for_states_changes_no_bit(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path)
    shape = {"device": "cpu", "threads": 1, "max_rows": 3, "max_positions": 64, "page_size": 8}
    for is_compiled in (True, False):
        verifier = load_backend(VerifierOptions(model=folder, **shape, is_compiled=is_compiled))
        without, told = script(verifier, 0), script(verifier, 4)
        for (values, none), (same, states) in zip(without, told, strict=True):
            assert np.array_equal(values, same)
            assert none is None
            assert states is not None
    # Three tails of at most four, behind the one place with logits; the second step has a tree and a tail of four.
    assert [states.shape[0] for _, states in told if states is not None] == [1 + 4 + 3 + 4, 4 + 4, 4]


def test_no_logits_are_made_for_states(tmp_path: Path) -> None:
    """A tail of many positions times a large vocabulary would cost more than the chunk itself."""
    folder = save_model("llama", tmp_path)
    verifier = load_backend(
        VerifierOptions(model=folder, device="cpu", threads=1, max_rows=3, max_positions=64, page_size=8, is_eager=True)
    )
    sizes: list[int] = []
    head = verifier._network.get_output_embeddings()  # type: ignore[operator]
    head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.shape[1]))
    script(verifier, 0)
    plain = sizes.copy()
    sizes.clear()
    script(verifier, 4)
    assert sizes == plain == [1, 4, 4]


def test_the_shared_weights_are_views_that_give_the_logits(tmp_path: Path) -> None:
    folder = save_model("opt", tmp_path, word_embed_proj_dim=16)
    verifier = load_backend(
        VerifierOptions(model=folder, device="cpu", threads=1, max_rows=3, max_positions=64, page_size=8)
    )
    weights = verifier.shared_weights
    assert weights.hidden_size == 16
    assert weights.input_embedding.shape == weights.output_embedding.shape == (VOCAB, 16)
    assert weights.output_embedding.data_ptr() == verifier._network.get_output_embeddings().weight.data_ptr()
    assert not weights.output_embedding.requires_grad
    for values, states in script(verifier, 1):
        assert states is not None
        logits = states[: values.shape[0]] @ weights.output_embedding.T
        torch.testing.assert_close(logits.sort(descending=True).values, torch.from_numpy(values))
