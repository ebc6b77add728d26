"""Reading news: committed tokens and the target's own candidates go into the layers, a whole batch in one call."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from drafters.compiled import Index, compiled
from drafters.ngram.backoff import Float64, Int64, Pool, Scratch
from drafters.ngram.cache import MAX_ORDER, STAMP, Float32, claim_slot, extend_key, observe
from drafters.ngram.search import Int32, Rows

Trees = tuple[int, Int64, Int32, Int32, Int32, Float32]
"""Index of the first row's tree (-1: none came along), then tokens and parents of the packed nodes, row_starts,
candidates [N, K], logits [N, K]."""
Lesson = tuple[Float64, Pool, Pool, int]
"""Learning numbers [2, 6], request layers, tenant layers, time stamp."""
Notes = tuple[Int64, Float32]
"""Working memory: one token [K], its weight [K]."""

REQUEST, TENANT = 0, 1
DECAY, COMMITTED, VERIFIED, COMMITTED_ORDERS, VERIFIED_ORDERS, SHARPNESS = 0, 1, 2, 3, 4, 5
"""Columns of the learning numbers, one line per kind of layer: decay of a slot at an observation, strength of a
committed token, strength of a verified node, the orders learned from each as bits, and the power to which the
target's probabilities are raised."""

MAX_CANDIDATES = 64
"""More of the target's tokens at one node are not looked at."""


def make_notes() -> Notes:
    """Working memory of one reader."""
    return np.zeros(MAX_CANDIDATES, np.int64), np.zeros(MAX_CANDIDATES, np.float32)


@compiled
def _observe_orders(
    kind: Index,
    base: Index,
    contexts: Int64,
    node: Index,
    count: Index,
    is_committed: bool,
    lesson: Lesson,
    notes: Notes,
) -> None:
    """Tell one layer what followed the context of `node`: the first `count` tokens in the notes."""
    learning, stamp = lesson[0], lesson[3]
    pool = lesson[1] if kind == REQUEST else lesson[2]
    strength = learning[kind, COMMITTED if is_committed else VERIFIED]
    orders = np.int64(learning[kind, COMMITTED_ORDERS if is_committed else VERIFIED_ORDERS])
    if base < 0 or strength <= 0.0:
        return
    tokens, weights = notes[0][:count], notes[1][:count]
    key = np.uint64(0)
    for order in range(MAX_ORDER):
        if contexts[node, order] < 0 or (orders >> order) == 0:
            return
        key = extend_key(key, contexts[node, order])
        if (orders >> order) & 1:
            slot = claim_slot(pool[0], base, pool[2], key)
            pool[0][slot, STAMP] = stamp
            observe(pool[0], pool[1], slot, tokens, weights, strength, learning[kind, DECAY])


@compiled
def _base(kind: Index, row: Index, rows: Rows, lesson: Lesson) -> Index:
    """First row of the request's or the tenant's layer, -1 if there is none."""
    pool = lesson[1] if kind == REQUEST else lesson[2]
    layer = row if kind == REQUEST else rows[4][row]
    return layer * pool[2] if pool[3] and layer >= 0 else -1


@compiled
def _take_candidates(node: Index, candidates: Int32, logits: Float32, sharpness: float, notes: Notes) -> Index:
    """Note the target's tokens at a packed node with their softmax. Returns how many, 0 if a logit is not finite."""
    tokens, weights = notes
    count = min(logits.shape[1], MAX_CANDIDATES)
    highest = -np.inf
    for index in range(count):
        if not math.isfinite(logits[node, index]):
            return 0
        highest = max(highest, np.float64(logits[node, index]))
    total = 0.0
    for index in range(count):
        weight = math.exp((logits[node, index] - highest) * sharpness)
        weights[index] = weight
        total += weight
        tokens[index] = candidates[node, index]
    for index in range(count):
        weights[index] /= np.float32(total)
    return count


@compiled
def _learn_tree(
    row: Index, index: Index, rows: Rows, lesson: Lesson, trees: Trees, contexts: Int64, notes: Notes
) -> None:
    """All nodes of one verified tree: what the target would have said after each of them."""
    first, tokens, parents, row_starts, candidates, logits = trees
    start, stop = row_starts[first + index], row_starts[first + index + 1]
    request, tenant = _base(REQUEST, row, rows, lesson), _base(TENANT, row, rows, lesson)
    for node in range(stop - start):
        parent = parents[start + node]
        contexts[node, 0] = tokens[start + node]
        for order in range(1, MAX_ORDER):
            contexts[node, order] = contexts[parent, order - 1] if parent >= 0 else rows[0][row, order]
        count = _take_candidates(start + node, candidates, logits, lesson[0][TENANT, SHARPNESS], notes)
        if count > 0:
            _observe_orders(REQUEST, request, contexts, node, count, False, lesson, notes)
            _observe_orders(TENANT, tenant, contexts, node, count, False, lesson, notes)


@compiled
def commit(row: Index, tokens: Int64, rows: Rows, lesson: Lesson, notes: Notes, is_shared: bool) -> None:
    """Tokens that became true in `row`, in order; `is_shared` says whether the tenant's layer learns them too."""
    tails, lengths = rows[0], rows[1]
    request, tenant = _base(REQUEST, row, rows, lesson), _base(TENANT, row, rows, lesson)
    notes[1][0] = 1.0
    for index in range(tokens.size):
        notes[0][0] = tokens[index]
        _observe_orders(REQUEST, request, tails, row, 1, True, lesson, notes)
        if is_shared:
            _observe_orders(TENANT, tenant, tails, row, 1, True, lesson, notes)
        for order in range(MAX_ORDER - 1, 0, -1):
            tails[row, order] = tails[row, order - 1]
        tails[row, 0] = tokens[index]
        lengths[row] += 1


@compiled
def learn(
    batch: Int32, starts: Int32, tokens: Int64, rows: Rows, lesson: Lesson, trees: Trees, memory: tuple[Scratch, Notes]
) -> None:
    """News of a whole step: row batch[r] won tokens[starts[r] : starts[r + 1]] after its tree was verified."""
    contexts: NDArray[np.int64] = memory[0][3]
    for index in range(batch.size):
        row = np.int64(batch[index])
        if trees[0] >= 0:
            _learn_tree(row, index, rows, lesson, trees, contexts, memory[1])
        commit(row, tokens[starts[index] : starts[index + 1]], rows, lesson, memory[1], True)
