"""The walk: from the root along the target's own tokens, as far as the tree guessed them.

`accept_host` does the whole batch in one Numba call; `accept_device` is the same rule in torch, level by level, for
logits that live on a device (device_accept.py does it by kernels). All are tested against `verifier.tree.walk`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.host_sampling import argmax_finite, choose_host
from verifier.jit import jit
from verifier.rows import SamplingRows
from verifier.step import PackedStep
from verifier.torch.sampling import Choice, choose
from verifier.tree import DraftTrees

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

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


def accept_host(logits: Float32, walks: Walks, state: SamplingRows, best: Int32 | None) -> Path:
    """Walk all trees on the host. `best` [n <= K] is the argmax of the first n nodes, if known."""
    path = Path.make(walks)
    _walk_all(
        (logits, logits.view(np.int32)),
        (walks.rows, walks.starts, walks.tokens, walks.parents, walks.positions),
        (state.records, state.stop_ids, state.bias_tokens, state.bias_values, state.counts, state.in_prompt),
        np.empty(0, np.int32) if best is None else best,
        (path.tokens, path.num_accepted, path.nodes),
    )
    return path


@jit()
def _walk_all(logits, walks, state, best, out):  # type: ignore[no-untyped-def]
    logits, bits = logits
    rows, starts, tokens, parents, positions = walks
    records, stop_ids, bias_tokens, bias_values, counts, in_prompt = state
    out_tokens, out_accepted, out_nodes = out
    z = np.empty(logits.shape[1], np.float64)
    for tree in range(rows.shape[0]):
        row = rows[tree]
        record = records[row]
        start, stop = starts[tree], starts[tree + 1]
        node, won = start, 0
        while True:
            if record.is_plain_greedy:
                token = best[node] if node < best.shape[0] else argmax_finite(bits[node])
            else:
                lists = (stop_ids[row], bias_tokens[row], bias_values[row])
                token = choose_host(
                    logits[node], bits[node], positions[node], record, lists, (counts[row], in_prompt[row]), z
                )
            if token < 0:
                won = 0
                break
            out_tokens[tree, won] = token
            won += 1
            if record.has_penalties:
                counts[row, token] += 1
            child = -1
            for candidate in range(node + 1, stop):
                if parents[candidate] == node - start and tokens[candidate] == token:
                    child = candidate
                    break
            if child < 0:
                break
            out_nodes[tree, won - 1] = child - start
            node = child
        out_accepted[tree] = won - 1


def accept_device(logits: torch.Tensor, walks: Walks, state: SamplingRows, choose: Chooser = choose) -> Path:
    """Walk all trees level by level, over logits [K, V] on any device."""
    path = Path.make(walks)
    walk_levels(logits, walks, state, (choose, path, list(range(walks.rows.shape[0]))))
    return path


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
