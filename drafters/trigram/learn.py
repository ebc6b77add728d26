"""Reading news: committed tokens and the target's own candidates go into the layers, a whole batch in one call."""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

from drafters.trigram.layers import MAX_ORDER, claim_slot, extend_key, observe
from drafters.trigram.search import Pool, Rows

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

Trees = tuple[Int64, Int32, Int32, Int32, Float32]
"""tokens and parents of the packed nodes, row_starts, candidates [N, K], logits [N, K]."""

REQUEST, TENANT = 0, 1
DECAY, COMMITTED, VERIFIED, COMMITTED_ORDERS, VERIFIED_ORDERS, SHARPNESS = 0, 1, 2, 3, 4, 5
"""Columns of the learning numbers, one line per kind of layer: decay of a slot at an observation, strength of a
committed token, strength of a verified node, and the orders learned from each as bits."""


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _observe_orders(
    pool: Pool, layer: np.int64, context: Int64, tokens: Int64, weights: Float32,
    strength: float, decay: float, orders: np.int64, tick: np.uint32,
) -> None:  # fmt: skip
    words, floats, slots, _ = pool
    key = np.uint64(0)
    for order in range(MAX_ORDER):
        if context[order] < 0 or (orders >> order) == 0:
            return
        key = extend_key(key, context[order])
        if (orders >> order) & 1:
            slot = claim_slot(words, layer * slots, slots, key)
            words[slot, 3] = tick
            observe(words, floats, slot, tokens, weights, strength, decay)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _softmax(logits: Float32, sharpness: float, weights: Float32) -> bool:
    """Fill `weights` [K]; False when a logit is not finite."""
    highest = logits[0]
    for index in range(logits.size):
        if not math.isfinite(logits[index]):
            return False
        highest = max(highest, logits[index])
    total = np.float32(0.0)
    for index in range(logits.size):
        weights[index] = math.exp((logits[index] - highest) * sharpness)
        total += weights[index]
    for index in range(logits.size):
        weights[index] /= total
    return True


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _learn_tree(
    row: np.int64,
    tree: np.int64,
    rows: Rows,
    request: Pool,
    tenant: Pool,
    learning: Float64,
    trees: Trees,
    tick: np.uint32,
) -> None:
    """All nodes of one verified tree: what the target would have said after each of them."""
    tokens, parents, row_starts, candidates, logits = trees
    tails, tenants = rows[0], rows[4]
    start, stop = row_starts[tree], row_starts[tree + 1]
    contexts = np.empty((stop - start, MAX_ORDER), np.int64)
    weights = np.empty(logits.shape[1], np.float32)
    choices = np.empty(logits.shape[1], np.int64)
    for node in range(stop - start):
        parent = parents[start + node]
        contexts[node, 0] = tokens[start + node]
        for order in range(1, MAX_ORDER):
            contexts[node, order] = contexts[parent, order - 1] if parent >= 0 else tails[row, order]
        if not _softmax(logits[start + node], learning[TENANT, SHARPNESS], weights):
            continue
        for index in range(choices.size):
            choices[index] = candidates[start + node, index]
        for kind in range(2):
            layer = row if kind == REQUEST else tenants[row]
            pool = request if kind == REQUEST else tenant
            if pool[3] and layer >= 0 and learning[kind, VERIFIED] > 0.0:
                _observe_orders(
                    pool, layer, contexts[node], choices, weights, learning[kind, VERIFIED],
                    learning[kind, DECAY], np.int64(learning[kind, VERIFIED_ORDERS]), tick,
                )  # fmt: skip


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def commit(
    row: np.int64,
    tokens: Int64,
    rows: Rows,
    request: Pool,
    tenant: Pool,
    learning: Float64,
    tick: np.uint32,
    shared: bool,
) -> None:
    """Tokens that became true in `row`, in order; `shared` says whether the tenant's layer learns them too."""
    tails, lengths, _, _, tenants = rows
    one = np.empty(1, np.int64)
    sure = np.ones(1, np.float32)
    for index in range(tokens.size):
        one[0] = tokens[index]
        for kind in range(2):
            layer = row if kind == REQUEST else tenants[row]
            pool = request if kind == REQUEST else tenant
            wanted = pool[3] and layer >= 0 and (kind == REQUEST or shared)
            if wanted and learning[kind, COMMITTED] > 0.0 and lengths[row] > 0:
                _observe_orders(
                    pool, layer, tails[row], one, sure, learning[kind, COMMITTED],
                    learning[kind, DECAY], np.int64(learning[kind, COMMITTED_ORDERS]), tick,
                )  # fmt: skip
        for order in range(MAX_ORDER - 1, 0, -1):
            tails[row, order] = tails[row, order - 1]
        tails[row, 0] = one[0]
        lengths[row] += 1


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def learn(
    batch: Int32, starts: Int32, tokens: Int64, rows: Rows, request: Pool, tenant: Pool, learning: Float64,
    first: int, trees: Trees, tick: np.uint32,
) -> None:  # fmt: skip
    """News of a whole step; tree first + r belongs to batch[r], `first` -1 says that no trees came along."""
    for index in range(batch.size):
        row = np.int64(batch[index])
        if first >= 0:
            _learn_tree(row, first + index, rows, request, tenant, learning, trees, tick)
        commit(row, tokens[starts[index] : starts[index + 1]], rows, request, tenant, learning, tick, True)
