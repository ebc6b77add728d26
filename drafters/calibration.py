"""What estimates were worth lately, what copied spans have earned, and how far a head is heard: learned from what came
true.

An estimate is corrected by accepted over expected of its cell: which sources drafted, which of them named the token,
how deep, how large the estimate. A copied span earns its share of the probability by what only it knew: by length of
the match, depth, kind of span and temperature. Counts hold no text, so tenants may share them. How far the head is
heard beside the n-gram is learned for each row alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from drafters import COPY
from drafters.base import Float64, Int64
from drafters.candidates import SILENT
from drafters.compiled import Index, compiled, inlined
from verifier.plan import MAX_TREE_NODES

NOISY = 8
"""Bit of a kind: the temperature is above 0. The sources that named the token are the bits below it."""
_MASKS, _KINDS, _DEPTHS, _SIZES = 8, 16, 4, 10
NUM_CELLS = _MASKS * _KINDS * _DEPTHS * _SIZES
_LENGTHS, _SPAN_DEPTHS = 10, 6
SPAN_CELLS = 8 * _LENGTHS * _SPAN_DEPTHS
"""Cells of copied spans for one mask of sources: what a span earns depends on what the others know."""

_WORTH_PRIOR, _WORTH_DECAY = 8.0, 0.999
"""Expected acceptances that it takes to move an estimate's cell, and what is left of it after one more node."""
_SPAN_PRIOR, _SPAN_DECAY = 4.0, 0.998
"""The same for spans, in observations."""
LEAST_WORTH = 0.1
"""No calibration lowers an estimate further: what is never tried could never be seen to be worth more."""
LEAST_RATE = 0.02
"""Share of a span that has earned nothing: enough to be tried in a large tree, so that nobody's wrong predictions keep
those of others down for good."""
_FIRST_MERIT = 0.1
"""Part of a copied span's first chance that is its own merit beside other sources."""
_KEENNESS, _BENEFIT, _MEMORY, _LEAST_GIVEN = 0.35, 2.0, 0.85, 0.02
"""How fast the weight of the head's estimate falls with its losses, how far doubt is in its favour, what is left of a
loss after one more token, and the least that an estimate is taken to have given to the truth."""

ASKED = np.dtype(
    [
        ("size", np.int64),  # nodes of the tree proposed last; 0 when there is nothing to learn from
        ("mask", np.int64),  # the sources that drafted it
        ("tokens", np.int64, (MAX_TREE_NODES,)),
        ("parents", np.int64, (MAX_TREE_NODES,)),
        ("cells", np.int64, (MAX_TREE_NODES,)),
        ("span_cells", np.int64, (MAX_TREE_NODES,)),  # -1: no span
        ("estimates", np.float64, (MAX_TREE_NODES,)),  # before calibration
        ("alone", np.float64, (MAX_TREE_NODES, 3)),  # what n-gram and head alone thought, SILENT; both without spans
        ("losses", np.float64, (2,)),  # how wrong n-gram and head were of late: decayed sums of -log of what they gave
    ]
)
"""What was proposed last to a row, and how its sources fared."""


def first_worth() -> Float64:
    """Accepted and expected by cell, [NUM_CELLS, 2], before anything was observed: every estimate is taken as it is."""
    return np.full((NUM_CELLS, 2), _WORTH_PRIOR)


