"""The one tree search: best-first over all sources of a row, a whole batch in one compiled call.

At every node each source of the row's mask names candidates; they become one calibrated estimate (drafters.combine,
drafters.calibration). The tree then takes the node of highest cumulative estimate that it can still grow. So no tree of
its size is expected to win more, but for the exploration bonus, what is too unlikely to look for (_CUT) and MAX_DEPTH.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafters import COPY, HEAD, NGRAM
from drafters.base import Float32, Float64, Int32, Int64, Source
from drafters.calibration import share_of_head, survival
from drafters.candidates import SPANS, offer
from drafters.combine import advance_spans, finish, pool_estimates, powers_of, score_spans
from drafters.compiled import Index, Records, compiled, inlined
from drafters.copy import Texts, match
from drafters.head.frames import choose, extend, score_frames
from drafters.ngram.backoff import Ngram, expand
from drafters.ngram.cache import MAX_ORDER
from drafters.rows import is_stop, token_back
from verifier.plan import MAX_TREE_NODES

MAX_DEPTH = 24
"""Deepest node. Without a bound one sure chain behind an unlikely word takes all nodes of a large tree."""
_CUT = 0.25
"""Candidates that would score below this part of 1 / nodes are not looked for: they would hardly get into the tree."""
_NOISE_REACH = 0.1
"""At temperature > 0 noise lifts what is unlikely: so much less is worth a look."""
_SILENT_RIVALS, _NOISY_RIVALS = 4.0, 16.0
_SOURCES = (int(Source.TRIGRAM), int(Source.CTC), int(Source.SUFFIX), int(Source.PREDICTION))


class Memory(NamedTuple):
    """What the drafter keeps for its trees."""

    rows: Records  # [rows] drafters.rows.ROW
    asked: Records  # [rows] drafters.calibration.ASKED
    worth: Float64  # [NUM_CELLS, 2]
    rates: Float64  # [8, SPAN_CELLS, 2]
    found: Records  # [1] drafters.candidates.CANDIDATES
    frames: Records  # [1] drafters.head.frames.FRAMES
    marks: Int64  # [V] all -1 between trees


class HeadWords(NamedTuple):
    """What the head says of this batch."""

    names: Int64  # [1 or A, C]
    shares: Float32  # [A, T, C + 1]
    places: Int64  # [R] which of the A each row of the batch is, -1 for none
    before: Float32  # [V, rank] the bias of the previous token
    after: Float32  # [V, rank]


class Packed(NamedTuple):
    """The arrays of DraftTrees."""

    tokens: Int64  # [capacity]
    parents: Int32  # [capacity]
    depths: Int32  # [capacity]
    ancestors: Int64  # [capacity]
    scores: Float32  # [capacity]
    sources: NDArray[np.int8]  # [capacity]
    row_starts: Int32  # [max_rows + 1]


class Batch(NamedTuple):
    """Rows that are to get a tree."""

    rows: Int32  # [R]
    max_nodes: Int32  # [R]
    first: int
    """Index of the first tree in the packed arrays."""
    allowed: int
    """Sources that may draft now."""
    exploration: tuple[float, float]
    """How much n-grams seen seldom are favoured at temperature 0, without a head and with one: 0 for not at all."""


class Task(NamedTuple):
    """One tree to be made."""

    row: Index
    mask: Index
    """Sources that draft it."""
    most: Index
    """Nodes it may have."""
    start: Index
    """Its first place in the packed arrays."""
    exploration: Any


@inlined
def _plant(task: Task, record: Any, asked: Any, texts: Texts, found: Any, out: Packed) -> None:
    """The root, and where every source begins."""
    start = task.start
    out.tokens[start], out.parents[start], out.depths[start] = token_back(record, 0), -1, 0
    out.ancestors[start], out.scores[start], out.sources[start] = 1, 1.0, 0
    asked.size, asked.mask = 0, task.mask
    for order in range(MAX_ORDER):
        found.contexts[0, order] = token_back(record, order)
    found.num_spans = 0
    if task.mask & COPY and task.most > 1:
        found.num_spans = match(task.row, np.int64(SPANS), texts, found.span_starts, found.span_lengths)
        for span in range(found.num_spans):
            found.span_nodes[span] = found.span_offsets[span] = 0


@inlined
def _open(
    node: Index, depth: Index, floor: Any, task: Task, memory: Memory, ngram: Ngram, texts: Texts, head: HeadWords
) -> None:  # fmt: skip
    """Find what may follow a node."""
    record, asked = memory.rows[task.row], memory.asked[task.row]
    found, frames, marks = memory.found[0], memory.frames[0], memory.marks
    is_noisy = record.temperature > 0.0
    found.sizes[node] = 0
    if task.mask & NGRAM:
        expand(node, (task.row, record.tenant_cache), floor, ngram, found, marks)
        for index in range(found.sizes[node]):
            found.cells[node, index] = NGRAM
    is_heard = False
    if task.mask & HEAD:
        is_heard = score_frames(node, found.contexts[node, 0], floor, frames, (head.before, head.after), found, marks)
    share = share_of_head(asked) if is_heard else -1.0
    powers = powers_of(record, task.mask, depth, share)
    # The frames' own law is exact: what they do not list counts in full. N-gram counts are sharpened at temperature 0.
    rivals = _SILENT_RIVALS if task.mask & NGRAM and not is_noisy else _NOISY_RIVALS
    pool_estimates(node, powers, rivals, not is_heard, found)
    if found.num_spans > 0:
        place = (node, task.row, depth)
        score_spans(place, is_noisy, not is_heard, memory.rates[task.mask], texts, found, marks)
    for index in range(found.sizes[node]):
        marks[found.tokens[node, index]] = -1
    finish(node, depth, task.mask, task.exploration, record, memory.worth, found)


@inlined
def _source(parent: Index, choice: Index, is_predicted: bool, rates: Float64, found: Any) -> Index:
    """Which source is to be named for a candidate: the one that gives most to it."""
    cell = found.span_cells[parent, choice]
    if cell >= 0 and survival(rates, cell) >= found.alone[parent, choice, 2]:
        return _SOURCES[3] if is_predicted else _SOURCES[2]
    return _SOURCES[1] if found.alone[parent, choice, 1] > found.alone[parent, choice, 0] else _SOURCES[0]


@inlined
def _add(node: Index, parent: Index, task: Task, memory: Memory, texts: Texts, out: Packed) -> None:
    """Write node `node` of the tree, the best candidate of `parent`, and let every source go along."""
    found, asked, at, above = memory.found[0], memory.asked[task.row], task.start + node, task.start + parent
    choice = found.choices[parent]
    token = found.tokens[parent, choice]
    is_predicted = found.num_spans > 0 and advance_spans(task.row, parent, node, token, texts, found)
    out.tokens[at], out.parents[at], out.depths[at] = token, parent, out.depths[above] + 1
    out.ancestors[at] = out.ancestors[above] | (np.int64(1) << np.int64(node))
    out.scores[at] = out.scores[above] * found.chances[parent, choice]
    out.sources[at] = _source(parent, choice, is_predicted, memory.rates[task.mask], found)
    found.contexts[node, 0] = token
    for order in range(1, MAX_ORDER):
        found.contexts[node, order] = found.contexts[parent, order - 1]
    if task.mask & HEAD:
        extend(node, parent, found.spellings[parent, choice], memory.frames[0])
    asked.tokens[node], asked.parents[node] = token, parent
    asked.cells[node], asked.span_cells[node] = found.cells[parent, choice], found.span_cells[parent, choice]
    asked.estimates[node] = found.estimates[parent, choice]
    for part in range(3):
        asked.alone[node, part] = found.alone[parent, choice, part]
    found.ranks[parent, choice] = 0.0
    offer(parent, np.float64(out.scores[above]), found)


@inlined
def _grow(task: Task, memory: Memory, ngram: Ngram, texts: Texts, head: HeadWords, out: Packed) -> Index:
    """One tree. Returns its size.

    The best of at most 64 offers is found by looking at all of them, which beats a heap at this size.
    """
    record, asked, found = memory.rows[task.row], memory.asked[task.row], memory.found[0]
    _plant(task, record, asked, texts, found, out)
    size: Index = np.int64(1)
    while size < task.most:
        newest, at = size - 1, task.start + size - 1
        is_last = newest > 0 and is_stop(record, out.tokens[at])  # nothing is won behind the end of an answer
        if is_last or out.depths[at] >= MAX_DEPTH:
            found.offers[newest] = -1.0
        else:
            floor = _CUT / task.most / out.scores[at]
            if record.temperature > 0.0:
                floor *= _NOISE_REACH
            _open(newest, np.int64(out.depths[at]), floor, task, memory, ngram, texts, head)
            offer(newest, np.float64(out.scores[at]), found)
        parent: Index = np.int64(0)
        for node in range(1, size):
            if found.offers[node] > found.offers[parent]:
                parent = np.int64(node)
        if found.offers[parent] <= 0.0:
            break
        _add(size, parent, task, memory, texts, out)
        size += 1
    asked.size = size
    return size


@compiled
def best_first(
    held_batch: Any, held_memory: Any, held_ngram: Any, held_texts: Any, held_head: Any, held_out: Any
) -> None:
    """One tree per row of the batch, written as trees first, first + 1, ... of the packed arrays.

    Args: the bare tuples of Batch, Memory, Ngram, Texts, HeadWords and Packed: a record costs most of a microsecond at
    the door of compiled code, and nothing inside, where it gets its names again.
    """
    batch, memory, out = Batch(*held_batch), Memory(*held_memory), Packed(*held_out)
    ngram, texts, head = Ngram(*held_ngram), Texts(*held_texts), HeadWords(*held_head)
    for index in range(batch.rows.size):
        row, start = np.int64(batch.rows[index]), np.int64(out.row_starts[batch.first + index])
        mask = memory.rows[row].mask & batch.allowed
        if head.places[index] >= 0 and mask & HEAD:
            choose(head.places[index], head.names, head.shares, memory.frames[0], memory.marks)
        else:
            mask &= ~HEAD
        most = np.int64(min(batch.max_nodes[index], MAX_TREE_NODES))
        bonus = batch.exploration[1 if mask & HEAD else 0]
        if mask & NGRAM == 0 or memory.rows[row].temperature > 0.0:
            bonus = 0.0  # copied words are never counted; beside noise it was not measured
        task = Task(row, mask, most, start, bonus)
        out.row_starts[batch.first + index + 1] = start + _grow(task, memory, ngram, texts, head, out)
