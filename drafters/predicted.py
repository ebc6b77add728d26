"""The suffix drafter: what followed the last time, copied. Also the seat of OpenAI's `prediction`.

Text that quotes, repeats or edits its prompt comes in long spans that stand there already (prompt look-up decoding,
Saxena, 2023; SuffixDecoding, arXiv 2411.04975). Several spans are merged into one tree, best first by the chance that
a node survives, which is measured as the answers go: by length of the match, depth and temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.base import Drafter, Int32, Int64, News, RowContext, Source
from drafters.compiled import Index, compiled, inlined
from drafters.copy import BEGIN, LENGTH, MAX_MATCHES, SEPARATOR, State, Texts, append, guess, match
from drafters.rates import FLOOR, Rates, cell_of, first_rates, observe, survival
from verifier.plan import MAX_TREE_NODES
from verifier.tree import DraftTrees

Float64 = NDArray[np.float64]
Packed = tuple[Int64, Int32, Int32, Int64, NDArray[np.float32], NDArray[np.int8], Int32]
"""tokens, parents, depths, ancestors, scores, sources, row_starts of DraftTrees."""
Asked = tuple[Int32, Int32, Int32, Int64]
"""By row, what was proposed last: tokens, parents and calibration cells of the nodes [rows, 64], and the number of
nodes [rows]; 0 when there is nothing to learn from."""
Wishes = tuple[NDArray[np.bool_], Int64]
"""By row: whether the noise is on [rows], and the tokens that end the answer [rows, S], SEPARATOR behind the last."""
Scratch = tuple[Int64, Int64, Int64, Int64, Int64, Int64]
"""starts and lengths of the matches [MAX_MATCHES]; of each span the node it has reached and its offset [MAX_MATCHES];
of each node its first child and its next sibling, -1 for none [64]."""

_SUFFIX, _PREDICTION = int(Source.SUFFIX), int(Source.PREDICTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixOptions:
    """What a SuffixDrafter is made from."""

    max_rows: int = 64
    max_depth: int = MAX_TREE_NODES - 1
    spans: int = 4
    """Most matches that one tree is made from."""
    min_score: float = 0.02
    """Nodes less likely than this to be accepted are not proposed."""
    prior: float = 4.0
    """How many observations the first estimate of a survival is worth."""
    decay: float = 0.998
    """What is left of a cell's old observations after a new one."""


class SuffixDrafter(Drafter):
    """Proposes what followed earlier occurrences of the last tokens, in the text so far and in the prediction.

    Owns the texts of its rows, what it asked last, and the calibration. The calibration counts acceptances by length,
    depth and temperature and holds no text, so it is shared between tenants. One thread may call it.
    """

    def __init__(self, options: SuffixOptions | None = None):
        self._options = options = options or SuffixOptions()
        self.max_depth = options.max_depth
        self._texts = Texts(options.max_rows)
        self._limits = np.array([options.max_depth, options.min_score, options.spans, options.decay], np.float64)
        self._rates = first_rates(options.prior)
        self._asked: Asked = _make_asked(self._texts.num_rows)
        self._wishes: Wishes = _make_wishes(self._texts.num_rows, 8)
        self._scratch = make_scratch()

    def start(self, row: int, context: RowContext) -> None:
        """Index prompt and prediction."""
        self._texts.start(row, context)
        self._grow(self._texts.num_rows, len(context.stop_ids))
        self._asked[3][row] = 0
        noisy, stops = self._wishes
        noisy[row] = context.temperature > 0.0
        stops[row] = SEPARATOR
        stops[row, : len(context.stop_ids)] = context.stop_ids

    def read(self, news: News) -> None:
        """Learn how far the last trees were right, and index the new tokens."""
        self._texts.make_room(int(np.diff(news.starts).max(initial=0)))
        learn(
            news.rows, news.starts, news.tokens, self._texts.state, self._asked, self._rates, self._limits,
        )  # fmt: skip

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """One tree per row."""
        packed = (out.tokens, out.parents, out.depths, out.ancestors, out.scores, out.sources, out.row_starts)
        memory = (self._texts.state, self._asked, self._wishes, self._scratch)
        best_first(rows, max_nodes, out.num_rows, memory, self._rates, self._limits, packed)
        out.num_rows += rows.size

    def sizes(self) -> dict[str, int]:
        """The texts of all rows and their index."""
        return {"texts": self._texts.num_bytes}

    def stop(self, row: int) -> None:
        """Forget the row's texts."""
        self._texts.stop(row)
        self._asked[3][row] = 0

    def _grow(self, rows: int, num_stops: int) -> None:
        noisy, stops = self._wishes
        if rows == noisy.size and num_stops <= stops.shape[1]:
            return
        grown = _make_wishes(rows, max(num_stops, stops.shape[1]))
        grown[0][: noisy.size] = noisy
        grown[1][: noisy.size, : stops.shape[1]] = stops
        self._wishes = grown
        asked = _make_asked(rows)
        pairs: Any = zip(asked, self._asked, strict=True)
        for new, old in pairs:
            new[: old.shape[0]] = old
        self._asked = asked


