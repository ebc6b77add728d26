"""What may follow a node of a merged tree: its candidates, what each part thinks of them, and one estimate of it all.

Tri-gram and CTC estimates are pooled log-linearly (a product of experts: either can veto, the CTC estimate less so the
more it was wrong of late in the row). A span that matches at the node takes the share that copying has earned.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.base import Int64
from drafters.calibration import CTC, LEAST_RATE, SILENT, SPAN, TRIGRAM
from drafters.compiled import Index, compiled, inlined
from drafters.copy import BEGIN, MAX_MATCHES, State, guess, match
from drafters.head import frames as frames_of
from drafters.ngram.backoff import expand
from drafters.ngram.search import best_candidate
from drafters.rates import Rates, cell_of, survival
from verifier.plan import MAX_TREE_NODES

Float64 = NDArray[np.float64]

WIDTH = 48
"""Most candidates that one node keeps."""
SPANS = 4
"""Most matches that take part in one tree."""


class Pool(NamedTuple):
    """Candidates of the nodes of one tree: working memory. Node and place among its candidates name a candidate."""

    tokens: Int64  # [64, WIDTH]
    estimates: Float64  # [64, WIDTH] the tri-gram's, until all are pooled in it
    chances: (
        Float64  # [64, WIDTH] the CTC head's estimate until then; when calibrated, what is left; 0 once in the tree
    )
    cells: Int64  # [64, WIDTH] who spoke (bits of a kind), until it becomes the cell of the estimate
    span_cells: Int64  # [64, WIDTH] cell of the span that says it, -1 for none
    spellings: Int64  # [64, WIDTH] its place among the candidates of the CTC head, -1 for none
    alone: Float64  # [64, WIDTH, 3] what tri-gram and CTC alone think of it, SILENT; both together, without spans
    sizes: Int64  # [64] candidates of the node
    scores: Float64  # [64] of the node's best candidate that is not in the tree yet, -1.0 for none
    choices: Int64  # [64] which it is
    marks: Int64  # [V] place of a token among the candidates of the open node, -1 for none


class Spans(NamedTuple):
    """Matches of one tree, and how far each goes along with it: working memory."""

    starts: Int64  # [MAX_MATCHES]
    lengths: Int64  # [MAX_MATCHES]
    nodes: Int64  # [MAX_MATCHES] the node that it has reached
    offsets: Int64  # [MAX_MATCHES] the tokens that this took
    num: Int64  # [1] how many there are


class Copied(NamedTuple):
    """What copied spans are made from."""

    texts: State
    rates: Rates
    spans: Spans


class Opening(NamedTuple):
    """A node whose candidates are looked for."""

    node: Index
    row: Index
    depth: Index
    token: Index
    temperature: Any
    heat: Any
    """Temperature over what the CTC head's frames know of it; 1 but where it is above the highest they know."""
    floor: Any
    """The chance below which a candidate of one part is not worth a look."""


def make_pool(vocab_size: int) -> Pool:
    """Working memory of one tree, allocated once."""
    wide = (MAX_TREE_NODES, WIDTH)
    return Pool(
        tokens=np.zeros(wide, np.int64),
        estimates=np.zeros(wide),
        chances=np.zeros(wide),
        cells=np.zeros(wide, np.int64),
        span_cells=np.full(wide, -1, np.int64),
        spellings=np.full(wide, -1, np.int64),
        alone=np.zeros((*wide, 3)),
        sizes=np.zeros(MAX_TREE_NODES, np.int64),
        scores=np.zeros(MAX_TREE_NODES),
        choices=np.zeros(MAX_TREE_NODES, np.int64),
        marks=np.full(vocab_size, -1, np.int64),
    )


def make_spans() -> Spans:
    """No matches."""
    starts, lengths, nodes, offsets = (np.zeros(MAX_MATCHES, np.int64) for _ in range(4))
    return Spans(starts, lengths, nodes, offsets, np.zeros(1, np.int64))


@inlined
def _place(node: Index, token: Index, most: Index, pool: Pool) -> Index:
    """Place of a token among the candidates of the open node, which it joins if there are fewer than `most`; or -1."""
    marks, sizes = pool.marks, pool.sizes
    if token >= marks.size:
        return np.int64(-1)
    place = marks[token]
    if place < 0 and sizes[node] < most:
        place = sizes[node]
        marks[token] = place
        pool.tokens[node, place] = token
        pool.estimates[node, place] = pool.chances[node, place] = 0.0
        pool.cells[node, place] = 0
        pool.span_cells[node, place] = pool.spellings[node, place] = -1
        pool.alone[node, place, 0] = pool.alone[node, place, 1] = pool.alone[node, place, 2] = 0.0
        sizes[node] = place + 1
    return place


@compiled
def hear_trigram(opening: Opening, trigram: Any, pool: Pool) -> None:
    """The tri-gram names candidates."""
    rows, model, scratch = trigram
    node, floor, layers = opening.node, opening.floor, rows[4]
    _, request, tenant, _, _, _ = model
    layer = layers[opening.row]
    request_base = opening.row * request[2] if request[3] else -1
    tenant_base = layer * tenant[2] if tenant[3] and layer >= 0 else -1
    size = expand(node, request_base, tenant_base, floor, model, scratch)
    tokens, shares = scratch[0], scratch[1]
    for index in range(size):
        if shares[node, index] >= 0.25 * floor:
            place = _place(node, tokens[node, index], np.int64(WIDTH - SPANS), pool)
            if place >= 0:
                pool.estimates[node, place] = shares[node, index]
                pool.cells[node, place] |= TRIGRAM


