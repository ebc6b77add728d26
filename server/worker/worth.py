"""What drafting has been worth: by row, with what was seen of all rows of a drafter to begin with."""

from __future__ import annotations

from typing import Any

import numpy as np

from drafters.base import Int32
from drafters.compiled import Index, compiled, inlined
from server.worker.admission import NUM_BINS, Float64, Int64, bin_of

_RECENT, _RECENT_ALL = 10.0, 40.0
"""Steps of a row, and of all rows of a drafter, that count as recent."""
_MEMORY, _MEMORY_ALL = 48.0, 200.0
"""Expected tokens of a row, and of all rows of a drafter, that are remembered."""
_TRUST = 8.0
"""Expected tokens after which a factor is to one half what was seen, and else the drafter's, or 1."""
_FADED = 0.8
"""What a probe leaves of the memory of a row: who had bad luck would hardly ever hear better of itself."""
_LEAST, _MOST = 0.05, 2.0
"""Bounds of a factor."""
_FIRST_SURVIVAL, _FIRST_NODES = 0.8, 6.0
"""Of a drafter nobody has seen work is hoped so much that it is tried."""

Memory = tuple[Float64, Float64, Float64, Float64]
"""For each of some rows or drafters: drafted steps seen [n], accepted and expected tokens [n, 2], and by bin the nodes
that a tree holds [n, NUM_BINS] and the sum of their survivals [n, NUM_BINS]."""
Drafted = tuple[Int32, Int32, Int32, Float64]
"""Trees: row [T], why it drafted [T] (see REFUSED), starts [T + 1] in survivals, survivals of all drafted nodes [n], as
the drafter told them."""

REFUSED, ASKED, PROBED = 0, 1, 2
"""Why a row drafted: not at all, because it pays, or only to see."""


@inlined
def _factor(row: Index, who: Int64, tokens: Float64, all_tokens: Float64) -> Any:
    """What the drafter's survivals are to be multiplied with: accepted over expected, the row's own as far as known."""
    drafter = who[row]
    prior = (all_tokens[drafter, 0] + _TRUST) / (all_tokens[drafter, 1] + _TRUST)
    return min(_MOST, max(_LEAST, (tokens[row, 0] + _TRUST * prior) / (tokens[row, 1] + _TRUST)))


@inlined
def _remember(tokens: Float64, place: Index, accepted: Any, expected: Any, most: Any) -> None:
    """Add to accepted and expected tokens; more than `most` expected ones are scaled down to it."""
    tokens[place, 0] += accepted
    tokens[place, 1] += expected
    scale = most / max(tokens[place, 1], most)
    tokens[place, 0] *= scale
    tokens[place, 1] *= scale


@compiled
def _set_factors(rows: Int32, who: Int64, tokens: Float64, all_tokens: Float64, out: Float64) -> None:
    for index in range(rows.size):
        out[index] = _factor(np.int64(rows[index]), who, tokens, all_tokens)


@compiled
def _learn_tokens(drafted: Drafted, won: tuple[Float64, Float64], who: Int64, own: Float64, of_all: Float64) -> None:
    """Accepted and expected tokens of every tree: `won` is both [T]."""
    rows, reasons, _, _ = drafted
    accepted, expected = won
    for index in range(rows.size):
        row = np.int64(rows[index])
        if reasons[index] == REFUSED:
            continue
        if reasons[index] == PROBED:
            for column in range(2):
                own[row, column] *= _FADED
                of_all[who[row], column] *= 1.0 - (1.0 - _FADED) / rows.size
        _remember(own, row, accepted[index], expected[index], _MEMORY)
        _remember(of_all, who[row], accepted[index], expected[index], _MEMORY_ALL)


@compiled
def _learn_nodes(drafted: Drafted, who: Int64, own: Memory, of_all: Memory) -> None:
    """The nodes that the trees held, by bin of corrected survival, as running means."""
    rows, reasons, starts, survivals = drafted
    seen, tokens, counts, sums = own
    all_seen, all_tokens, all_counts, all_sums = of_all
    for index in range(rows.size):
        if reasons[index] == REFUSED:
            continue
        row = np.int64(rows[index])
        drafter = who[row]
        factor = _factor(row, who, tokens, all_tokens)
        seen[row] += 1.0
        all_seen[drafter] += 1.0
        share, all_share = 1.0 / min(seen[row] + 2.0, _RECENT), 1.0 / min(all_seen[drafter] + 4.0, _RECENT_ALL)
        for place in range(NUM_BINS):
            counts[row, place] *= 1.0 - share
            sums[row, place] *= 1.0 - share
            all_counts[drafter, place] *= 1.0 - all_share
            all_sums[drafter, place] *= 1.0 - all_share
        for at in range(starts[index] + 1, starts[index + 1]):
            survival = min(1.0, survivals[at] * factor)
            place = bin_of(survival)
            counts[row, place] += share
            sums[row, place] += share * survival
            all_counts[drafter, place] += all_share
            all_sums[drafter, place] += all_share * survival


class Worth:
    """Running estimates of what the rows' drafts win.

    A row has a factor, accepted over expected tokens of what was verified, which corrects its drafter's survivals; and
    the nodes that its trees held lately, as a mean number in each bin of corrected survival: a row whose trees are good
    every other time is worth more than one whose trees are always middling. Owns these numbers, by row and by drafter;
    they hold no text, so that tenants may share them.
    """

    def __init__(self, max_rows: int, max_drafters: int) -> None:
        self._who: Int64 = np.zeros(max_rows, np.int64)  # [M] drafter of the row
        self._rows = _no_memory(max_rows)
        self._drafters = _no_memory(max_drafters)
        self.forget()

    def forget(self) -> None:
        """Hope again, as at the beginning."""
        for numbers in self._drafters:
            numbers[:] = 0.0
        _, _, counts, sums = self._drafters
        hoped = int(bin_of(_FIRST_SURVIVAL))
        counts[:, hoped] = _FIRST_NODES
        sums[:, hoped] = _FIRST_NODES * _FIRST_SURVIVAL

    def start(self, row: int, drafter: int) -> None:
        """Somebody new lives in `row`: what is known of the drafter is expected of it."""
        seen, tokens, counts, sums = self._rows
        self._who[row], seen[row], tokens[row] = drafter, 0.0, 0.0
        counts[row], sums[row] = self._drafters[2][drafter], self._drafters[3][drafter]

    def who(self, rows: Int32) -> Int64:
        """The drafters of rows. [R]"""
        return self._who[rows]

    def of(self, rows: Int32) -> tuple[Float64, Float64]:
        """By row and bin [R, NUM_BINS]: the nodes that a tree is expected to hold, and the sum of their survivals."""
        return self._rows[2][rows], self._rows[3][rows]

    def factors(self, rows: Int32) -> Float64:
        """What the drafters' survivals are to be multiplied with. [R]"""
        factors = np.empty(rows.size)
        _set_factors(rows, self._who, self._rows[1], self._drafters[1], factors)
        return factors

    def learn(self, drafted: Drafted, accepted: Float64, expected: Float64) -> None:
        """Trees were verified, or what was left of them. [T]

        Args: `accepted` tokens of each, and how many were `expected` of the nodes that were verified.
        """
        _learn_tokens(drafted, (accepted, expected), self._who, self._rows[1], self._drafters[1])
        _learn_nodes(drafted, self._who, self._rows, self._drafters)


def _no_memory(size: int) -> Memory:
    return np.zeros(size), np.zeros((size, 2)), np.zeros((size, NUM_BINS)), np.zeros((size, NUM_BINS))