def _make_wishes(rows: int, num_stops: int) -> Wishes:
    return np.zeros(rows, np.bool_), np.full((rows, num_stops), SEPARATOR, np.int64)


def _make_asked(rows: int) -> Asked:
    nodes = (rows, MAX_TREE_NODES)
    return np.zeros(nodes, np.int32), np.zeros(nodes, np.int32), np.zeros(nodes, np.int32), np.zeros(rows, np.int64)


def make_scratch() -> Scratch:
    """Working memory of one search."""
    spans = [np.zeros(MAX_MATCHES, np.int64) for _ in range(4)]
    nodes = [np.zeros(MAX_TREE_NODES, np.int64) for _ in range(2)]
    return spans[0], spans[1], spans[2], spans[3], nodes[0], nodes[1]


@compiled
def _is_stop(row: Index, token: Index, stops: Int64) -> bool:
    for index in range(stops.shape[1]):
        if stops[row, index] == token:
            return True
        if stops[row, index] < 0:
            return False
    return False


@inlined
def _set_root(row: Index, start: Index, token: Index, asked: Asked, scratch: Scratch, out: Packed) -> None:
    tokens, parents, depths, ancestors, scores, sources, _ = out
    tokens[start] = token
    parents[start] = -1
    depths[start] = 0
    ancestors[start] = 1
    scores[start] = 1.0
    sources[start] = 0
    asked[0][row, 0] = token
    asked[1][row, 0] = -1
    scratch[4][0] = -1


@inlined
def _add(
    row: Index, start: Index, node: Index, parent: Index, token: Index, scratch: Scratch, asked: Asked, out: Packed
) -> None:
    """Write node `node` of the tree at `start`: all but score, source and cell."""
    at, above = start + node, start + parent
    out[0][at] = token
    out[1][at] = parent
    out[2][at] = out[2][above] + 1
    out[3][at] = out[3][above] | (np.int64(1) << np.int64(node))
    asked[0][row, node] = token
    asked[1][row, node] = parent
    scratch[4][node] = -1
    scratch[5][node] = scratch[4][parent]
    scratch[4][parent] = node


@inlined
def _settle(span: Index, start: Index, token: Index, scratch: Scratch, out: Packed) -> bool:
    """Whether `token` is already a child of the node that the span has reached; if so, the span goes there."""
    child = scratch[4][scratch[2][span]]
    while child >= 0:
        if out[0][start + child] == token:
            scratch[2][span] = child
            scratch[3][span] += 1
            return True
        child = scratch[5][child]
    return False


