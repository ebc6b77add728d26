"""Exact best-first search: from the blended next-token estimate to trees, a whole batch in one compiled call.

The tree always takes the node of highest cumulative probability that it can still grow, so no other tree of the same
size has a higher sum of scores, which is the drafter's estimate of the tokens it will win.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.base import Source
from drafters.compiled import Index, compiled, inlined
from drafters.ngram.backoff import Float64, Int64, Model, Scratch, Uint64, expand
from drafters.ngram.cache import MAX_ORDER
from verifier.noise import gumbel
from verifier.plan import MAX_TREE_NODES

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

Rows = tuple[Int64, Int64, Uint64, Float64, Int64]
"""By row: tails [rows, MAX_ORDER] (last token first), lengths, seeds, temperatures, tenant layer (-1: none)."""
Packed = tuple[Int64, Int32, Int32, Int64, Float32, NDArray[np.int8], Int32]
"""tokens, parents, depths, ancestors, scores, sources, row_starts of DraftTrees."""

MAX_DEPTH, MIN_SCORE, TRUST, IS_SHARPENED, CUT = 0, 1, 2, 3, 4
"""Columns of the limits: deepest node, lowest score of a node, how firmly a coupled ranking believes its estimate,
whether estimates are sharpened at temperature 0, and CUT: scores below CUT / max_nodes are not worth a look."""

_SOURCE = int(Source.TRIGRAM)
_EULER = 0.5772156649015329
_NEVER = -1.0


@compiled
def couple(tokens: Int64, shares: Float64, draw: tuple[Any, Index], temperature: Any, power: Any, reach: Any) -> None:
    """Turn probabilities into the chance that each candidate wins the shared-noise draw, in place.

    A candidate's standing is power * log q / T + reach * g. The target's own rule has 1 and 1, and its best standing
    wins for certain: an exact q would deserve infinite factors. Where q is a mean over texts that are not known yet,
    the noise says little of who wins, and `reach` is small beside `power`. The chance is a softmax over standings,
    against the candidates that are not listed, whose best standing is Gumbel around the logarithm of their mass.

    Args: `tokens`, `shares` [candidates]; `draw`, seed and position of the token to be drawn.
    """
    seed, position = draw
    listed = 0.0
    for index in range(tokens.size):
        listed += shares[index]
    # The unlisted mass is taken as 16 equal tokens, which temperature reshapes as it does the listed ones.
    rest = max(1.0 - listed, 1e-3)
    rival = power * math.log(rest / 16.0) / temperature + reach * (math.log(16.0) + _EULER)
    highest = rival
    for index in range(tokens.size):
        standing = power * math.log(max(shares[index], 1e-9)) / temperature
        standing += reach * gumbel(seed, position, tokens[index])
        shares[index] = standing
        highest = max(highest, standing)
    norm = math.exp(rival - highest)
    for index in range(tokens.size):
        shares[index] = math.exp(shares[index] - highest)
        norm += shares[index]
    for index in range(tokens.size):
        shares[index] /= norm


@compiled
def sharpen(shares: Float64) -> None:
    """Raise probabilities to the power 5/4 and normalise, in place: at temperature 0 only the favourite counts.

    The power was measured: it makes scores match acceptance, and trees better. Two square roots are cheap.
    """
    rest = 1.0
    for index in range(shares.size):
        rest -= shares[index]
    rest = max(rest, 1e-9)
    total = rest * math.sqrt(math.sqrt(rest / 16.0))  # what is not listed counts as 16 equal tokens
    for index in range(shares.size):
        shares[index] *= math.sqrt(math.sqrt(shares[index]))
        total += shares[index]
    for index in range(shares.size):
        shares[index] /= total


@inlined
def best_candidate(shares: Float64, size: Index) -> Index:
    """Index of the most probable of `size` candidates, -1 when none is left."""
    best = np.int64(-1)
    share = 0.0
    for index in range(size):
        if shares[index] > share:
            best, share = np.int64(index), shares[index]
    return best


@compiled
def open_node(
    node: Index, row: Index, position: Index, floor: float, rows: Rows, model: Model, scratch: Scratch
) -> None:
    """Find the candidates of a node whose context is in the scratch; their tokens would stand at `position`."""
    _, request, tenant, _, limits, _ = model
    temperature, layer = rows[3][row], rows[4][row]
    request_base = row * request[2] if request[3] else -1
    tenant_base = layer * tenant[2] if tenant[3] and layer >= 0 else -1
    size = expand(node, request_base, tenant_base, floor, model, scratch)
    if temperature > 0.0:
        draw, trust = (rows[2][row], position), limits[TRUST]
        couple(scratch[0][node, :size], scratch[1][node, :size], draw, temperature, trust, trust)
    elif limits[IS_SHARPENED] > 0.0:
        sharpen(scratch[1][node, :size])


@inlined
def set_root(start: Index, row: Index, rows: Rows, out: Packed, contexts: Int64) -> None:
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


@inlined
def add_node(start: Index, node: Index, parent: Index, token: Index, score: Any, out: Packed, contexts: Int64) -> None:
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


@inlined
def _offer(node: Index, score: float, offers: Float64, choices: Int64, scratch: Scratch) -> None:
    """Remember the best candidate of a node that is not in the tree yet."""
    choice = best_candidate(scratch[1][node], scratch[2][node])
    choices[node] = choice
    offers[node] = score * scratch[1][node, choice] if choice >= 0 else _NEVER


@compiled
def _grow(row: Index, max_nodes: Index, start: Index, rows: Rows, model: Model, out: Packed, scratch: Scratch) -> Index:
    """One tree at packed index `start`. Returns its size.

    Every node keeps its best candidate that is not in the tree yet; the best of these over at most 64 nodes is found
    by looking at all of them, which beats a heap at this size.
    """
    limits = model[4]
    depths, scores = out[2][start : start + max_nodes], out[4][start : start + max_nodes]
    tokens, shares, sizes, contexts = scratch[0], scratch[1], scratch[2], scratch[3]
    offers, choices = scratch[7], scratch[8]  # score of the node's best remaining candidate, and which it is
    floor = max(limits[MIN_SCORE], limits[CUT] / max_nodes)
    set_root(start, row, rows, out, contexts)
    size: Index = np.int64(1)
    while size < max_nodes:
        newest = size - 1
        is_last = newest > 0 and model[5][row, contexts[newest, 0]]  # nothing is won behind the end of an answer
        if depths[newest] < limits[MAX_DEPTH] and not is_last:
            position = rows[1][row] + depths[newest]
            open_node(newest, row, position, floor / scores[newest], rows, model, scratch)
        else:
            sizes[newest] = 0
        _offer(newest, np.float64(scores[newest]), offers, choices, scratch)
        parent: Index = np.int64(0)
        for node in range(1, size):
            if offers[node] > offers[parent]:
                parent = np.int64(node)
        score, choice = offers[parent], choices[parent]
        if score <= 0.0 or score < limits[MIN_SCORE]:
            break
        add_node(start, size, parent, tokens[parent, choice], score, out, contexts)
        shares[parent, choice] = 0.0
        _offer(parent, np.float64(scores[parent]), offers, choices, scratch)
        size += 1
    return size


@compiled
def best_first(
    batch: Int32, max_nodes: Int32, first: Index, rows: Rows, model: Model, out: Packed, scratch: Scratch
) -> None:
    """One tree per row of `batch` [R], written as trees first, first + 1, ... of `out`."""
    row_starts = out[6]
    for index in range(batch.size):
        start = np.int64(row_starts[first + index])
        limit = np.int64(min(max_nodes[index], MAX_TREE_NODES))
        size = _grow(np.int64(batch[index]), limit, start, rows, model, out, scratch)
        row_starts[first + index + 1] = start + size
