"""What comes next after a context: corpus, tenant and request layers interpolated, longest context first.

At each order the layers' weighted observations are added up to C and take the share C / (C + smoothing) of the
probability that is still to be given; the rest backs off to the context that is one token shorter (interpolation in
the manner of Witten and Bell, 1991, with a fixed smoothing per order).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from drafters.trigram.layers import MAX_ORDER, SUCCESSORS, TOKENS, TOTAL, WEIGHTS, extend_key, find_slot
from drafters.trigram.table import PROBABILITY_BITS, PROBABILITY_UNITS, Corpus, context_key, find_row, long_context_key

Int64 = NDArray[np.int64]
Uint32 = NDArray[np.uint32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

WIDTH = 32
"""Most candidates of one node."""
_SMOOTHING, _REQUEST, _TENANT, _CORPUS, _OTHER = 0, 1, 2, 3, 4
_HALF_COUNT, _STOP_MASS = 0, 1

Online = tuple[Uint32, Float32, int, int]
"""words, floats, first row of the layer (-1 without one), slots."""


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


@numba.njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _give(token: int, share: float, tokens: Int64, shares: Float64, size: int, marks: Int64, stamp: int) -> Any:
    """Add `share` to `token` among `size` candidates; returns the new size. `marks` [V] says who is among them."""
    if token >= marks.size:
        return size
    mark = marks[token]
    if mark >= stamp:
        shares[mark - stamp] += share
    elif size < WIDTH:
        marks[token] = stamp + size
        tokens[size] = token
        shares[size] = share
        size += 1
    return size


@numba.njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _give_slot(
    online: Online,
    slot: int,
    factor: float,
    tokens: Int64,
    shares: Float64,
    size: int,
    marks: Int64,
    stamp: int,
) -> Any:
    words, floats, _, _ = online
    for place in range(SUCCESSORS):
        weight = floats[slot, WEIGHTS + place]
        if weight > np.float32(0.0):
            size = _give(np.int64(words[slot, TOKENS + place]), factor * weight, tokens, shares, size, marks, stamp)
    return size


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def expand(
    context: Int64,
    corpus: Corpus,
    request: Online,
    tenant: Online,
    blend: Float64,
    tokens: Int64,
    shares: Float64,
    marks: Int64,
    stamp: int,
) -> Any:
    """Candidates after `context` [MAX_ORDER] (last token first, -1 before the start of the text).

    Fills `tokens` and `shares` ([WIDTH], probabilities that add up to at most 1) and returns how many there are.
    `marks` [V] is scratch: `stamp` must be above all it holds by now, by WIDTH at each call.
    """
    tri_slots, bi_rows, uni, entries, counts = corpus
    keys = np.empty(MAX_ORDER, np.uint64)
    known = 0
    key = np.uint64(0)
    for order in range(MAX_ORDER):
        if context[order] < 0:
            break
        key = extend_key(key, context[order])
        keys[order] = key
        known += 1
    size: Any = np.int64(0)
    mass = 1.0
    for order in range(known - 1, -1, -1):
        total = 0.0
        seen_request = -1
        if request[2] >= 0 and blend[_REQUEST, order] > 0.0:
            seen_request = find_slot(request[0], request[2], request[3], keys[order])
            if seen_request >= 0:
                total += blend[_REQUEST, order] * request[1][seen_request, TOTAL]
        seen_tenant = -1
        if tenant[2] >= 0 and blend[_TENANT, order] > 0.0:
            seen_tenant = find_slot(tenant[0], tenant[2], tenant[3], keys[order])
            if seen_tenant >= 0:
                total += blend[_TENANT, order] * tenant[1][seen_tenant, TOTAL]
        row = np.uint64(0)
        worth = 0.0
        if order == 2:
            row = find_row(tri_slots, long_context_key(context[2], context[1], context[0]))
        elif order == 1:
            row = find_row(tri_slots, context_key(context[1], context[0]))
        elif order == 0 and context[0] < bi_rows.size:
            row = bi_rows[context[0]]
        if row != np.uint64(0):
            count = np.float64(counts[np.int64(row & np.uint64(255))])
            worth = blend[_CORPUS, order] * count / (count + blend[_OTHER, _HALF_COUNT])
            total += worth
        if total <= 0.0:
            continue
        given = mass / (total + blend[_SMOOTHING, order])
        if seen_request >= 0:
            size = _give_slot(request, seen_request, given * blend[_REQUEST, order], tokens, shares, size, marks, stamp)
        if seen_tenant >= 0:
            size = _give_slot(tenant, seen_tenant, given * blend[_TENANT, order], tokens, shares, size, marks, stamp)
        if worth > 0.0:
            first: Any = np.int64(row >> np.uint64(16))
            last = min(first + np.int64(row >> np.uint64(8) & np.uint64(255)), entries.size)
            for index in range(first, last):
                share = given * worth * (entries[index] & PROBABILITY_UNITS) / PROBABILITY_UNITS
                size = _give(np.int64(entries[index] >> PROBABILITY_BITS), share, tokens, shares, size, marks, stamp)
        mass -= given * total
        if mass < blend[_OTHER, _STOP_MASS]:
            return size
    for index in range(uni.size):
        share = mass * (uni[index] & PROBABILITY_UNITS) / PROBABILITY_UNITS
        size = _give(np.int64(uni[index] >> PROBABILITY_BITS), share, tokens, shares, size, marks, stamp)
    return size