@compiled
def _next_of(row: Index, span: Index, start: Index, memory: Any, limits: Float64, out: Packed) -> Index:
    """The next token of a span, after all of its tokens that are in the tree; SEPARATOR when it has ended."""
    state, _, wishes, scratch = memory
    while True:
        node, offset = scratch[2][span], scratch[3][span]
        if offset >= limits[0]:
            return np.int64(SEPARATOR)
        if node > 0 and _is_stop(row, np.int64(out[0][start + node]), wishes[1]):
            return np.int64(SEPARATOR)  # nothing is won behind the end of an answer
        token = guess(row, scratch[0][span], offset, state)
        if token < 0 or not _settle(span, start, token, scratch, out):
            return token


@compiled
def _grow(row: Index, max_nodes: Index, start: Index, memory: Any, rates: Rates, limits: Float64, out: Packed) -> Index:
    """One tree at packed index `start`. Returns its size."""
    state, asked, wishes, scratch = memory
    marks = state[3]
    _set_root(row, start, np.int64(state[0][row, marks[row, LENGTH] - 1]), asked, scratch, out)
    size: Index = np.int64(1)
    if max_nodes <= 1:
        asked[3][row] = size
        return size
    count = match(row, np.int64(limits[2]), state, scratch[0], scratch[1])
    for span in range(count):
        scratch[2][span] = 0
        scratch[3][span] = 0
    while size < max_nodes:
        best, best_cell, best_token = np.int64(-1), np.int64(0), np.int64(0)
        best_score = limits[1]
        for span in range(count):
            token = _next_of(row, np.int64(span), start, memory, limits, out)
            if token < 0:
                continue
            node = scratch[2][span]
            cell = cell_of(
                wishes[0][row], scratch[0][span] < marks[row, BEGIN], scratch[4][node] >= 0, scratch[1][span],
                scratch[3][span] + 1,
            )  # fmt: skip
            score = np.float64(out[4][start + node]) * survival(rates, cell, FLOOR)
            if score > best_score:
                best, best_score, best_cell, best_token = np.int64(span), score, cell, token
        if best < 0:
            break
        _add(row, start, size, scratch[2][best], best_token, scratch, asked, out)
        out[4][start + size] = best_score
        out[5][start + size] = _PREDICTION if scratch[0][best] < marks[row, BEGIN] else _SUFFIX
        asked[2][row, size] = best_cell
        size += 1
    asked[3][row] = size
    return size


@compiled
def best_first(
    batch: Int32, max_nodes: Int32, first: Index, memory: Any, rates: Rates, limits: Float64, out: Packed
) -> None:
    """One tree per row of `batch` [R], written as trees first, first + 1, ... of `out`.

    Every span offers its next token with the score of the node it has reached times the survival of its cell; the best
    offer becomes a node. Spans that say the same share their nodes.
    """
    row_starts = out[6]
    for index in range(batch.size):
        start = np.int64(row_starts[first + index])
        limit = np.int64(min(max_nodes[index], MAX_TREE_NODES))
        size = _grow(np.int64(batch[index]), limit, start, memory, rates, limits, out)
        row_starts[first + index + 1] = start + size


@compiled
def learn(
    batch: Int32, starts: Int32, tokens: Int64, state: State, asked: Asked, rates: Rates, limits: Float64
) -> None:
    """News of a whole step: row batch[r] won tokens[starts[r] : starts[r + 1]].

    A node whose parent came true was put to the test: its cell counts whether it came true as well.
    """
    for index in range(batch.size):
        row = np.int64(batch[index])
        size, node = asked[3][row], 0
        for place in range(starts[index], starts[index + 1]):
            reached = -1
            for child in range(node + 1, size):
                if asked[1][row, child] == node:
                    cell = asked[2][row, child]
                    is_true = asked[0][row, child] == tokens[place]
                    observe(rates, cell, 1.0 if is_true else 0.0, limits[3])
                    if is_true:
                        reached = child
            if reached < 0:
                break
            node = reached
        asked[3][row] = 0
        append(row, tokens[starts[index] : starts[index + 1]], state)
