"""ADED's draft maker: a tree search with an exploration bonus (arXiv 2407.12021), its reward mended.

Each iteration walks from the root to a leaf by

    Q(c) / N(c) + (c1 + ln((N(s) + c2 + 1) / c2)) * P(c | s) * sqrt(N(s)) / (1 + N(c)),   unvisited first,

opens the leaf, finishes the path by sampling, and credits every node on the way with 1 + the sum of P along the path.
The published code looks up the probability of a token of the context in place of the token appended, so its reward is
nearly constant; here it is the probability of the token appended. The tree is made of the most visited prefixes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.compiled import Index, compiled
from drafters.ngram.backoff import Float64, Int64, Model, Scratch
from drafters.ngram.cache import MAX_ORDER
from drafters.ngram.search import (
    CUT,
    MIN_SCORE,
    Int32,
    Packed,
    Rows,
    add_node,
    best_candidate,
    open_node,
    set_root,
)
from drafters.ngram.table import mix
from verifier.plan import MAX_TREE_NODES

C1, C2, ITERATIONS, DEPTH, BRANCH = CUT + 1, CUT + 2, CUT + 3, CUT + 4, CUT + 5
"""Columns of the limits behind those of best-first."""

_TOKEN, _PARENT, _FIRST, _COUNT, _LEVEL, _VISITS, _PLACE = 0, 1, 2, 3, 4, 5, 6
_PRIOR, _SCORE, _SUM = 0, 1, 2

Knowledge = tuple[Rows, Model, Scratch]
"""What opening a node needs."""


@compiled
def _load_context(node: Index, row: Index, whole: Int64, rows: Rows, context: Int64) -> None:
    """The context of a pool node, last token first: its path, then the row's tail."""
    order = 0
    while order < MAX_ORDER and whole[node, _PARENT] >= 0:
        context[order] = whole[node, _TOKEN]
        node = whole[node, _PARENT]
        order += 1
    for back in range(MAX_ORDER - order):
        context[order + back] = rows[0][row, back]


@compiled
def _open_leaf(node: Index, size: Any, row: Index, whole: Int64, parts: Float64, know: Knowledge) -> Index:
    """Append the best successors of `node` to the pool, most probable first. Returns the pool's new size."""
    rows, model, scratch = know
    limits = model[4]
    tokens, shares, sizes, contexts = scratch[0], scratch[1], scratch[2], scratch[3]
    _load_context(node, row, whole, rows, contexts[0])
    position = rows[1][row] + whole[node, _LEVEL]
    open_node(0, row, position, limits[MIN_SCORE], rows, model, scratch)
    whole[node, _FIRST] = size
    for _ in range(np.int64(limits[BRANCH])):
        choice = best_candidate(shares[0], sizes[0])
        if choice < 0 or size >= whole.shape[0]:
            break
        whole[size, _TOKEN] = tokens[0, choice]
        whole[size, _PARENT] = node
        whole[size, _FIRST] = -1
        whole[size, _COUNT] = 0
        whole[size, _LEVEL] = whole[node, _LEVEL] + 1
        whole[size, _VISITS] = 0
        parts[size, _PRIOR] = shares[0, choice]
        parts[size, _SCORE] = parts[node, _SCORE] * shares[0, choice]
        parts[size, _SUM] = 0.0
        shares[0, choice] = 0.0
        whole[node, _COUNT] += 1
        size += 1
    return size


@compiled
def _pick(node: Index, whole: Int64, parts: Float64, c1: float, c2: float) -> Index:
    """The child that the bonus favours."""
    first = whole[node, _FIRST]
    seen = np.float64(whole[node, _VISITS])
    bonus = (c1 + math.log((seen + c2 + 1.0) / c2)) * math.sqrt(seen)
    best = first
    highest = -1.0
    for child in range(first, first + whole[node, _COUNT]):
        visits = whole[child, _VISITS]
        if visits == 0:
            return child
        value = parts[child, _SUM] / visits + bonus * parts[child, _PRIOR] / (1.0 + visits)
        if value > highest:
            best, highest = child, value
    return best


