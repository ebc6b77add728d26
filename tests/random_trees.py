"""Random choices and random draft trees for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from verifier.tree import DraftTrees


def pick(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[int(rng.integers(0, len(choices)))]


def random_trees(rng: np.random.Generator, num_trees: int, vocab: int, most: int = 30) -> DraftTrees:
    trees = DraftTrees.allocate(num_trees)
    for _ in range(num_trees):
        tokens, parents = [int(rng.integers(0, vocab))], [-1]
        for _ in range(int(rng.integers(0, most))):
            parent, token = int(rng.integers(max(0, len(tokens) - 5), len(tokens))), int(rng.integers(0, vocab))
            if (parent, token) not in set(zip(parents, tokens, strict=True)):
                tokens.append(token)
                parents.append(parent)
        trees.append(tokens, parents, [1.0] * len(tokens), [0] * len(tokens))
    return trees
