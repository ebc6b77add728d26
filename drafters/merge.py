"""One tree from several guesses, compiled: tri-gram, CTC frames and copied spans, asked at every node of the tree.

At each node the tri-gram estimate and the CTC estimate of the next token are pooled log-linearly (a product of
experts: either can veto, the CTC estimate less so the more it was wrong of late in the row). A span that matches there
takes the share that copying has earned. The result is multiplied by what such estimates were worth lately: accepted
over expected, by who spoke, depth and size of the estimate. The tree then takes the node of highest cumulative estimate
that it can still grow.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.base import Float32, Int32, Int64, Source
from drafters.ctc import search as frames_of
from drafters.rates import Rates, cell_of, observe, survival
from drafters.texts import BEGIN, MAX_MATCHES, guess, match
from drafters.trigram.blend import expand
from drafters.trigram.compiled import Index, compiled, inlined
from drafters.trigram.layers import MAX_ORDER
from drafters.trigram.search import best_candidate, couple
from verifier.plan import MAX_TREE_NODES

Float64 = NDArray[np.float64]

WIDTH = 48
"""Most candidates that one node keeps."""
SPANS = 4
"""Most matches that take part in one tree."""
MAX_DEPTH, CUT, REACH, FLOOR, POWERS = range(5)
"""Columns of the limits: deepest node; CUT: scores below CUT / max_nodes are not worth a look; how much the noise
counts in a coupled ranking; the probability that an estimate is taken to give to what it does not list; from POWERS on
the powers of tri-gram and CTC estimate where they are pooled: at temperature 0 right behind the root and deeper, then
the same for temperature > 0."""

KINDS, DEPTHS, SIZES = 16, 4, 10
NUM_CELLS = KINDS * DEPTHS * SIZES
_NOISY, _TRIGRAM, _CTC, _SPAN = 8, 4, 2, 1

Worth = Float64
"""[NUM_CELLS, 2] accepted and expected, by calibration cell."""
Asked = tuple[Int32, Int32, Int32, Int32, Float64, Int64, Float64]
"""By row, what was proposed last: tokens, parents, cells and span cells (-1: no span) of the nodes [rows, 64], their
own estimates before calibration [rows, 64], the number of nodes [rows], 0 when there is nothing to learn from, and
what tri-gram and CTC alone thought of them [rows, 64, 2]."""
Pool = tuple[Int64, Float64, Float64, Int64, Int64, Int64, Int64, Float64, Int64, Int64, Float64]
"""Working memory. By node: candidates [nodes, WIDTH], their estimates before and after calibration [nodes, WIDTH],
their cells and span cells [nodes, WIDTH], the candidate's index among the CTC candidates [nodes, WIDTH], how many
[nodes], score of the best that is left [nodes] and which it is [nodes]; marks [V] (-1 or place among the candidates of
the open node); what the two parts alone think of the candidates [nodes, WIDTH, 2]."""
Trust = Float64
"""[rows, 2] how wrong tri-gram and CTC alone were of late in a row: decayed sums of -log of what the truth got."""
Spans = tuple[Int64, Int64, Int64, Int64]
"""starts and lengths of the matches [MAX_MATCHES]; the node that each has reached and its offset [MAX_MATCHES]."""
Packed = tuple[Int64, Int32, Int32, Int64, Float32, NDArray[np.int8], Int32]
"""tokens, parents, depths, ancestors, scores, sources, row_starts of DraftTrees."""

_SOURCES = (int(Source.TRIGRAM), int(Source.CTC), int(Source.SUFFIX), int(Source.PREDICTION))
_KEENNESS, _BENEFIT, _MEMORY, _LEAST_GIVEN = 0.35, 2.0, 0.85, 0.02
"""How fast the weight of the CTC estimate falls with its losses, how far doubt is in its favour, what is left of a
loss after one more token, and the least that an estimate is taken to have given to the truth."""
_SILENT = -1.0
"""What a head is noted to have thought of a candidate where it thought nothing at all."""
_LEAST_WORTH = 0.1
"""No calibration lowers an estimate further: what is never tried could never be seen to be worth more."""
_NOISE_REACH = 0.25
"""At temperature > 0 noise lifts what is unlikely: so much less is worth a look."""


def make_pool(vocab_size: int) -> Pool:
    """Working memory of one tree, allocated once."""
    wide = (MAX_TREE_NODES, WIDTH)
    return (
        *(np.zeros(wide, np.int64), np.zeros(wide), np.zeros(wide)),
        *(np.zeros(wide, np.int64), np.full(wide, -1, np.int64), np.full(wide, -1, np.int64)),
        *(np.zeros(MAX_TREE_NODES, np.int64), np.zeros(MAX_TREE_NODES), np.zeros(MAX_TREE_NODES, np.int64)),
        np.full(vocab_size, -1, np.int64),
        np.zeros((*wide, 2)),
    )


def make_spans() -> Spans:
    """Working memory for the matches of one tree."""
    starts, lengths, nodes, offsets = (np.zeros(MAX_MATCHES, np.int64) for _ in range(4))
    return starts, lengths, nodes, offsets


def make_asked(rows: int) -> Asked:
    """Nothing proposed yet."""
    nodes = (rows, MAX_TREE_NODES)
    tokens, parents, cells, spans = (np.zeros(nodes, np.int32) for _ in range(4))
    return tokens, parents, cells, spans, np.zeros(nodes), np.zeros(rows, np.int64), np.zeros((*nodes, 2))


@inlined
def _cell(kind: Index, depth: Index, share: Any) -> Index:
    """Calibration cell of an estimate `share` for a node at `depth` (from 1); `kind` says who spoke."""
    deep = depth - 1 if depth <= 2 else (2 if depth <= 4 else 3)
    size = min(SIZES - 1, np.int64(-math.log2(max(share, 1e-9)) * 1.5))
    return np.int64((kind * DEPTHS + deep) * SIZES + size)


@inlined
def _place(node: Index, token: Index, pool: Pool) -> Index:
    """Place of a token among the candidates of the open node, which it joins if there is room; else -1."""
    marks, sizes = pool[9], pool[6]
    if token >= marks.size:
        return np.int64(-1)
    place = marks[token]
    if place < 0 and sizes[node] < WIDTH:
        place = sizes[node]
        marks[token] = place
        pool[0][node, place] = token
        pool[1][node, place] = pool[2][node, place] = 0.0
        pool[3][node, place] = 0
        pool[4][node, place] = pool[5][node, place] = -1
        sizes[node] = place + 1
    return place


@compiled
def _hear_trigram(node: Index, row: Index, floor: float, trigram: Any, pool: Pool) -> None:
    """Candidates of the tri-gram: estimate in column 1, kind bit set."""
    rows, model, scratch = trigram
    request, tenant = model[1], model[2]
    layer = rows[4][row]
    request_base = row * request[2] if request[3] else -1
    tenant_base = layer * tenant[2] if tenant[3] and layer >= 0 else -1
    size = expand(node, request_base, tenant_base, floor, model, scratch)
    for index in range(size):
        if scratch[1][node, index] >= 0.25 * floor:
            place = _place(node, scratch[0][node, index], pool)
            if place >= 0:
                pool[1][node, place] = scratch[1][node, index]
                pool[3][node, place] |= _TRIGRAM


@compiled
def _hear_frames(node: Index, depth: Index, token: Index, floor: float, ctc: Any, pool: Pool) -> bool:
    """Candidates of the CTC head: estimate in column 2, kind bit set; also what it thinks of the others' candidates.

    Returns whether it thinks anything: behind its last frame, and behind a token that no frame knows, it does not.
    """
    model, scratch = ctc
    bias, limits = model
    frames, paths = scratch[0], scratch[1]
    if limits[frames_of.IS_INDEPENDENT] > 0.0:
        if depth >= frames[2].size:
            return False
        frames_of.take_frame(depth, frames, paths)
    else:
        frames_of.weigh(node, frames, paths)
    weights = paths[2]
    if not frames_of.lean(token, frames, bias, weights):
        return False
    for index in range(frames[3][0]):
        name = frames[0][index]
        if weights[index] >= floor or (name < pool[9].size and pool[9][name] >= 0):
            place = _place(node, name, pool)
            if place >= 0:
                pool[2][node, place] = weights[index]
                pool[5][node, place] = index
                pool[3][node, place] |= _CTC
    return True


@compiled
def _pool_estimates(node: Index, share: float, place: tuple[Index, Any], limits: Float64, pool: Pool) -> None:
    """Column 1 and 2 become one estimate, in column 1.

    Args: `share`, how far the CTC estimate is to be heard, 0 to 1, negative where there is none; `place`, depth and
    temperature.
    """
    depth, temperature = place
    size, is_silent = pool[6][node], share < 0.0
    share = max(0.0, share)
    alone = 1.25 if temperature == 0.0 else 0.85 / temperature
    column = POWERS + (4 if temperature > 0.0 else 0) + (2 if depth > 0 else 0)
    tri_power = limits[column] + (1.0 - share) * (alone - limits[column])
    ctc_power = limits[column + 1] * share
    for index in range(size):
        pool[10][node, index, 0] = pool[1][node, index]
        pool[10][node, index, 1] = _SILENT if is_silent else pool[2][node, index]
    floor = limits[FLOOR]
    tri_rest, ctc_rest = 1.0, 1.0
    for index in range(size):
        tri_rest -= pool[1][node, index]
        ctc_rest -= pool[2][node, index]
    # What nobody lists counts as 16 equal tokens; where there is no noise, four of them are serious.
    unlisted = max(tri_rest, 1e-3) / 16.0
    total = math.exp(tri_power * math.log(unlisted) + ctc_power * math.log(max(ctc_rest, 1e-3) / 16.0))
    total *= 4.0 if temperature == 0.0 else 16.0
    for index in range(size):
        tri = math.log(max(pool[1][node, index], floor))
        ctc = math.log(max(pool[2][node, index], floor))
        pool[1][node, index] = math.exp(tri_power * tri + ctc_power * ctc)
        total += pool[1][node, index]
    for index in range(size):
        pool[1][node, index] /= total


@inlined
def _share(tri_loss: Any, ctc_loss: Any) -> Any:
    """How far the CTC estimate is heard beside the tri-gram: less, the more often it alone was wrong of late."""
    return 1.0 / (1.0 + math.exp(min(30.0, max(-30.0, _KEENNESS * (ctc_loss - tri_loss) - _BENEFIT))))


@compiled
def _hear_spans(node: Index, row: Index, depth: Index, temperature: Any, copied: Any, pool: Pool) -> None:
    """Spans that have reached the node take the share that copying has earned."""
    state, spans, rates, count = copied
    marks = state[3]
    is_second = False
    for span in range(count[0]):
        if spans[2][span] != node:
            continue
        token = guess(row, spans[0][span], spans[3][span], state)
        if token < 0:
            continue
        is_known = token < pool[9].size and pool[9][token] >= 0 and pool[4][node, pool[9][token]] >= 0
        place = _place(node, token, pool)
        if place < 0 or is_known:
            continue
        cell = cell_of(
            temperature > 0.0, spans[0][span] < marks[row, BEGIN], is_second, spans[1][span], np.int64(depth + 1)
        )
        rate = survival(rates, cell)
        for index in range(pool[6][node]):
            pool[1][node, index] *= 1.0 - rate
        pool[1][node, place] += rate
        pool[3][node, place] |= _SPAN
        pool[4][node, place] = cell
        is_second = True


@compiled
def _open(node: Index, row: Index, place: tuple[Index, Index, float], experts: Any, worth: Worth, limits: Float64,
          pool: Pool) -> None:  # fmt: skip
    """Find what may follow a node. `place`: its depth, its token, and the least chance that deserves a look."""
    trigram, ctc, copied, has_frames, trust = experts
    depth, token, floor = place
    rows = trigram[0]
    temperature = rows[3][row]
    if temperature > 0.0:
        floor *= _NOISE_REACH
    pool[6][node] = 0
    _hear_trigram(node, row, 0.5 * floor, trigram, pool)
    is_heard = has_frames and _hear_frames(node, depth, token, 0.5 * floor, ctc, pool)
    share = _share(trust[row, 0], trust[row, 1]) if is_heard else -1.0
    _pool_estimates(node, share, (depth, temperature), limits, pool)
    _hear_spans(node, row, depth, temperature, copied, pool)
    size = pool[6][node]
    for index in range(size):
        pool[9][pool[0][node, index]] = -1
    if temperature > 0.0:
        draw, reach = (rows[2][row], rows[1][row] + depth), limits[REACH] * math.sqrt(min(1.0, temperature))
        couple(pool[0][node, :size], pool[1][node, :size], draw, 1.0, 1.0, reach)
    for index in range(size):
        share = pool[1][node, index]
        cell = _cell(pool[3][node, index] + (_NOISY if temperature > 0.0 else 0), depth + 1, share)
        pool[3][node, index] = cell
        pool[2][node, index] = min(0.999, share * max(_LEAST_WORTH, worth[cell, 0] / worth[cell, 1]))


@inlined
def _offer(node: Index, score: float, pool: Pool) -> None:
    """Remember the best candidate of a node that is not in the tree yet."""
    choice = best_candidate(pool[2][node], pool[6][node])
    pool[8][node] = choice
    pool[7][node] = score * pool[2][node, choice] if choice >= 0 else -1.0


@compiled
def _advance(node: Index, parent: Index, row: Index, token: Index, copied: Any) -> None:
    """Spans at the parent that say `token` have reached the node."""
    state, spans, _, count = copied
    for span in range(count[0]):
        if spans[2][span] == parent and guess(row, spans[0][span], spans[3][span], state) == token:
            spans[2][span] = node
            spans[3][span] += 1


@inlined
def _source(cell: Index, is_predicted: bool) -> Index:
    """Who is to be named for a node: the one that knew more."""
    kind = cell // (DEPTHS * SIZES)
    if kind & _SPAN:
        return _SOURCES[3] if is_predicted else _SOURCES[2]
    return _SOURCES[1] if kind & _CTC and not kind & _TRIGRAM else _SOURCES[0]


@compiled
def _grow(row: Index, most: Index, start: Index, experts: Any, worth: Worth, limits: Float64, asked: Asked, pool: Pool,
          out: Packed) -> Index:  # fmt: skip
    """One tree at packed index `start`. Returns its size."""
    tokens, parents, depths, ancestors, scores, sources, _ = out
    (rows, model, scratch), (_, ctc), copied, has_frames, _ = experts
    contexts, stops = scratch[3], model[5]
    state, spans, _, count = copied
    tokens[start], parents[start], depths[start], ancestors[start] = rows[0][row, 0], -1, 0, 1
    scores[start], sources[start] = 1.0, 0
    asked[5][row] = 0
    if most <= 1:
        return np.int64(1)
    for order in range(MAX_ORDER):
        contexts[0, order] = rows[0][row, order]
    if has_frames:
        frames_of.begin(ctc[0], ctc[1])
    count[0] = match(row, np.int64(SPANS), state, spans[0], spans[1])
    for span in range(count[0]):
        spans[2][span] = spans[3][span] = 0
    floor = limits[CUT] / most
    size: Index = np.int64(1)
    while size < most:
        newest, at = size - 1, start + size - 1
        pool[7][newest] = -1.0
        is_last = newest > 0 and stops[row, tokens[at]]  # nothing is won behind the end of an answer
        if depths[at] < limits[MAX_DEPTH] and not is_last:
            place = (np.int64(depths[at]), tokens[at], floor / scores[at])
            _open(newest, row, place, experts, worth, limits, pool)
            _offer(newest, np.float64(scores[at]), pool)
        parent: Index = np.int64(0)
        for node in range(1, size):
            if pool[7][node] > pool[7][parent]:
                parent = np.int64(node)
        if pool[7][parent] <= 0.0:
            break
        choice, at, above = pool[8][parent], start + size, start + parent
        token = pool[0][parent, choice]
        tokens[at], parents[at], depths[at] = token, parent, depths[above] + 1
        ancestors[at] = ancestors[above] | (np.int64(1) << np.int64(size))
        scores[at] = pool[7][parent]
        cell, span_cell = pool[3][parent, choice], pool[4][parent, choice]
        is_predicted = False
        if span_cell >= 0:
            for span in range(count[0]):
                if spans[2][span] == parent and spans[0][span] < state[3][row, BEGIN]:
                    is_predicted = is_predicted or guess(row, spans[0][span], spans[3][span], state) == token
        sources[at] = _source(cell, is_predicted)
        contexts[size, 0] = token
        for order in range(1, MAX_ORDER):
            contexts[size, order] = contexts[parent, order - 1]
        if has_frames:
            frames_of.extend(size, parent, pool[5][parent, choice], ctc[0], ctc[1])
        _advance(size, parent, row, token, copied)
        asked[0][row, size], asked[1][row, size] = token, parent
        asked[2][row, size], asked[3][row, size] = cell, span_cell
        asked[4][row, size] = pool[1][parent, choice]
        for part in range(2):
            asked[6][row, size, part] = pool[10][parent, choice, part]
        pool[2][parent, choice] = 0.0
        _offer(parent, np.float64(scores[above]), pool)
        size += 1
    asked[5][row] = size
    return size


@compiled
def best_first(
    batch: Int32, max_nodes: Int32, first: Index, guesses: Any, experts: Any, learned: Any, limits: Float64, out: Packed
) -> None:
    """One tree per row of `batch` [R], written as trees first, first + 1, ... of `out`.

    Args: `guesses` is (what the head says of the rows, whether it knows them [R]); `experts` (tri-gram: rows, model,
    scratch; CTC: model, scratch; copied: texts, spans, rates, count [1]); `learned` (worth, trust, asked, pool).
    """
    said, has_frames = guesses
    trigram, ctc, copied = experts
    worth, trust, asked, pool = learned
    row_starts = out[6]
    for index in range(batch.size):
        start = np.int64(row_starts[first + index])
        if has_frames[index]:
            scratch = ctc[1]
            frames_of.choose(np.int64(index), said, ctc[0][1][frames_of.SHARE], scratch[3], scratch[0])
        told = (trigram, ctc, copied, has_frames[index], trust)
        most = np.int64(min(max_nodes[index], MAX_TREE_NODES))
        size = _grow(np.int64(batch[index]), most, start, told, worth, limits, asked, pool, out)
        row_starts[first + index + 1] = start + size


@compiled
def learn(
    batch: Int32, starts: Int32, tokens: Int64, asked: Asked, rates: Rates, worth: Worth, trust: Trust, decays: Float64
) -> None:
    """News of a whole step: row batch[r] won tokens[starts[r] : starts[r + 1]].

    A node whose parent came true was put to the test: its cells count whether it came true as well. `decays` [2] is
    what is left of a cell after one node, for spans and for estimates.
    """
    for index in range(batch.size):
        row = np.int64(batch[index])
        size, node = asked[5][row], 0
        if size <= 1:
            continue
        for place in range(starts[index], starts[index + 1]):
            reached = -1
            for child in range(node + 1, size):
                if asked[1][row, child] == node:
                    is_true = 1.0 if asked[0][row, child] == tokens[place] else 0.0
                    cell, span_cell = asked[2][row, child], asked[3][row, child]
                    worth[cell, 0] = worth[cell, 0] * decays[1] + is_true
                    worth[cell, 1] = worth[cell, 1] * decays[1] + asked[4][row, child]
                    if span_cell >= 0:
                        observe(rates, span_cell, is_true > 0.0, decays[0])
                    if is_true > 0.0:
                        reached = child
            is_silent = reached >= 0 and asked[6][row, reached, 1] == _SILENT
            for part in range(0 if is_silent else 2):
                given = asked[6][row, reached, part] if reached >= 0 else 0.0
                trust[row, part] = trust[row, part] * _MEMORY - math.log(max(given, _LEAST_GIVEN))
            if reached < 0:
                break
            node = reached
        asked[5][row] = 0
