"""What a copied token has earned: by length of the match, depth, kind of span and temperature.

Alone (predicted.py) a span earns by coming true, and its rate is a survival; beside others (calibration.py) it earns by
what only it knew, and its rate is a weight in a mixture.

A Beta prior with exponential forgetting in every cell. Counts hold no text, so tenants may share them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.compiled import Index, compiled, inlined

Rates = NDArray[np.float64]
"""[NUM_CELLS, 2]: accepted and observed nodes by calibration cell, the prior among them."""

FLOOR = 0.05
"""Least survival where spans are alone: tenants share the counts, and what is never tried can never prove better."""
LENGTHS, DEPTHS = 10, 6
NUM_CELLS = 2 * 2 * 2 * LENGTHS * DEPTHS


@inlined
def _length_class(length: Index) -> Index:
    if length <= 4:
        return length
    if length <= 6:
        return np.int64(5)
    if length <= 9:
        return np.int64(6)
    if length <= 15:
        return np.int64(7)
    return np.int64(8) if length <= 31 else np.int64(9)


@inlined
def _depth_class(depth: Index) -> Index:
    if depth <= 2:
        return depth - 1
    if depth <= 4:
        return np.int64(2)
    if depth <= 8:
        return np.int64(3)
    return np.int64(4) if depth <= 16 else np.int64(5)


@compiled
def cell_of(is_noisy: Index, is_predicted: Index, is_second: Index, length: Index, depth: Index) -> Index:
    """Calibration cell of a node at `depth` (from 1) of a span that matched `length` tokens.

    `is_noisy`: temperature above 0; `is_predicted`: the span is of the prediction; `is_second`: another span had a
    better guess at the same place.
    """
    kind = (np.int64(is_noisy) * 2 + np.int64(is_predicted)) * 2 + np.int64(is_second)
    return (kind * LENGTHS + _length_class(np.int64(length))) * DEPTHS + _depth_class(np.int64(depth))


def first_rates(weight: float, merit: float = 1.0) -> Rates:
    """Accepted and observed nodes by calibration cell, [cells, 2], before anything was observed.

    The chance that a copied token is right rises with the number of tokens that already were: match and depth together.
    `merit` is the part of it that nobody else is taken to know, for spans that are not of a prediction.
    """
    rates: Rates = np.zeros((NUM_CELLS, 2))
    longest = (0, 1, 2, 3, 4, 5, 8, 12, 23, 32)
    deepest = (1, 2, 3, 6, 12, 30)
    for index in range(NUM_CELLS):
        kind, rest = divmod(index, LENGTHS * DEPTHS)
        length, depth = longest[rest // DEPTHS], deepest[rest % DEPTHS]
        # Who sends a prediction has reason to: it counts like seven more tokens that match.
        known = length + depth - 1 + (7 if kind & 2 else 0)
        chance = 1.0 - 1.6 / (known + 1.0) if known else 0.0
        chance *= (0.95 if kind & 4 else 1.0) * (0.3 if kind & 1 else 1.0)
        rates[index] = max(0.02, chance) * (1.0 if kind & 2 else merit) * weight, weight
    return rates


@inlined
def survival(rates: Rates, cell: Index, floor: float) -> Any:
    """The rate of a cell; never too low to be tried again, whoever made it so."""
    return max(floor, rates[cell, 0] / rates[cell, 1])


@inlined
def observe(rates: Rates, cell: Index, credit: float, decay: float) -> None:
    """One node of a cell was put to the test, and has earned `credit`: 1 if it came true, 0 if it did not, between them
    where others said it too. What the cell knew counts `decay` times as much from now on."""
    rates[cell, 0] = rates[cell, 0] * decay + credit
    rates[cell, 1] = rates[cell, 1] * decay + 1.0
