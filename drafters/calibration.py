"""What the estimates of merged trees were worth lately, and whom to hear how far: learned from what came true.

An estimate is corrected by accepted over expected of its cell: who spoke, how deep, how large the estimate. Counts hold
no text, so tenants may share them. How far the CTC head is heard beside the tri-gram is learned for each row alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.base import Int32, Int64
from drafters.compiled import Index, compiled, inlined
from drafters.rates import Rates, first_rates, observe, survival
from verifier.plan import MAX_TREE_NODES

Float64 = NDArray[np.float64]

NOISY, TRIGRAM, CTC, SPAN = 8, 4, 2, 1
"""Bits of a kind: whether the temperature is above 0, and who spoke for a candidate."""
_KINDS, _DEPTHS, _SIZES = 16, 4, 10
NUM_CELLS = _KINDS * _DEPTHS * _SIZES

SILENT = -1.0
"""What a head is noted to have thought of a candidate where it thought nothing at all."""
_LEAST_WORTH = 0.1
"""No calibration lowers an estimate further: what is never tried could never be seen to be worth more."""
LEAST_RATE = 0.02
"""Share of a span that has earned nothing: enough to be tried in a large tree, so that nobody's wrong predictions keep
those of others down for good."""
_FIRST_MERIT = 0.1
"""Part of a copied span's first chance that is its own merit beside tri-gram and head."""
_KEENNESS, _BENEFIT, _MEMORY, _LEAST_GIVEN = 0.35, 2.0, 0.85, 0.02
"""How fast the weight of the CTC estimate falls with its losses, how far doubt is in its favour, what is left of a
loss after one more token, and the least that an estimate is taken to have given to the truth."""


class Calibration(NamedTuple):
    """What was learned so far."""

    worth: Float64  # [NUM_CELLS, 2] accepted and expected, by cell of the estimate
    rates: Rates  # [rates.NUM_CELLS, 2] accepted and observed, by cell of the copied span
    losses: (
        Float64  # [rows, 2] how wrong tri-gram and CTC alone were of late: decayed sums of -log of the truth's share
    )
    decays: Float64  # [2] what is left of a cell after one more node: of spans, of estimates


class Asked(NamedTuple):
    """What was proposed last to each row. Written by the merger of trees, as they grow."""

    sizes: Int64  # [rows] number of nodes; 0 when there is nothing to learn from
    tokens: Int32  # [rows, 64]
    parents: Int32  # [rows, 64]
    cells: Int32  # [rows, 64]
    span_cells: Int32  # [rows, 64] -1: no span
    estimates: Float64  # [rows, 64] before calibration
    alone: Float64  # [rows, 64, 3] what tri-gram and CTC alone thought of the node, SILENT; both, without spans


def first_calibration(rows: int, prior: float, worth_prior: float, decays: tuple[float, float]) -> Calibration:
    """Before anything was observed. The priors: how many observations the first survival of a span is worth, and how
    many expected acceptances the first worth of an estimate."""
    worth: Float64 = np.full((NUM_CELLS, 2), worth_prior)
    return Calibration(worth, first_rates(prior, _FIRST_MERIT), no_losses(rows), np.array(decays))


def no_losses(rows: int) -> Float64:
    """Both parts are trusted, [rows, 2]."""
    return np.zeros((rows, 2))


def make_asked(rows: int) -> Asked:
    """Nothing proposed yet."""
    nodes = (rows, MAX_TREE_NODES)
    tokens, parents, cells, span_cells = (np.zeros(nodes, np.int32) for _ in range(4))
    return Asked(np.zeros(rows, np.int64), tokens, parents, cells, span_cells, np.zeros(nodes), np.zeros((*nodes, 3)))


@inlined
def estimate_cell(kind: Index, depth: Index, estimate: Any) -> Index:
    """Cell of an estimate for a node at `depth` (from 1)."""
    deep = depth - 1 if depth <= 2 else (2 if depth <= 4 else 3)
    size = min(_SIZES - 1, np.int64(-math.log2(max(estimate, 1e-9)) * 1.5))
    return np.int64((kind * _DEPTHS + deep) * _SIZES + size)


@inlined
def worth_of(cell: Index, calibration: Calibration) -> Any:
    """What estimates of the cell are to be multiplied by."""
    return max(_LEAST_WORTH, calibration.worth[cell, 0] / calibration.worth[cell, 1])


@inlined
def share_of_head(row: Index, calibration: Calibration) -> Any:
    """How far the CTC estimate is heard beside the tri-gram: less, the more often it alone was wrong of late."""
    lead = calibration.losses[row, 1] - calibration.losses[row, 0]
    return 1.0 / (1.0 + math.exp(min(30.0, max(-30.0, _KEENNESS * lead - _BENEFIT))))


@inlined
def credit_of_span(rate: Any, unaided: Any) -> Any:
    """How much of a word that came true is due to the copied span that said it too.

    Of a mixture with weight `rate` on the span, the others giving `unaided` to the word: the span's responsibility
    (expectation maximisation; Dempster, Laird, Rubin, 1977). What everybody knew is no merit of the span.
    """
    return rate / (rate + (1.0 - rate) * max(unaided, 1e-6))


@inlined
def _test(row: Index, node: Index, is_true: bool, calibration: Calibration, asked: Asked) -> None:
    """A node whose parent came true did so too, or did not: its cells count it."""
    worth, decays = calibration.worth, calibration.decays
    cell, span_cell = asked.cells[row, node], asked.span_cells[row, node]
    worth[cell, 0] = worth[cell, 0] * decays[1] + (1.0 if is_true else 0.0)
    worth[cell, 1] = worth[cell, 1] * decays[1] + asked.estimates[row, node]
    if span_cell >= 0:
        rates = calibration.rates
        rate = survival(rates, span_cell, LEAST_RATE)
        credit = credit_of_span(rate, asked.alone[row, node, 2]) if is_true else 0.0
        observe(rates, span_cell, credit, decays[0])


@inlined
def _blame(row: Index, reached: Index, losses: Float64, asked: Asked) -> None:
    """The truth was the node `reached`, -1 for none: count what each part had given to it, if it gave anything."""
    is_silent = reached >= 0 and asked.alone[row, reached, 1] == SILENT
    for part in range(0 if is_silent else 2):
        given = asked.alone[row, reached, part] if reached >= 0 else 0.0
        losses[row, part] = losses[row, part] * _MEMORY - math.log(max(given, _LEAST_GIVEN))


@compiled
def learn(batch: Int32, starts: Int32, tokens: Int64, held_calibration: Any, held_asked: Any) -> None:
    """News of a whole step: row batch[r] won tokens[starts[r] : starts[r + 1]].

    Args: `held_calibration`, `held_asked`, the bare tuples of these records (see drafters.tree_search.Memory).
    """
    calibration, asked = Calibration(*held_calibration), Asked(*held_asked)
    for index in range(batch.size):
        row = np.int64(batch[index])
        size, node = asked.sizes[row], 0
        if size <= 1:
            continue
        for place in range(starts[index], starts[index + 1]):
            reached = -1
            for child in range(node + 1, size):
                if asked.parents[row, child] == node:
                    is_true = asked.tokens[row, child] == tokens[place]
                    _test(row, child, is_true, calibration, asked)
                    if is_true:
                        reached = child
            _blame(row, reached, calibration.losses, asked)
            if reached < 0:
                break
            node = reached
        asked.sizes[row] = 0
