"""On a CPU a row's numbers do not depend on what else is in the step: bit for bit, in every family and type.

A token's logits alone are the truth; in a tree, in a batch, behind a prompt cut anywhere, they are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families import SERVED, VOCAB, save_model
from verifier.cpu.products import has_products
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import NOTHING, Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.tree import DraftTrees

pytestmark = pytest.mark.skipif(not has_products(), reason="no compiled products on this machine")

PAGE = 8
LENGTH = 140  # beyond two tiles of keys
SAMPLING = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
HAS_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "phimoe", "granitemoe", "deepseek_v3")


class Bench:
    """Runs steps and keeps their logits. Owns rows and pages of a verifier."""

    def __init__(self, folder: str, dtype: str, num_rows: int, threads: int = 2) -> None:
        num_pages = -(-(LENGTH + 64) // PAGE)
        self.verifier = load_backend(
            VerifierOptions(
                model=folder, device="cpu", dtype=dtype, threads=threads, max_rows=num_rows, max_positions=2048,
                page_size=PAGE, num_pages=1 + num_rows * num_pages, is_compiled=True,
            )
        )  # fmt: skip
        self._trees = DraftTrees.allocate(num_rows)
        self._found = torch.empty(0)
        forward = self.verifier._forward

        def kept(*args: object) -> tuple[torch.Tensor, torch.Tensor | None]:
            logits, states = forward(*args)  # type: ignore[arg-type]
            self._found = logits.clone()
            return logits, states

        self.verifier._forward = kept  # type: ignore[method-assign]
        self._pages = tuple(
            (row, index, 1 + row * num_pages + index) for row in range(num_rows) for index in range(num_pages)
        )

    def start(self, texts: Sequence[Sequence[int]]) -> None:
        starts = tuple(RowStart(row, tuple(text), len(text), SAMPLING) for row, text in enumerate(texts))
        self._trees.clear()
        self.verifier._buffers.write_pages(self._pages)
        chunks = tuple(Chunk(row, 0, tuple(text[:1]), False) for row, text in enumerate(texts))
        self.verifier.run(StepPlan(starts=starts, chunks=chunks), self._trees, NOTHING)

    def step(
        self, trees: Sequence[tuple[int, int, Sequence[int], Sequence[int]]], chunks: Sequence[Chunk] = ()
    ) -> list[torch.Tensor]:
        """Logits [nodes, V] of each tree (row, cached tokens, tokens, parents)."""
        self._trees.clear()
        for _, _, tokens, parents in trees:
            self._trees.append(tokens, parents, [1.0] * len(tokens), [0] * len(tokens))
        slots = tuple(TreeSlot(row, num_cached, len(tokens)) for row, num_cached, tokens, _ in trees)
        self.verifier.run(StepPlan(trees=slots, chunks=tuple(chunks)), self._trees, NOTHING)
        counts = [len(tokens) for _, _, tokens, _ in trees]
        return list(torch.split(self._found[: sum(counts)], counts))

    def alone(self, row: int, text: Sequence[int], first: int = 1) -> list[torch.Tensor]:
        """Logits [V] at the text's positions from `first` on, each in a step of its own."""
        return [self.step([(row, place, text[place : place + 1], [-1])])[0][0] for place in range(first, len(text))]


def bushy(rng: np.random.Generator, text: Sequence[int], size: int) -> tuple[list[int], list[int], dict[int, int]]:
    """A tree of `size` nodes that follows a text among siblings, and by node how far along the text it is."""
    tokens, parents, right = [text[0]], [-1], {0: 0}
    while len(tokens) < size:
        parent = max(right) if rng.random() < 0.4 else int(rng.integers(len(tokens)))
        depth = right.get(parent)
        is_next = depth is not None and depth + 1 < len(text) and rng.random() < 0.8
        token = text[depth + 1] if is_next and depth is not None else int(rng.integers(3, VOCAB))
        if (parent, token) in zip(parents, tokens, strict=True):
            continue
        if is_next and depth is not None:
            right[len(tokens)] = depth + 1
        tokens.append(token)
        parents.append(parent)
    return tokens, parents, right


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [name for name in SERVED if name not in HAS_EXPERTS])
def test_a_token_has_the_same_logits_wherever_it_stands(family: str, dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(sum(family.encode()))
    texts = [rng.integers(3, VOCAB, LENGTH).tolist() for _ in range(3)]
    bench = Bench(save_model(family, tmp_path), dtype, 3)
    assert bench.verifier.is_row_invariant
    bench.start(texts)
    truth = [bench.alone(row, text) for row, text in enumerate(texts)]
    seen = 0
    for place in (1, 40, 62, 63, 64, 100, 127):
        trees, rights = [], []
        for row, text in enumerate(texts):
            tokens, parents, right = bushy(rng, text[place:], int(rng.integers(1, 65)))
            trees.append((row, place, tokens, parents))
            rights.append(right)
        cut = int(rng.integers(1, place + 1))
        bench.step([], [Chunk(row, 0, tuple(text[:cut]), False) for row, text in enumerate(texts)])
        for row, text in enumerate(texts):
            if cut < place:  # what was written by the last step is written anew, in two pieces
                bench.step([], [Chunk(row, cut, tuple(text[cut:place]), False)])
        together = bench.step(trees)
        apart = [bench.step([tree])[0] for tree in trees]
        for row, right in enumerate(rights):
            for node, depth in right.items():
                expected = truth[row][place + depth - 1]
                assert torch.equal(together[row][node], expected), f"row {row}, node {node}, {place} + {depth}"
                assert torch.equal(apart[row][node], expected), f"row {row} alone, node {node}, {place} + {depth}"
                seen += depth > 0
    assert seen > 60
