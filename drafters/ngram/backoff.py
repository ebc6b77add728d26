"""What comes next after a context: corpus, tenant and request layers interpolated, longest context first.

At each order the layers' weighted observations are added up to C and take the share C / (C + smoothing) of the
probability that is still to be given; the rest backs off to the context that is one token shorter (interpolation in
the manner of Witten and Bell, 1991, with a fixed smoothing per order).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.compiled import Index, compiled, inlined
from drafters.ngram.cache import MAX_ORDER, SUCCESSORS, TOKENS, TOTAL, WEIGHTS, extend_key, find_slot
from drafters.ngram.table import (
    PROBABILITY_BITS,
    PROBABILITY_UNITS,
    Corpus,
    context_key,
    find_row,
    long_context_key,
)
from verifier.plan import MAX_TREE_NODES

Int64 = NDArray[np.int64]
Uint64 = NDArray[np.uint64]
Uint32 = NDArray[np.uint32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

WIDTH = 32
"""Most candidates of one node."""
_SMOOTHING, _REQUEST, _TENANT, _CORPUS, _OTHER = 0, 1, 2, 3, 4
_HALF_COUNT, _STOP_MASS = 0, 1

Pool = tuple[Uint32, Float32, int, int]
"""Layers of one kind: words, floats, slots of one layer, 1 if they are in use."""
Model = tuple[Corpus, Pool, Pool, Float64, Float64, NDArray[np.bool_]]
"""What trees are made from: corpus, request layers, tenant layers, blend numbers, limits (see search.py), and
[rows, V] whether a token ends the row's answer."""
Scratch = tuple[Int64, Float64, Int64, Int64, Int64, Int64, Uint64, Float64, Int64, Int64, Float64]
"""Working memory: candidate tokens [T, WIDTH], their probabilities, how many [T], contexts [T, MAX_ORDER], marks [V]
(who is among the candidates), stamp [1] (marks below it are old), keys [MAX_ORDER], offers [T] and choices [T] of
best-first, whole numbers and parts [nodes, ...] of the explored nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendOptions:
    """How much each layer counts, by order (index 0 is a context of one token).

    The defaults were measured: tests/bench/trigram_ablation.py.
    """

    smoothing: tuple[float, ...] = (0.35, 4.0, 2.0, 2.0)
    request: tuple[float, ...] = (0.5, 1.0, 1.0, 1.0)
    tenant: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    corpus: tuple[float, float, float] = (2.0, 4.0, 6.0)
    """Observations that a context of the corpus is worth at most, for contexts of one to three tokens."""
    half_count: float = 4.0
    """Occurrences in the corpus at which a context is worth half of that."""
    stop_mass: float = 0.02
    """Back-off ends when less probability than this is left to give."""

    def array(self) -> Float64:
        """The numbers as the compiled code reads them: [5, MAX_ORDER] float64."""
        out = np.zeros((5, MAX_ORDER))
        for row, values in enumerate((self.smoothing, self.request, self.tenant)):
            assert len(values) == MAX_ORDER, f"{len(values)} weights for {MAX_ORDER} orders"
            out[row] = values
        out[_CORPUS, : len(self.corpus)] = self.corpus
        out[_OTHER, :2] = self.half_count, self.stop_mass
        return out


def make_scratch(vocab_size: int, explored: int) -> Scratch:
    """Working memory of one search that may look at `explored` nodes, allocated once."""
    return (
        np.zeros((MAX_TREE_NODES, WIDTH), np.int64),
        np.zeros((MAX_TREE_NODES, WIDTH), np.float64),
        np.zeros(MAX_TREE_NODES, np.int64),
        np.zeros((MAX_TREE_NODES, MAX_ORDER), np.int64),
        np.zeros(vocab_size, np.int64),
        np.ones(1, np.int64),
        np.zeros(MAX_ORDER, np.uint64),
        np.zeros(MAX_TREE_NODES, np.float64),
        np.zeros(MAX_TREE_NODES, np.int64),
        np.zeros((explored, 7), np.int64),
        np.zeros((explored, 3), np.float64),
    )


@inlined
def _give(node: Index, token: Index, share: float, size: Index, scratch: Scratch) -> Index:
    """Add `share` to `token` among the node's `size` candidates; returns the new size."""
    tokens, shares, marks, stamp = scratch[0], scratch[1], scratch[4], scratch[5]
    if token >= marks.size:
        return size
    mark = marks[token] - stamp[0]
    if mark >= 0:
        shares[node, mark] += share
    elif size < WIDTH:
        marks[token] = stamp[0] + size
        tokens[node, size] = token
        shares[node, size] = share
        size += 1
    return size


