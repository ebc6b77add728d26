"""What comes next after a context: corpus, tenant and request counts interpolated, longest context first.

At each order the weighted observations are added up to C and take the share C / (C + smoothing) of the probability
that is still to be given; the rest backs off to the context that is one token shorter (interpolation in the manner of
Witten and Bell, 1991, with a fixed smoothing per order).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from drafters.base import Int64, Uint32, Uint64
from drafters.candidates import ROOM, place_of
from drafters.compiled import Index, compiled
from drafters.ngram.cache import MAX_ORDER, SUCCESSORS, Caches, extend_key, find_slot
from drafters.ngram.table import COUNTS, PROBABILITY_BITS, PROBABILITY_UNITS, context_key, find_row, long_context_key

# By order: the first number is for a context of one token. Measured with tests/bench/trigram_ablation.py.
SMOOTHING = (0.35, 4.0, 2.0, 2.0)
REQUEST_WEIGHTS = (0.5, 1.0, 1.0, 1.0)
"""A single token of the same request predicts little: half weight."""
CORPUS_WEIGHTS = (2.0, 4.0, 6.0, 0.0)
"""Observations that a context of the corpus is worth at most; the table has no contexts of four tokens."""
HALF_COUNT = 4.0
"""Occurrences in the corpus at which a context is worth half of that."""
STOP_MASS = 0.02
"""Back-off ends when less probability than this is left to give: what is behind it could hardly get into a tree."""


class Ngram(NamedTuple):
    """All that the estimate reads."""

    tri_slots: Uint64
    bi_rows: Uint64
    uni: Uint32
    entries: Uint32
    request: Caches
    tenant: Caches


@compiled
def _give(node: Index, token: Index, share: float, count: float, found: Any, marks: Int64) -> None:
    """Add `share` to `token` among the node's candidates; `count` observations of it were seen."""
    place = place_of(node, token, np.int64(ROOM), found, marks)
    if place >= 0:
        found.estimates[node, place] += share
        found.seen[node, place] += count


@compiled
def _give_slot(node: Index, slot: Any, weight: float, given: float, found: Any, marks: Int64) -> None:
    """Candidates of one slot of a cache whose observations count `weight`."""
    for place in range(SUCCESSORS):
        count = weight * np.float64(slot.weights[place])
        if count > 0.0:
            _give(node, np.int64(slot.tokens[place]), given * count, count, found, marks)


@compiled
def _give_entries(
    node: Index, entries: Uint32, span: tuple[Index, Index], worth: tuple[float, float], floor: float, found: Any,
    marks: Int64,
) -> None:  # fmt: skip
    """Candidates of a row of the corpus, best first, down to shares of `floor`. `worth`: observations, share of one."""
    count, given = worth
    for index in range(span[0], min(span[1], entries.size)):
        part = count * np.float64(entries[index] & np.uint32(PROBABILITY_UNITS)) / PROBABILITY_UNITS
        if given * part < floor:
            break
        _give(node, np.int64(entries[index] >> np.uint32(PROBABILITY_BITS)), given * part, part, found, marks)


@compiled
def _corpus_row(order: Index, context: Int64, ngram: Ngram) -> Index:
    """The packed row that the corpus has for the context of order + 1 tokens, or 0."""
    if order == 2:
        return find_row(ngram.tri_slots, long_context_key(context[2], context[1], context[0]))
    if order == 1:
        return find_row(ngram.tri_slots, context_key(context[1], context[0]))
    if order == 0 and context[0] < ngram.bi_rows.size:
        return ngram.bi_rows[context[0]]
    return np.uint64(0)


@compiled
def _drop_small(node: Index, least: float, found: Any, marks: Int64) -> None:
    """Leave out candidates below `least`: they would take the place of what other sources name."""
    index = 0
    while index < found.sizes[node]:
        if found.estimates[node, index] >= least:
            index += 1
            continue
        last = found.sizes[node] - 1
        marks[found.tokens[node, index]] = -1
        if index < last:
            found.tokens[node, index] = found.tokens[node, last]
            found.estimates[node, index] = found.estimates[node, last]
            found.seen[node, index] = found.seen[node, last]
            marks[found.tokens[node, index]] = index
        found.sizes[node] = last


@compiled
def expand(
    node: Index, caches: tuple[Index, Index], floor: float, ngram: Ngram, found: Any, marks: Int64
) -> None:  # fmt: skip
    """Name the candidates of a node, whose context (last token first, -1 before the text) is in `found`.

    Args: `caches`, those of the request and its tenant (-1 for none); `floor`, the probability below which a candidate
    is of no use here. Fills the node's tokens and estimates, which add up to at most 1.
    """
    context = found.contexts[node]
    known, key = 0, np.uint64(0)
    while known < MAX_ORDER and context[known] >= 0:
        key = extend_key(key, context[known])
        found.keys[known] = key
        known += 1
    mass, stop = 1.0, max(floor, STOP_MASS)
    for order in range(known - 1, -1, -1):
        mine = find_slot(ngram.request[caches[0]], found.keys[order])
        ours = find_slot(ngram.tenant[caches[1]], found.keys[order]) if caches[1] >= 0 else -1
        row = _corpus_row(order, context, ngram)
        total = 0.0
        if mine >= 0:
            total += REQUEST_WEIGHTS[order] * ngram.request[caches[0], mine].total
        if ours >= 0:
            total += ngram.tenant[caches[1], ours].total
        count = np.float64(COUNTS[np.int64(row & np.uint64(255))])
        worth = CORPUS_WEIGHTS[order] * count / (count + HALF_COUNT)
        total += worth
        if total <= 0.0:
            continue
        given = mass / (total + SMOOTHING[order])
        if mine >= 0:
            _give_slot(node, ngram.request[caches[0], mine], REQUEST_WEIGHTS[order], given, found, marks)
        if ours >= 0:
            _give_slot(node, ngram.tenant[caches[1], ours], 1.0, given, found, marks)
        if worth > 0.0:
            first = np.int64(row >> np.uint64(16))
            span = (first, first + np.int64(row >> np.uint64(8) & np.uint64(255)))
            _give_entries(node, ngram.entries, span, (worth, given), 0.25 * floor, found, marks)
        mass -= given * total
        if mass < stop:
            break
    if mass >= stop:  # the most frequent tokens share what no context has claimed
        span = (np.int64(0), np.int64(ngram.uni.size))
        _give_entries(node, ngram.uni, span, (1.0, mass), 0.25 * floor, found, marks)
    _drop_small(node, 0.25 * floor, found, marks)
