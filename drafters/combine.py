"""One estimate from all that the sources think of a node's candidates.

N-gram and head are pooled log-linearly (a product of experts: either can veto; the head's estimate less so the more it
was wrong of late in the row). A copied span that matches at the node takes the share that copying has earned.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from drafters import COPY, HEAD, NGRAM
from drafters.base import Float64, Int64
from drafters.calibration import NOISY, estimate_cell, span_cell, survival, worth_of
from drafters.candidates import SILENT, WIDTH, place_of
from drafters.compiled import Index, compiled
from drafters.copy import Texts, copied_token
from drafters.coupling import couple
from drafters.head.frames import MAX_TEMPERATURE
from drafters.rows import MAX_FRAMES

_POWERS = (((0.25, 1.0), (0.5, 0.85)), ((0.45, 0.78), (0.6, 0.68)))
"""Of n-gram and head estimate before they are multiplied: at temperature 0 or above; right behind the root, where the
head has seen all there is, or deeper. Measured with tests/bench/drafters_ablation.py."""
_SHARPENED, _SAMPLED = 1.25, 0.85
"""Power of an n-gram that speaks alone: at temperature 0 only the favourite counts; above it, divided by it."""
_REACH = 0.9
"""How much the noise counts in the ranking at temperature 1. It falls with the root of the temperature."""
_UNLISTED = 1e-3
"""What an estimate is taken to give to a token that it does not list."""
_RIVALS = 16.0
"""What nobody lists counts as so many equal tokens."""
_MOST = 0.999


@compiled
def pool_estimates(node: Index, powers: tuple[float, float], rivals: float, is_silent: bool, found: Any) -> None:
    """What n-gram and head think becomes one estimate: a product of both, each raised to its power."""
    size, ngram_rest, head_rest = found.sizes[node], 1.0, 1.0
    # One source alone has listed all that it is asked about.
    least = _UNLISTED if powers[0] > 0.0 and powers[1] > 0.0 else 1e-9
    for index in range(size):
        found.alone[node, index, 0] = found.estimates[node, index]
        found.alone[node, index, 1] = SILENT if is_silent else found.head_shares[node, index]
        ngram_rest -= found.estimates[node, index]
        head_rest -= found.head_shares[node, index]
    total = powers[0] * math.log(max(ngram_rest, 1e-3) / _RIVALS) + powers[1] * math.log(max(head_rest, 1e-3) / _RIVALS)
    total = rivals * math.exp(total)
    for index in range(size):
        ngram = math.log(max(found.estimates[node, index], least))
        head = math.log(max(found.head_shares[node, index], least))
        estimate = math.exp(powers[0] * ngram + powers[1] * head)
        found.estimates[node, index] = estimate
        total += estimate
    for index in range(size):
        found.estimates[node, index] /= total


@compiled
def powers_of(row: Any, mask: Index, depth: Index, share: float) -> tuple[float, float]:
    """Powers of n-gram and head. `share`: how far the head is heard, 0 to 1; negative where it is silent."""
    temperature = row.temperature
    heat = max(1.0, temperature / MAX_TEMPERATURE)  # frames know no higher temperature: the rest of it flattens them
    if mask & NGRAM == 0:
        head = row.factors[min(depth, MAX_FRAMES - 1), 0] if temperature > 0.0 else 1.0
        return 0.0, head / heat
    alone = _SHARPENED if temperature == 0.0 else _SAMPLED / temperature
    if share < 0.0:
        return alone, 0.0
    pair = _POWERS[1 if temperature > 0.0 else 0][1 if depth > 0 else 0]
    ngram = pair[0] / heat
    return ngram + (1.0 - share) * (alone - ngram), pair[1] * share / heat


@compiled
def score_spans(
    place: tuple[Index, Index, Index], is_noisy: bool, is_silent: bool, rates: Float64, texts: Texts, found: Any,
    marks: Int64,
) -> None:  # fmt: skip
    """Spans that have reached the node take the share that copying has earned. `is_silent`: the head was.

    A mixture: the truth is the span's word, or else it is drawn from what the others think. So a span earns its share
    by what only it knew (calibration.credit_of_span); where the others know as much, copying fades.

    Args: `place`, node, row and depth.
    """
    node, row, depth = place
    begin, num_said = texts.facts[row].begin, 0
    for span in range(found.num_spans):
        if found.span_nodes[span] != node:
            continue
        start = found.span_starts[span]
        token = copied_token(row, start, found.span_offsets[span], texts)
        if token < 0 or token >= marks.size:
            continue
        if marks[token] >= 0 and found.span_cells[node, marks[token]] >= 0:
            continue  # a longer match says the same
        at = place_of(node, token, np.int64(WIDTH), found, marks)
        if at < 0:
            continue
        cell = span_cell(is_noisy, start < begin, num_said > 0, found.span_lengths[span], depth + 1)
        rate = survival(rates, cell)
        found.alone[node, at, 2] = found.estimates[node, at]
        for index in range(found.sizes[node]):
            found.estimates[node, index] *= 1.0 - rate
        if is_silent:
            found.alone[node, at, 1] = SILENT
        found.estimates[node, at] += rate
        found.cells[node, at] |= COPY
        found.span_cells[node, at] = cell
        num_said += 1


@compiled
def advance_spans(row: Index, parent: Index, node: Index, token: Index, texts: Texts, found: Any) -> bool:
    """Spans at the parent that say `token` have reached the node. Returns whether one is of the prediction."""
    begin, is_predicted = texts.facts[row].begin, False
    for span in range(found.num_spans):
        start = found.span_starts[span]
        if found.span_nodes[span] == parent and copied_token(row, start, found.span_offsets[span], texts) == token:
            found.span_nodes[span] = node
            found.span_offsets[span] += 1
            is_predicted = is_predicted or start < begin
    return is_predicted


@compiled
def finish(
    node: Index, depth: Index, mask: Index, exploration: float, row: Any, worth: Float64, found: Any
) -> None:  # fmt: skip
    """From estimates to chances and ranks: the shared noise, the calibration, the exploration bonus."""
    size, temperature = found.sizes[node], row.temperature
    if temperature > 0.0:
        reach = _REACH * math.sqrt(min(1.0, temperature))
        if mask & NGRAM == 0 and mask & HEAD != 0:
            reach = row.factors[min(depth, MAX_FRAMES - 1), 1]
        draw = (row.seed, row.length + depth)
        couple(found.tokens[node, :size], found.estimates[node, :size], draw, reach)
    for index in range(size):
        estimate = found.estimates[node, index]
        kind = found.cells[node, index] + (NOISY if temperature > 0.0 else 0)
        cell = estimate_cell(mask, kind, depth + 1, estimate)
        found.cells[node, index] = cell
        chance = min(_MOST, estimate * worth_of(worth, cell))
        found.chances[node, index] = chance
        # Of a share estimated from few observations more is unknown: an upper confidence bound, after ADED's bonus.
        spread = math.sqrt(chance * (1.0 - chance) / (1.0 + found.seen[node, index]))
        found.ranks[node, index] = chance + exploration * spread