@compiled
def _give_slot(node: Index, slot: Index, factor: float, pool: Pool, size: Index, scratch: Scratch) -> Index:
    """Candidates of one slot of a layer."""
    words, floats, _, _ = pool
    for place in range(SUCCESSORS):
        weight = np.float64(floats[slot, WEIGHTS + place])
        if weight > 0.0:
            size = _give(node, np.int64(words[slot, TOKENS + place]), factor * weight, size, scratch)
    return size


@compiled
def _give_row(
    node: Index, row: Any, factor: float, floor: float, corpus: Corpus, size: Index, scratch: Scratch
) -> Index:
    """Candidates of one row of the corpus, best first, down to shares of `floor`."""
    entries = corpus[3]
    factor /= PROBABILITY_UNITS
    first: Index = np.int64(row >> np.uint64(16))
    last = min(first + np.int64(row >> np.uint64(8) & np.uint64(255)), entries.size)
    for index in range(first, last):
        share = factor * np.float64(entries[index] & np.uint32(PROBABILITY_UNITS))
        if share < floor:
            break
        size = _give(node, np.int64(entries[index] >> np.uint32(PROBABILITY_BITS)), share, size, scratch)
    return size


@inlined
def _corpus_row(order: Index, node: Index, corpus: Corpus, contexts: Int64) -> Index:
    """The packed row that the corpus has for the node's context of order + 1 tokens, or 0."""
    if order == 2:
        return find_row(corpus[0], long_context_key(contexts[node, 2], contexts[node, 1], contexts[node, 0]))
    if order == 1:
        return find_row(corpus[0], context_key(contexts[node, 1], contexts[node, 0]))
    if order == 0 and contexts[node, 0] < corpus[1].size:
        return corpus[1][contexts[node, 0]]
    return np.uint64(0)


@inlined
def _seek(base: Index, key: Any, weight: float, pool: Pool) -> Index:
    """Slot of `key` in the layer that starts at row `base`, or -1."""
    if base < 0 or weight <= 0.0:
        return -1
    return find_slot(pool[0], base, pool[2], key)


@compiled
def expand(node: Index, request_base: Index, tenant_base: Index, floor: float, model: Model, scratch: Scratch) -> Index:
    """Candidates of a node whose context (last token first, -1 before the start of the text) is in the scratch.

    Args: first rows of the request's and the tenant's layer in their pools (-1: none); `floor`, the probability below
    which a candidate is of no use here. Fills the node's tokens and probabilities, which add up to at most 1, and
    returns how many there are.
    """
    corpus, request, tenant, blend, _, _ = model
    contexts, stamp, keys = scratch[3], scratch[5], scratch[6]
    known = 0
    key = np.uint64(0)
    while known < MAX_ORDER and contexts[node, known] >= 0:
        key = extend_key(key, contexts[node, known])
        keys[known] = key
        known += 1
    size: Index = np.int64(0)
    mass = 1.0
    stop = max(floor, blend[_OTHER, _STOP_MASS])
    for order in range(known - 1, -1, -1):
        mine = _seek(request_base, keys[order], blend[_REQUEST, order], request)
        ours = _seek(tenant_base, keys[order], blend[_TENANT, order], tenant)
        row = _corpus_row(order, node, corpus, contexts)
        total = 0.0
        if mine >= 0:
            total += blend[_REQUEST, order] * request[1][mine, TOTAL]
        if ours >= 0:
            total += blend[_TENANT, order] * tenant[1][ours, TOTAL]
        count = np.float64(corpus[4][np.int64(row & np.uint64(255))])
        worth = blend[_CORPUS, order] * count / (count + blend[_OTHER, _HALF_COUNT])
        total += worth
        if total <= 0.0:
            continue
        given = mass / (total + blend[_SMOOTHING, order])
        if mine >= 0:
            size = _give_slot(node, mine, given * blend[_REQUEST, order], request, size, scratch)
        if ours >= 0:
            size = _give_slot(node, ours, given * blend[_TENANT, order], tenant, size, scratch)
        if worth > 0.0:
            size = _give_row(node, row, given * worth, 0.25 * floor, corpus, size, scratch)
        mass -= given * total
        if mass < stop:
            break
    if mass >= stop:
        size = _give_common(node, mass, 0.25 * floor, corpus[2], size, scratch)
    stamp[0] += WIDTH
    scratch[2][node] = size
    return size


@compiled
def _give_common(node: Index, mass: float, floor: float, uni: Uint32, size: Index, scratch: Scratch) -> Index:
    """The most frequent tokens share what no context has claimed."""
    for index in range(uni.size):
        share = mass * np.float64(uni[index] & np.uint32(PROBABILITY_UNITS)) / PROBABILITY_UNITS
        if share < floor:
            break
        size = _give(node, np.int64(uni[index] >> np.uint32(PROBABILITY_BITS)), share, size, scratch)
    return size
