"""Draft trees, packed row after row, and the plain-Python walk that is the oracle of acceptance.

Owns nothing but its arrays; knows nothing about models or drafters. Invariant of every tree: node 0 is
the root (the last true token), parents come before children, siblings carry distinct tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verifier.plan import MAX_TREE_NODES

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Int8 = NDArray[np.int8]
Float32 = NDArray[np.float32]


@dataclass(slots=True)
class DraftTrees:
    """R trees with N nodes in all, packed into arrays that are allocated once.

    Only the first `num_rows` rows and `num_nodes` nodes hold meaning. Owns its arrays; a drafter fills
    them through `append` or in place, and keeps no reference.
    """

    tokens: Int64  # [capacity] token of the node
    parents: Int32  # [capacity] index within the row's tree, -1 at the root
    depths: Int32  # [capacity] 0 at the root; position = cached length + depth
    ancestors: Int64  # [capacity] bit j: node j of the same tree is visible (itself included)
    scores: Float32  # [capacity] estimated probability that the node is accepted; 1 at the root
    sources: Int8  # [capacity] which kind of guess this is (drafters.base.Source)
    row_starts: Int32  # [max_rows + 1]
    num_rows: int = 0

    @classmethod
    def allocate(cls, max_rows: int, max_nodes: int = MAX_TREE_NODES) -> DraftTrees:
        """Room for `max_rows` trees of `max_nodes` nodes each."""
        capacity = max_rows * max_nodes
        return cls(
            tokens=np.zeros(capacity, np.int64),
            parents=np.zeros(capacity, np.int32),
            depths=np.zeros(capacity, np.int32),
            ancestors=np.zeros(capacity, np.int64),
            scores=np.zeros(capacity, np.float32),
            sources=np.zeros(capacity, np.int8),
            row_starts=np.zeros(max_rows + 1, np.int32),
        )

    @property
    def num_nodes(self) -> int:
        """N: nodes of all trees."""
        return int(self.row_starts[self.num_rows])

    def clear(self) -> None:
        """Forget all trees; the arrays stay."""
        self.num_rows = 0
        self.row_starts[0] = 0

    def span(self, index: int) -> slice:
        """Where tree `index` lies in the packed arrays."""
        return slice(int(self.row_starts[index]), int(self.row_starts[index + 1]))

    def append_root(self, token: int) -> None:
        """Add a tree that is a bare root: plain decoding."""
        start = self.num_nodes
        self.tokens[start] = token
        self.parents[start] = -1
        self.depths[start] = 0
        self.ancestors[start] = 1
        self.scores[start] = 1.0
        self.sources[start] = 0
        self.num_rows += 1
        self.row_starts[self.num_rows] = start + 1

    def append(
        self,
        tokens: Sequence[int],
        parents: Sequence[int],
        scores: Sequence[float],
        sources: Sequence[int],
    ) -> None:
        """Add one tree, root first, from plain sequences; depths and ancestors are derived."""
        start = self.num_nodes
        stop = start + len(tokens)
        self.tokens[start:stop] = tokens
        self.parents[start:stop] = parents
        self.scores[start:stop] = scores
        self.sources[start:stop] = sources
        derive(self.parents[start:stop], self.depths[start:stop], self.ancestors[start:stop])
        self.num_rows += 1
        self.row_starts[self.num_rows] = stop

    def truncate_rows(self, num_rows: int) -> None:
        """Drop every tree from index `num_rows` on (a drafter failed half way)."""
        self.num_rows = num_rows

    def check(self, max_nodes: Sequence[int] | Int32 | None = None) -> None:
        """Assert the contract of a drafter: see the invariant at the top of this file."""
        for index in range(self.num_rows):
            nodes = self.span(index)
            parents = self.parents[nodes].tolist()
            tokens = self.tokens[nodes].tolist()
            size = len(tokens)
            limit = MAX_TREE_NODES if max_nodes is None else int(max_nodes[index])
            assert 1 <= size <= limit, f"tree {index}: {size} nodes, limit {limit}"
            assert parents[0] == -1, f"tree {index}: root has parent {parents[0]}"
            seen: set[tuple[int, int]] = set()
            for node in range(1, size):
                parent = parents[node]
                assert 0 <= parent < node, f"tree {index}: node {node} has parent {parent}"
                edge = (parent, tokens[node])
                assert edge not in seen, f"tree {index}: siblings share token {tokens[node]}"
                seen.add(edge)
            depths, ancestors = np.zeros(size, np.int32), np.zeros(size, np.int64)
            derive(self.parents[nodes], depths, ancestors)
            assert np.array_equal(depths, self.depths[nodes]), f"tree {index}: depths"
            assert np.array_equal(ancestors, self.ancestors[nodes]), f"tree {index}: ancestors"


def derive(parents: Int32, depths: Int32, ancestors: Int64) -> None:
    """Fill `depths` and `ancestors` ([T] each) of one tree from `parents` [T]."""
    one = np.int64(1)
    for node, parent in enumerate(parents.tolist()):
        own = np.left_shift(one, np.int64(node))
        if parent < 0:
            depths[node], ancestors[node] = 0, own
        else:
            depths[node], ancestors[node] = depths[parent] + 1, ancestors[parent] | own


def walk(trees: DraftTrees, index: int, choose: Callable[[int, list[int]], int]) -> tuple[list[int], list[int]]:
    """Accept along one tree: the oracle of every fast walk.

    `choose(node, path)` is the target's token at `node`, given the tokens accepted on the way there.
    Returns the won tokens (accepted ones, then one of the target's own) and the accepted nodes.
    """
    nodes = trees.span(index)
    tokens: list[Any] = trees.tokens[nodes].tolist()
    parents: list[Any] = trees.parents[nodes].tolist()
    won: list[int] = []
    accepted: list[int] = []
    node = 0
    while True:
        token = choose(node, won)
        won.append(token)
        child = next(
            (n for n in range(node + 1, len(tokens)) if parents[n] == node and tokens[n] == token),
            None,
        )
        if child is None:
            return won, accepted
        accepted.append(child)
        node = child
