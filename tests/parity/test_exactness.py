"""The sampler is exact: chi-square of the first two tokens against softmax, 100,000 draws under a tree drafter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from tests.families import save_model
from verifier.backend import Backend
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.tree import DraftTrees
from verifier.verdict import Verdict

NUM_DRAWS = 100_000
VOCAB = 12
ROWS = 500
PROMPT = (3, 7, 5, 9)
THRESHOLD = 0.001


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("llama", tmp_path_factory.mktemp("model"), vocab_size=VOCAB, num_hidden_layers=1)


@pytest.fixture(scope="module")
def exact(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Softmax of the first token [V] and of the second given the first [V, V], from transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        first = model(torch.tensor([PROMPT])).logits[0, -1].double().softmax(-1)
        second = model(torch.tensor([[*PROMPT, token] for token in range(VOCAB)])).logits[:, -1].double().softmax(-1)
    return first.numpy(), second.numpy()


def draw(folder: str) -> np.ndarray:
    """First and second token of every draw: [NUM_DRAWS, 2].

    The root of each tree is the prompt's last token, so both tokens are won inside a tree: six children, the likeliest
    two of them with children of their own.
    """
    options = VerifierOptions(
        model=folder, device="cpu", threads=1, max_rows=ROWS, max_positions=ROWS * 16, page_size=8, max_model_len=32
    )
    verifier = load_backend(options)
    trees = DraftTrees.allocate(ROWS)
    pages = tuple((row, index, 1 + row * 4 + index) for row in range(ROWS) for index in range(4))
    tokens = [PROMPT[-1], 0, 2, 4, 6, 8, 10, *range(0, 6), *range(4, 7)]
    parents = [-1, 0, 0, 0, 0, 0, 0, *[2] * 6, *[4] * 3]
    out = []
    for batch in range(NUM_DRAWS // ROWS):
        starts = tuple(
            RowStart(row, PROMPT, len(PROMPT), SamplingParams(max_tokens=4, seed=batch * ROWS + row))
            for row in range(ROWS)
        )
        chunks = tuple(Chunk(row, 0, PROMPT[:-1], False) for row in range(ROWS))
        trees.clear()
        verifier.run(StepPlan(starts=starts, pages=pages, chunks=chunks), trees)
        for _ in range(ROWS):
            trees.append(tokens, parents, [1.0] * len(tokens), [0] * len(tokens))
        slots = tuple(TreeSlot(row, len(PROMPT) - 1, len(tokens)) for row in range(ROWS))
        verdict = verifier.run(StepPlan(trees=slots), trees)
        out.append(_first_two(verifier, verdict, trees))
    return np.concatenate(out)


def _first_two(verifier: Backend, verdict: Verdict, trees: DraftTrees) -> np.ndarray:
    """Rows whose first token was not in the tree win their second one in a plain step."""
    tokens, accepted = verdict.tokens, verdict.num_accepted
    both = np.stack([tokens[:, 0], tokens[:, 1] if tokens.shape[1] > 1 else tokens[:, 0]], axis=1)
    short = np.flatnonzero(accepted == 0)
    trees.clear()
    for row in short:
        trees.append_root(int(tokens[row, 0]))
    verdict = verifier.run(StepPlan(trees=tuple(TreeSlot(int(row), len(PROMPT), 1) for row in short)), trees)
    both[short, 1] = verdict.tokens[:, 0]
    return both


def p_values(draws: np.ndarray, exact: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    first, second = exact
    counts = np.bincount(draws[:, 0], minlength=VOCAB)
    pairs = np.bincount(draws[:, 0] * VOCAB + draws[:, 1], minlength=VOCAB**2).astype(float)
    expected = (first[:, None] * second).ravel() * len(draws)
    rare = expected < 5
    observed = np.append(pairs[~rare], pairs[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    keep = wanted > 0
    return (
        float(chisquare(counts, first * len(draws) / first.sum()).pvalue),
        float(chisquare(observed[keep], wanted[keep] * observed[keep].sum() / wanted[keep].sum()).pvalue),
    )


@pytest.mark.slow
def test_first_and_second_token_follow_softmax(folder: str, exact: tuple[np.ndarray, np.ndarray]) -> None:
    draws = draw(folder)
    first, pair = p_values(draws, exact)
    assert first > THRESHOLD
    assert pair > THRESHOLD


@pytest.mark.slow
def test_a_planted_bias_is_found(
    folder: str, exact: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same test fails for a sampler that prefers the likeliest token by a twentieth of a nat."""
    from verifier.cpu import accept

    honest = accept.accept_host

    def biased(logits: np.ndarray, *rest: object) -> object:
        logits = logits.copy()
        logits[np.arange(len(logits)), logits.argmax(axis=1)] += 0.05
        return honest(logits, *rest)

    monkeypatch.setattr(accept, "accept_host", biased)
    first, pair = p_values(draw(folder), exact)
    assert min(first, pair) < THRESHOLD