@compiled
def _finish_path(node: Index, row: Index, whole: Int64, random: Any, know: Knowledge) -> float:
    """Sample on from `node` to full depth. Returns the sum of the probabilities of the tokens appended."""
    rows, model, scratch = know
    limits = model[4]
    tokens, shares, sizes, contexts = scratch[0], scratch[1], scratch[2], scratch[3]
    _load_context(node, row, whole, rows, contexts[0])
    gained = 0.0
    for level in range(whole[node, _LEVEL], np.int64(limits[DEPTH])):
        open_node(0, row, rows[1][row] + level, limits[MIN_SCORE], rows, model, scratch)
        total = 0.0
        for index in range(sizes[0]):
            total += shares[0, index]
        if total <= 0.0:
            break
        random = mix(random + np.uint64(0x9E3779B97F4A7C15))
        rest = np.float64(random >> np.uint64(11)) * 2.0**-53 * total
        choice = 0
        while choice < sizes[0] - 1 and rest >= shares[0, choice]:
            rest -= shares[0, choice]
            choice += 1
        gained += shares[0, choice]
        if model[5][row, tokens[0, choice]]:
            break
        for order in range(MAX_ORDER - 1, 0, -1):
            contexts[0, order] = contexts[0, order - 1]
        contexts[0, 0] = tokens[0, choice]
    return gained


@compiled
def _search(row: Index, whole: Int64, parts: Float64, know: Knowledge) -> Index:
    """Run all iterations of one row. Returns the size of the pool."""
    rows, limits = know[0], know[1][4]
    for column in range(whole.shape[1]):
        whole[0, column] = 0
    whole[0, _PARENT] = whole[0, _FIRST] = -1
    parts[0, _PRIOR] = parts[0, _SCORE] = 1.0
    parts[0, _SUM] = 0.0
    size: Index = np.int64(1)
    random = mix(rows[2][row] + np.uint64(rows[1][row]))
    for _ in range(np.int64(limits[ITERATIONS])):
        node = np.int64(0)
        reward = 1.0
        while whole[node, _COUNT] > 0:
            node = _pick(node, whole, parts, limits[C1], limits[C2])
            reward += parts[node, _PRIOR]
        is_last = node > 0 and know[1][5][row, whole[node, _TOKEN]]
        if whole[node, _LEVEL] < limits[DEPTH] and not is_last:
            # A node is opened on its second visit (the root on its first), so that most leaves cost one path only.
            if whole[node, _FIRST] < 0 and (whole[node, _VISITS] > 0 or node == 0):
                size = _open_leaf(node, size, row, whole, parts, know)
            random = mix(random + np.uint64(1))
            reward += _finish_path(node, row, whole, random, know)
        while node >= 0:
            whole[node, _VISITS] += 1
            parts[node, _SUM] += reward
            node = whole[node, _PARENT]
    return size


@compiled
def _is_better(node: Index, best: Index, whole: Int64, parts: Float64) -> bool:
    if whole[node, _VISITS] != whole[best, _VISITS]:
        return bool(whole[node, _VISITS] > whole[best, _VISITS])
    return bool(parts[node, _SCORE] > parts[best, _SCORE])


@compiled
def _keep_most_visited(
    size: Index, max_nodes: Index, start: Index, row: Index, whole: Int64, parts: Float64, know: Knowledge, out: Packed
) -> Index:
    """Write the tree: the most visited pool nodes whose parent is in. Returns its size."""
    rows, limits, contexts = know[0], know[1][4], know[2][3]
    set_root(start, row, rows, out, contexts)
    for node in range(size):
        whole[node, _PLACE] = -1
    whole[0, _PLACE] = 0
    kept: Index = np.int64(1)
    while kept < max_nodes:
        best = np.int64(-1)
        for node in range(1, size):
            grows = whole[node, _PLACE] < 0 and whole[whole[node, _PARENT], _PLACE] >= 0
            fits = grows and parts[node, _SCORE] >= limits[MIN_SCORE]
            if fits and (best < 0 or _is_better(node, best, whole, parts)):
                best = np.int64(node)
        if best < 0:
            break
        add_node(
            start, kept, whole[whole[best, _PARENT], _PLACE], whole[best, _TOKEN], parts[best, _SCORE], out, contexts
        )
        whole[best, _PLACE] = kept
        kept += 1
    return kept


@compiled
def explore(
    batch: Int32, max_nodes: Int32, first: Index, rows: Rows, model: Model, out: Packed, scratch: Scratch
) -> None:
    """The other draft maker; arguments as those of `search.best_first`, its constants behind in the limits."""
    row_starts: NDArray[np.int32] = out[6]
    whole, parts = scratch[9], scratch[10]
    know = (rows, model, scratch)
    for index in range(batch.size):
        start = np.int64(row_starts[first + index])
        limit = np.int64(min(max_nodes[index], MAX_TREE_NODES))
        row: Index = np.int64(batch[index])
        kept: Any = 1
        if limit > 1:
            size = _search(row, whole, parts, know)
            kept = _keep_most_visited(size, limit, start, row, whole, parts, know, out)
        else:
            set_root(start, row, rows, out, scratch[3])
        row_starts[first + index + 1] = start + kept