def first_rates() -> Float64:
    """Accepted and observed nodes by mask of sources and cell of the span, [8, SPAN_CELLS, 2].

    The chance that a copied token is right rises with the number of tokens that already were: match and depth together.
    """
    rates: Float64 = np.zeros((_MASKS, SPAN_CELLS, 2))
    longest = (0, 1, 2, 3, 4, 5, 8, 12, 23, 32)
    deepest = (1, 2, 3, 6, 12, 30)
    for mask, cell in np.ndindex(_MASKS, SPAN_CELLS):
        kind, rest = divmod(cell, _LENGTHS * _SPAN_DEPTHS)
        # Who sends a prediction has reason to: it counts like seven more tokens that match.
        known = longest[rest // _SPAN_DEPTHS] + deepest[rest % _SPAN_DEPTHS] - 1 + (7 if kind & 2 else 0)
        chance = 1.0 - 1.6 / (known + 1.0) if known else 0.0
        chance *= (0.95 if kind & 4 else 1.0) * (0.3 if kind & 1 else 1.0)
        merit = 1.0 if kind & 2 or mask == COPY else _FIRST_MERIT
        rates[mask, cell] = max(0.02, chance) * merit * _SPAN_PRIOR, _SPAN_PRIOR
    return rates


@compiled
def estimate_cell(mask: Index, kind: Index, depth: Index, estimate: Any) -> Index:
    """Cell of an estimate for a node at `depth` (from 1)."""
    deep = depth - 1 if depth <= 2 else (2 if depth <= 4 else 3)
    size = min(_SIZES - 1, np.int64(-math.log2(max(estimate, 1e-9)) * 1.5))
    return np.int64(((mask * _KINDS + kind) * _DEPTHS + deep) * _SIZES + size)


@compiled
def span_cell(is_noisy: Index, is_predicted: Index, is_second: Index, length: Index, depth: Index) -> Index:
    """Cell of a node at `depth` (from 1) of a span that matched `length` tokens.

    `is_noisy`: temperature above 0; `is_predicted`: the span is of the prediction; `is_second`: another span had a
    better guess at the same place.
    """
    kind = (np.int64(is_noisy) * 2 + np.int64(is_predicted)) * 2 + np.int64(is_second)
    if length <= 4:
        long = np.int64(length)
    else:
        long = np.int64(5 + (length > 6) + (length > 9) + (length > 15) + (length > 31))
    deep = np.int64((depth > 1) + (depth > 2) + (depth > 4) + (depth > 8) + (depth > 16))
    return (kind * _LENGTHS + long) * _SPAN_DEPTHS + deep


@inlined
def survival(rates: Float64, cell: Index) -> Any:
    """The rate of a span's cell; never too low to be tried again, whoever made it so. `rates` [SPAN_CELLS, 2]."""
    return max(LEAST_RATE, rates[cell, 0] / rates[cell, 1])


@inlined
def worth_of(worth: Float64, cell: Index) -> Any:
    """What estimates of the cell are to be multiplied by."""
    return max(LEAST_WORTH, worth[cell, 0] / worth[cell, 1])


@inlined
def share_of_head(asked: Any) -> Any:
    """How far the head's estimate is heard beside the n-gram's: less, the more often it alone was wrong of late."""
    lead = asked.losses[1] - asked.losses[0]
    return 1.0 / (1.0 + math.exp(min(30.0, max(-30.0, _KEENNESS * lead - _BENEFIT))))


@inlined
def credit_of_span(rate: Any, unaided: Any) -> Any:
    """How much of a word that came true is due to the copied span that said it too.

    Of a mixture with weight `rate` on the span, the others giving `unaided` to the word: the span's responsibility
    (expectation maximisation; Dempster, Laird, Rubin, 1977). What everybody knew is no merit of the span.
    """
    return rate / (rate + (1.0 - rate) * max(unaided, 1e-6))


@inlined
def observe_span(rates: Float64, cell: Index, credit: Any) -> None:
    """One node of a cell was put to the test and earned `credit`: 1 if it came true and nobody else had said it."""
    rates[cell, 0] = rates[cell, 0] * _SPAN_DECAY + credit
    rates[cell, 1] = rates[cell, 1] * _SPAN_DECAY + 1.0


@compiled
def _test(node: Index, is_true: bool, asked: Any, worth: Float64, rates: Float64) -> None:
    """A node whose parent came true did so too, or did not: its cells count it."""
    cell, copied = asked.cells[node], asked.span_cells[node]
    worth[cell, 0] = worth[cell, 0] * _WORTH_DECAY + (1.0 if is_true else 0.0)
    worth[cell, 1] = worth[cell, 1] * _WORTH_DECAY + asked.estimates[node]
    if copied >= 0:
        credit = credit_of_span(survival(rates, copied), asked.alone[node, 2]) if is_true else 0.0
        observe_span(rates, copied, credit)


@compiled
def calibrate(tokens: Int64, asked: Any, worth: Float64, rates: Float64) -> None:
    """A row won `tokens`: learn how far its last tree was right, once. `rates` [SPAN_CELLS, 2] of the tree's mask."""
    size, node = asked.size, 0
    asked.size = 0
    for place in range(tokens.size if size > 1 else 0):
        reached = -1
        for child in range(node + 1, size):
            if asked.parents[child] == node:
                is_true = asked.tokens[child] == tokens[place]
                _test(child, is_true, asked, worth, rates)
                if is_true:
                    reached = child
        is_silent = reached >= 0 and asked.alone[reached, 1] == SILENT
        for part in range(0 if is_silent else 2):  # what each part had given to the truth
            given = asked.alone[reached, part] if reached >= 0 else 0.0
            asked.losses[part] = asked.losses[part] * _MEMORY - math.log(max(given, _LEAST_GIVEN))
        if reached < 0:
            break
        node = reached