@compiled
def hear_frames(opening: Opening, ctc: Any, pool: Pool) -> bool:
    """The CTC head names candidates, and says what it thinks of the others.

    Returns whether it thinks anything: behind its last frame, and behind a token that no frame knows, it does not.
    """
    (bias, limits), scratch = ctc
    frames, paths = scratch[0], scratch[1]
    (tokens, _, blanks, count), weights = frames, paths[2]
    node = opening.node
    if limits[frames_of.IS_INDEPENDENT] > 0.0:
        if opening.depth >= blanks.size:
            return False
        frames_of.take_frame(opening.depth, frames, paths)
    else:
        frames_of.weigh(node, frames, paths)
    if not frames_of.lean(opening.token, frames, bias, weights):
        return False
    floor = frames_of.fitting_floor(weights, count[0], opening.floor, WIDTH - SPANS - pool.sizes[node])
    for index in range(count[0]):
        token = tokens[index]
        if weights[index] >= floor or (token < pool.marks.size and pool.marks[token] >= 0):
            place = _place(node, token, np.int64(WIDTH - SPANS), pool)
            if place >= 0:
                pool.chances[node, place] = weights[index]
                pool.spellings[node, place] = index
                pool.cells[node, place] |= CTC
    return True


@compiled
def pool_estimates(opening: Opening, share: float, floor: float, powers: Float64, pool: Pool) -> None:
    """What tri-gram and CTC head think becomes one estimate.

    Args: `share`, how far the CTC estimate is to be heard, 0 to 1, negative where there is none; `floor`, what an
    estimate is taken to give to what it does not list; `powers` [2] of the two estimates.
    """
    node, temperature, is_silent = opening.node, opening.temperature, share < 0.0
    estimates, chances, size = pool.estimates[node], pool.chances[node], pool.sizes[node]
    share = max(0.0, share)
    alone = 1.25 if temperature == 0.0 else 0.85 / temperature
    tri_power = powers[0] / opening.heat
    tri_power += (1.0 - share) * (alone - tri_power)
    ctc_power = powers[1] * share / opening.heat
    tri_rest, ctc_rest = 1.0, 1.0
    for index in range(size):
        pool.alone[node, index, 0] = estimates[index]
        pool.alone[node, index, 1] = SILENT if is_silent else chances[index]
        tri_rest -= estimates[index]
        ctc_rest -= chances[index]
    # What nobody lists counts as 16 equal tokens; where there is no noise, four of them are serious.
    unlisted = max(tri_rest, 1e-3) / 16.0
    total = math.exp(tri_power * math.log(unlisted) + ctc_power * math.log(max(ctc_rest, 1e-3) / 16.0))
    total *= 4.0 if temperature == 0.0 else 16.0
    for index in range(size):
        tri = math.log(max(estimates[index], floor))
        ctc = math.log(max(chances[index], floor))
        estimates[index] = math.exp(tri_power * tri + ctc_power * ctc)
        total += estimates[index]
    for index in range(size):
        estimates[index] /= total


@compiled
def find_spans(row: Index, copied: Copied) -> None:
    """Look for what followed the row's last tokens: the matches begin at the root."""
    spans = copied.spans
    spans.num[0] = match(row, np.int64(SPANS), copied.texts, spans.starts, spans.lengths)
    for span in range(spans.num[0]):
        spans.nodes[span] = spans.offsets[span] = 0


@compiled
def hear_spans(opening: Opening, is_silent: bool, copied: Copied, pool: Pool) -> None:
    """Spans that have reached the node take the share that copying has earned. `is_silent`: the head was.

    A mixture: the truth is the span's word, or else it is drawn from what the others think. So a span earns its share
    by what only it knew (calibration.credit_of_span); where the others know as much, copying fades.
    """
    texts, spans, node, row = copied.texts, copied.spans, opening.node, opening.row
    marks, is_noisy = texts[3], opening.temperature > 0.0
    is_second = False
    for span in range(spans.num[0]):
        if spans.nodes[span] != node:
            continue
        start = spans.starts[span]
        token = guess(row, start, spans.offsets[span], texts)
        if token < 0:
            continue
        is_known = token < pool.marks.size and pool.marks[token] >= 0 and pool.span_cells[node, pool.marks[token]] >= 0
        place = _place(node, token, np.int64(WIDTH), pool)
        if place < 0 or is_known:
            continue
        is_predicted = start < marks[row, BEGIN]
        cell = cell_of(is_noisy, is_predicted, is_second, spans.lengths[span], np.int64(opening.depth + 1))
        rate = survival(copied.rates, cell, LEAST_RATE)
        pool.alone[node, place, 2] = pool.estimates[node, place]
        for index in range(pool.sizes[node]):
            pool.estimates[node, index] *= 1.0 - rate
        if is_silent:
            pool.alone[node, place, 1] = SILENT
        pool.estimates[node, place] += rate
        pool.cells[node, place] |= SPAN
        pool.span_cells[node, place] = cell
        is_second = True


@compiled
def advance_spans(row: Index, parent: Index, node: Index, token: Index, copied: Copied) -> bool:
    """Spans at the parent that say `token` have reached the node. Returns whether one is of the prediction."""
    texts, spans = copied.texts, copied.spans
    marks, is_predicted = texts[3], False
    for span in range(spans.num[0]):
        start = spans.starts[span]
        if spans.nodes[span] == parent and guess(row, start, spans.offsets[span], texts) == token:
            spans.nodes[span] = node
            spans.offsets[span] += 1
            is_predicted = is_predicted or start < marks[row, BEGIN]
    return is_predicted


@inlined
def offer(node: Index, score: float, pool: Pool) -> None:
    """Remember the best candidate of a node whose own score is `score` that is not in the tree yet."""
    choice = best_candidate(pool.chances[node], pool.sizes[node])
    pool.choices[node] = choice
    pool.scores[node] = score * pool.chances[node, choice] if choice >= 0 else -1.0
