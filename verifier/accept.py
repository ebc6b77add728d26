"""The walk: from the root along the target's own tokens, as far as the tree guessed them.

Each back end has its own: torch/accept.py level by level, cpu/accept.py the whole batch in one compiled call,
cuda/accept.py by kernels. All are tested against `verifier.tree.walk`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.rows import SamplingRows
from verifier.step import PackedStep
from verifier.tree import DraftTrees

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Choice:
    """S places where a token is to be chosen: place s belongs to row rows[s] and fills position positions[s]."""

    rows: list[int]
    positions: list[int]


Chooser = Callable[[torch.Tensor, SamplingRows, Choice], torch.Tensor]
"""Tokens [S] int64 for logits [S, V]: verifier.torch.sampling.choose, or what does the same faster."""


@dataclass(frozen=True, slots=True)
class Walks:
    """S trees to walk: the plan's draft trees, then a bare root for every row whose last chunk ran.

    Their nodes are packed like the rows of the logits: [K, V].
    """

    rows: Int32  # [S]
    starts: Int32  # [S + 1]
    tokens: Int64  # [K]
    parents: Int32  # [K]
    positions: Int64  # [K] position of the token to be chosen at this node
    max_depth: int

    @classmethod
    def make(cls, trees: DraftTrees, step: PackedStep, ends: list[int]) -> Walks:
        """`ends` = rows whose last chunk ran, in the order of their logits."""
        num_nodes, num_trees, num_ends = trees.num_nodes, trees.num_rows, len(ends)
        max_depth = int(trees.depths[:num_nodes].max()) if num_nodes else 0
        if not num_ends:
            return cls(
                rows=step.rows[:num_trees],
                starts=step.starts[: num_trees + 1],
                tokens=trees.tokens[:num_nodes],
                parents=trees.parents[:num_nodes],
                positions=step.next_positions,
                max_depth=max_depth,
            )
        bare = np.arange(num_nodes + 1, num_nodes + num_ends + 1, dtype=np.int32)
        return cls(
            rows=np.concatenate([step.rows[:num_trees], np.array(ends, np.int32)]),
            starts=np.concatenate([trees.row_starts[: num_trees + 1], bare]),
            tokens=np.concatenate([trees.tokens[:num_nodes], np.zeros(num_ends, np.int64)]),
            parents=np.concatenate([trees.parents[:num_nodes], np.full(num_ends, -1, np.int32)]),
            positions=step.next_positions,
            max_depth=max_depth,
        )


@dataclass(frozen=True, slots=True)
class Path:
    """Where the walks led."""

    tokens: Int64  # [S, D + 1]
    num_accepted: Int32  # [S]; -1 where the logits were not finite
    nodes: Int32  # [S, D]

    @classmethod
    def make(cls, walks: Walks) -> Path:
        """Room for what the walks can win."""
        num = walks.rows.shape[0]
        tokens = np.zeros((num, walks.max_depth + 1), np.int64)
        return cls(tokens, np.zeros(num, np.int32), np.zeros((num, walks.max_depth), np.int32))


def walk_levels(logits: torch.Tensor, walks: Walks, state: SamplingRows, task: tuple[Chooser, Path, list[int]]) -> None:
    """Walk some trees level by level, over logits [K, V] on any device; one host sync a level.

    Args: `task` = how tokens are chosen, where to write, which trees.
    """
    choose, path, active = task
    nodes = walks.starts[:-1].tolist()
    level = 0
    while active:
        here = [nodes[tree] for tree in active]
        choice = Choice([int(walks.rows[tree]) for tree in active], [int(walks.positions[node]) for node in here])
        chosen = choose(logits[torch.tensor(here, device=logits.device)], state, choice).tolist()
        going = []
        for tree, token in zip(active, chosen, strict=True):
            row, start = int(walks.rows[tree]), int(walks.starts[tree])
            if token < 0:
                path.num_accepted[tree] = -1
                continue
            path.tokens[tree, level] = token
            path.num_accepted[tree] = level
            if state.records[row]["has_penalties"]:
                state.counts[row, token] += 1
            span = range(nodes[tree] + 1, int(walks.starts[tree + 1]))
            parent = nodes[tree] - start
            child = next((n for n in span if walks.parents[n] == parent and walks.tokens[n] == token), None)
            if child is not None:
                path.nodes[tree, level] = child - start
                nodes[tree] = child
                going.append(tree)
        active = going
        level += 1
