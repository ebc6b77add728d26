"""One tree from several guesses, compiled: tri-gram, CTC frames and copied spans, asked at every node of the tree.

What they say together (drafters.combine) is multiplied by what such estimates were worth lately (drafters.calibration).
The tree then takes the node of highest cumulative estimate that it can still grow.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters.base import Float32, Int32, Int64, Source
from drafters.calibration import (
    LEAST_RATE,
    NOISY,
    Asked,
    Calibration,
    estimate_cell,
    share_of_head,
    worth_of,
)
from drafters.combine import (
    Copied,
    Opening,
    Pool,
    Spans,
    advance_spans,
    find_spans,
    hear_frames,
    hear_spans,
    hear_trigram,
    offer,
    pool_estimates,
)
from drafters.compiled import Index, compiled, inlined
from drafters.head import frames as frames_of
from drafters.ngram.cache import MAX_ORDER
from drafters.ngram.search import couple
from drafters.rates import survival
from verifier.plan import MAX_TREE_NODES

Float64 = NDArray[np.float64]

_SOURCES = (int(Source.TRIGRAM), int(Source.CTC), int(Source.SUFFIX), int(Source.PREDICTION))
_NOISE_REACH = 0.25
"""At temperature > 0 noise lifts what is unlikely: so much less is worth a look."""


class Limits(NamedTuple):
    """How trees are merged."""

    max_depth: int
    cut: float
    """Scores below cut / max_nodes are not worth a look."""
    reach: float
    """How much the noise counts in a coupled ranking at temperature 1."""
    floor: float
    """What an estimate is taken to give to what it does not list."""
    powers: Float64  # [2, 2, 2] of tri-gram and CTC estimate: temperature 0 or above, right behind the root or deeper


class Memory(NamedTuple):
    """What the drafter keeps for its trees."""

    calibration: Calibration
    asked: Asked
    limits: Limits
    pool: Pool
    spans: Spans

    def bare(self) -> tuple[Any, ...]:
        """The same without names: each record costs most of a microsecond at the door of compiled code, and nothing
        inside, where they are named again."""
        return tuple(tuple(record) for record in self)


class Batch(NamedTuple):
    """Rows that are to get a tree, and what the head says of the A of them that may have more than one node."""

    rows: Int32  # [R]
    max_nodes: Int32  # [R]
    guess: frames_of.Guess
    is_known: NDArray[np.bool_]  # [A] whether the head knows the row


class Packed(NamedTuple):
    """The arrays of DraftTrees."""

    tokens: Int64  # [capacity]
    parents: Int32  # [capacity]
    depths: Int32  # [capacity]
    ancestors: Int64  # [capacity]
    scores: Float32  # [capacity]
    sources: NDArray[np.int8]  # [capacity]
    row_starts: Int32  # [max_rows + 1]


class Work(NamedTuple):
    """All that a tree is made from, inside compiled code."""

    trigram: Any
    """Rows, model and scratch of drafters.ngram.search."""
    ctc: Any
    """Model and scratch of drafters.head.frames."""
    copied: Copied
    calibration: Calibration
    asked: Asked
    limits: Limits
    pool: Pool


class Task(NamedTuple):
    """One tree to be made."""

    row: Index
    most: Index
    """Nodes it may have."""
    start: Index
    """Its first place in the packed arrays."""
    has_frames: bool


@compiled
def _open(opening: Opening, has_frames: bool, work: Work) -> None:
    """Find what may follow a node."""
    node, depth, temperature = opening.node, opening.depth, opening.temperature
    pool, calibration, limits = work.pool, work.calibration, work.limits
    pool.sizes[node] = 0
    hear_trigram(opening, work.trigram, pool)
    is_heard = has_frames and hear_frames(opening, work.ctc, pool)
    share = share_of_head(opening.row, calibration) if is_heard else -1.0
    powers = limits.powers[1 if temperature > 0.0 else 0, 1 if depth > 0 else 0]
    pool_estimates(opening, share, limits.floor, powers, pool)
    hear_spans(opening, not is_heard, work.copied, pool)
    size = pool.sizes[node]
    for index in range(size):
        pool.marks[pool.tokens[node, index]] = -1
    if temperature > 0.0:
        _, lengths, seeds, _, _ = work.trigram[0]
        draw = (seeds[opening.row], lengths[opening.row] + depth)
        reach = limits.reach * math.sqrt(min(1.0, temperature))
        couple(pool.tokens[node, :size], pool.estimates[node, :size], draw, 1.0, 1.0, reach)
    for index in range(size):
        estimate = pool.estimates[node, index]
        kind = pool.cells[node, index] + (NOISY if temperature > 0.0 else 0)
        cell = estimate_cell(kind, depth + 1, estimate)
        pool.cells[node, index] = cell
        pool.chances[node, index] = min(0.999, estimate * worth_of(cell, calibration))


@inlined
def _source(parent: Index, choice: Index, is_predicted: bool, work: Work) -> Index:
    """Who is to be named for a candidate: the one that gives most to it."""
    span_cell, alone = work.pool.span_cells[parent, choice], work.pool.alone[parent, choice]
    if span_cell >= 0 and survival(work.calibration.rates, span_cell, LEAST_RATE) >= alone[2]:
        return _SOURCES[3] if is_predicted else _SOURCES[2]
    return _SOURCES[1] if alone[1] > alone[0] else _SOURCES[0]


@inlined
def _plant(task: Task, work: Work, out: Packed) -> None:
    """The root, and where every part begins."""
    tails, scratch, start = work.trigram[0][0], work.trigram[2], task.start
    out.tokens[start], out.parents[start], out.depths[start] = tails[task.row, 0], -1, 0
    out.ancestors[start], out.scores[start], out.sources[start] = 1, 1.0, 0
    work.asked.sizes[task.row] = 0
    if task.most > 1:
        contexts = scratch[3]
        for order in range(MAX_ORDER):
            contexts[0, order] = tails[task.row, order]
        if task.has_frames:
            frames_of.begin(work.ctc[1][0], work.ctc[1][1])
        find_spans(task.row, work.copied)


@inlined
def _reach(node: Index, floor: float, task: Task, work: Work, out: Packed) -> None:
    """The tree has come to `node`: see what may follow, if anything may."""
    rows, model, _ = work.trigram
    stops, at = model[5], task.start + node
    work.pool.scores[node] = -1.0
    is_last = node > 0 and stops[task.row, out.tokens[at]]  # nothing is won behind the end of an answer
    if out.depths[at] < work.limits.max_depth and not is_last:
        temperature = rows[3][task.row]
        heat = max(1.0, temperature / work.ctc[0][1][frames_of.MAX_HEAT]) if task.has_frames else 1.0
        floor /= out.scores[at]
        if temperature > 0.0:
            floor *= _NOISE_REACH
        depth, token = np.int64(out.depths[at]), out.tokens[at]
        opening = Opening(node, task.row, depth, token, temperature, heat, 0.5 * floor)
        _open(opening, task.has_frames, work)
        offer(node, np.float64(out.scores[at]), work.pool)


@inlined
def _add(node: Index, parent: Index, task: Task, work: Work, out: Packed) -> None:
    """The best candidate of `parent` becomes `node`."""
    pool, asked, row, at, above = work.pool, work.asked, task.row, task.start + node, task.start + parent
    choice = pool.choices[parent]
    token, cell, span_cell = pool.tokens[parent, choice], pool.cells[parent, choice], pool.span_cells[parent, choice]
    is_predicted = advance_spans(row, parent, node, token, work.copied)
    out.tokens[at], out.parents[at], out.depths[at] = token, parent, out.depths[above] + 1
    out.ancestors[at] = out.ancestors[above] | (np.int64(1) << np.int64(node))
    out.scores[at], out.sources[at] = pool.scores[parent], _source(parent, choice, is_predicted, work)
    contexts = work.trigram[2][3]
    contexts[node, 0] = token
    for order in range(1, MAX_ORDER):
        contexts[node, order] = contexts[parent, order - 1]
    if task.has_frames:
        frames_of.extend(node, parent, pool.spellings[parent, choice], work.ctc[1][0], work.ctc[1][1])
    asked.tokens[row, node], asked.parents[row, node] = token, parent
    asked.cells[row, node], asked.span_cells[row, node] = cell, span_cell
    asked.estimates[row, node] = pool.estimates[parent, choice]
    for part in range(3):
        asked.alone[row, node, part] = pool.alone[parent, choice, part]
    pool.chances[parent, choice] = 0.0
    offer(parent, np.float64(out.scores[above]), pool)


@compiled
def _grow(task: Task, work: Work, out: Packed) -> Index:
    """One tree. Returns its size."""
    _plant(task, work, out)
    if task.most <= 1:
        return np.int64(1)
    scores = work.pool.scores
    floor = work.limits.cut / task.most
    size: Index = np.int64(1)
    while size < task.most:
        _reach(size - 1, floor, task, work, out)
        parent: Index = np.int64(0)
        for node in range(1, size):
            if scores[node] > scores[parent]:
                parent = np.int64(node)
        if scores[parent] <= 0.0:
            break
        _add(size, parent, task, work, out)
        size += 1
    work.asked.sizes[task.row] = size
    return size


@inlined
def _work(experts: Any, memory: Any) -> Work:
    """The bare tuples of `best_first` by name."""
    trigram, ctc, texts = experts
    held = Memory(*memory)
    calibration = Calibration(*held.calibration)
    copied = Copied(texts, calibration.rates, Spans(*held.spans))
    return Work(trigram, ctc, copied, calibration, Asked(*held.asked), Limits(*held.limits), Pool(*held.pool))


@compiled
def best_first(held_batch: Any, first: Index, experts: Any, memory: Any, held_out: Any) -> None:
    """One tree per row of the batch, written as trees first, first + 1, ... of the packed arrays.

    Args: `held_batch`, `held_out`, the bare tuples of Batch and Packed; `experts` (tri-gram: rows, model, scratch;
    CTC: model, scratch; texts), `memory`, Memory.bare.
    """
    work, batch, out = _work(experts, memory), Batch(*held_batch), Packed(*held_out)
    (_, limits), scratch = work.ctc
    asked: Index = np.int64(0)
    for index in range(batch.rows.size):
        start, has_frames = np.int64(out.row_starts[first + index]), False
        most = np.int64(min(batch.max_nodes[index], MAX_TREE_NODES))
        if most > 1:
            has_frames = bool(batch.is_known[asked])
            if has_frames:
                frames_of.choose(asked, batch.guess, limits[frames_of.SHARE], scratch[3], scratch[0])
            asked += 1
        task = Task(np.int64(batch.rows[index]), most, start, has_frames)
        out.row_starts[first + index + 1] = start + _grow(task, work, out)
