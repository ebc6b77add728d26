"""The draft makers: from the blended next-token estimate to a tree, a whole batch in one compiled call.

`best-first` adds the most probable node that the tree can still grow, which is exact for cumulative probability.
`explore` is ADED's tree search with its exploration bonus (arXiv 2407.12021).
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from drafters.base import Source
from drafters.trigram.blend import WIDTH, expand
from drafters.trigram.layers import MAX_ORDER
from drafters.trigram.table import Corpus
from verifier.noise import gumbel
from verifier.plan import MAX_TREE_NODES

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Uint64 = NDArray[np.uint64]
Uint32 = NDArray[np.uint32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

Rows = tuple[Int64, Int64, Uint64, Float64, Int64]
"""By row: tails [rows, MAX_ORDER] (last token first), lengths, seeds, temperatures, tenant layer (-1: none)."""
Pool = tuple[Uint32, Float32, int, int]
"""words, floats, slots of one layer, 1 if it is in use."""
Packed = tuple[Int64, Int32, Int32, Int64, Float32, NDArray[np.int8], Int32]
"""tokens, parents, depths, ancestors, scores, sources, row_starts of DraftTrees."""
Scratch = tuple[Int64, Float64, Int64, Int64, Int64, Int64]
"""candidate tokens [T, WIDTH], their probabilities, how many [T], contexts [T, MAX_ORDER], marks [V], stamp [1]."""

_SOURCE = int(Source.TRIGRAM)
_EULER = 0.5772156649015329
_NEVER = -1.0


def make_scratch(vocab_size: int) -> Scratch:
    """Working memory of one search, allocated once."""
    return (
        np.zeros((MAX_TREE_NODES, WIDTH), np.int64),
        np.zeros((MAX_TREE_NODES, WIDTH), np.float64),
        np.zeros(MAX_TREE_NODES, np.int64),
        np.zeros((MAX_TREE_NODES, MAX_ORDER), np.int64),
        np.zeros(vocab_size, np.int64),
        np.ones(1, np.int64),
    )


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def couple(
    tokens: Int64,
    shares: Float64,
    size: int,
    seed: Any,
    position: int,
    temperature: float,
    trust: float,
) -> None:
    """Turn probabilities into the chance that each candidate wins the shared-noise draw, in place.

    A candidate's standing is log q / T + g, the target's own rule with q for the target's distribution. The chance is
    a softmax over standings, sharpened by `trust` (an exact q would deserve an infinite one), against the candidates
    that are not listed, whose best standing is Gumbel around the logarithm of their mass.
    """
    listed = 0.0
    for index in range(size):
        listed += shares[index]
    rest = max(1.0 - listed, 1e-3)
    # The unlisted mass is taken as 16 equal tokens, which temperature reshapes as it does the listed ones.
    rival = math.log(rest / 16.0) / temperature + math.log(16.0) + _EULER
    highest = rival
    for index in range(size):
        standing = math.log(max(shares[index], 1e-9)) / temperature + gumbel(seed, position, tokens[index])
        shares[index] = standing
        highest = max(highest, standing)
    norm = math.exp(trust * (rival - highest))
    for index in range(size):
        shares[index] = math.exp(trust * (shares[index] - highest))
        norm += shares[index]
    for index in range(size):
        shares[index] /= norm


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def sharpen(shares: Float64, size: int, power: float) -> None:
    """Raise probabilities to `power` and normalise, in place; what is not listed counts as 16 equal tokens."""
    rest = 1.0
    for index in range(size):
        rest -= shares[index]
    total = 16.0 * max(rest / 16.0, 1e-9) ** power
    for index in range(size):
        shares[index] = shares[index] ** power
        total += shares[index]
    for index in range(size):
        shares[index] /= total


@numba.njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def best_candidate(shares: Float64, size: int) -> Any:
    """Index of the most probable of `size` candidates, -1 when none is left."""
    best = np.int64(-1)
    share = 0.0
    for index in range(size):
        if shares[index] > share:
            best, share = np.int64(index), shares[index]
    return best


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def open_node(
    node: int, position: int, row: int, rows: Rows, corpus: Corpus, request: Pool, tenant: Pool,
    blend: Float64, limits: Float64, scratch: Scratch,
) -> None:  # fmt: skip
    """Find the candidates of a node whose context is in the scratch; their tokens would stand at `position`."""
    tokens, shares, sizes, contexts, marks, stamp = scratch
    _, _, seeds, temperatures, tenants = rows
    mine = (request[0], request[1], row * request[2] if request[3] else np.int64(-1), request[2])
    layer = tenants[row]
    ours = (tenant[0], tenant[1], layer * tenant[2] if layer >= 0 else np.int64(-1), tenant[2])
    size = expand(contexts[node], corpus, mine, ours, blend, tokens[node], shares[node], marks, stamp[0])
    stamp[0] += WIDTH
    sizes[node] = size
    if temperatures[row] > 0.0:
        couple(tokens[node], shares[node], size, seeds[row], position, temperatures[row], limits[2])
    elif limits[3] != 1.0:
        sharpen(shares[node], size, limits[3])


@numba.njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def set_root(start: int, row: int, rows: Rows, out: Packed, contexts: Int64) -> None:
    """Write the root at packed index `start`, and its context."""
    tokens, parents, depths, ancestors, scores, sources, _ = out
    tails = rows[0]
    for order in range(MAX_ORDER):
        contexts[0, order] = tails[row, order]
    tokens[start] = tails[row, 0]
    parents[start] = -1
    depths[start] = 0
    ancestors[start] = 1
    scores[start] = 1.0
    sources[start] = 0


@numba.njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def add_node(start: int, node: int, parent: int, token: int, score: float, out: Packed, contexts: Int64) -> None:
    """Write node `node` of the tree at `start`, and its context."""
    tokens, parents, depths, ancestors, scores, sources, _ = out
    at, above = start + node, start + parent
    tokens[at] = token
    parents[at] = parent
    depths[at] = depths[above] + 1
    ancestors[at] = ancestors[above] | (np.int64(1) << np.int64(node))
    scores[at] = score
    sources[at] = _SOURCE
    contexts[node, 0] = token
    for order in range(1, MAX_ORDER):
        contexts[node, order] = contexts[parent, order - 1]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _grow_best_first(
    row: int, max_nodes: int, start: int, rows: Rows, corpus: Corpus, request: Pool, tenant: Pool,
    blend: Float64, limits: Float64, out: Packed, scratch: Scratch,
) -> Any:  # fmt: skip
    """One tree at packed index `start`. Returns its size.

    Every node keeps its best candidate that is not in the tree yet; the best of these over at most 64 nodes is found
    by looking at all of them, which beats a heap at this size.
    """
    max_depth, min_score = limits[0], limits[1]
    tokens, shares, sizes, contexts, _, _ = scratch
    offers = np.empty(max_nodes, np.float64)  # score of the node's best remaining candidate
    choices = np.empty(max_nodes, np.int64)
    set_root(start, row, rows, out, contexts)
    size = np.int64(1)
    newest = np.int64(0)
    while size < max_nodes:
        if out[2][start + newest] < max_depth:
            position = rows[1][row] + out[2][start + newest]
            open_node(newest, position, row, rows, corpus, request, tenant, blend, limits, scratch)
        else:
            sizes[newest] = 0
        choice = best_candidate(shares[newest], sizes[newest])
        choices[newest] = choice
        offers[newest] = out[4][start + newest] * shares[newest, choice] if choice >= 0 else _NEVER
        parent = np.int64(0)
        for node in range(1, size):
            if offers[node] > offers[parent]:
                parent = np.int64(node)
        score = offers[parent]
        if score < min_score:
            break
        choice = choices[parent]
        add_node(start, size, parent, tokens[parent, choice], score, out, contexts)
        shares[parent, choice] = 0.0
        choice = best_candidate(shares[parent], sizes[parent])
        choices[parent] = choice
        offers[parent] = out[4][start + parent] * shares[parent, choice] if choice >= 0 else _NEVER
        newest = size
        size += 1
    return size


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def best_first(
    batch: Int32, max_nodes: Int32, first: int, rows: Rows, corpus: Corpus, request: Pool, tenant: Pool,
    blend: Float64, limits: Float64, out: Packed, scratch: Scratch,
) -> None:  # fmt: skip
    """One tree per row of `batch` [R], written as trees first, first + 1, ... of `out`.

    `limits`: deepest node, lowest score of a node, trust in the estimate when coupled to the noise, sharpness when not.
    """
    row_starts = out[6]
    for index in range(batch.size):
        start = np.int64(row_starts[first + index])
        limit = np.int64(min(max_nodes[index], MAX_TREE_NODES))
        size = _grow_best_first(
            np.int64(batch[index]), limit, start, rows, corpus, request, tenant, blend, limits, out, scratch
        )
        row_starts[first + index + 1] = start + size
