"""What a step costs on this machine: trial steps of rising size, before anybody is served."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from drafters.base import Source
from server.worker.apart import is_device_lost
from server.worker.cost import Sample, StepCost
from server.worker.loop import Judge
from server.worker.roster import Roster
from verifier.plan import MAX_TREE_NODES, NOTHING, Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.tree import DraftTrees

logger = logging.getLogger(__name__)

LIMIT_S = 1.5
"""Measuring takes about so long; a slow model is measured at fewer sizes, some at least."""
_NUM_REPEATS = 5
_LEAST_REPEATS = 2
_POINT_SHARE = 0.1
"""Part of the limit after which a size is not repeated any more."""
_ROWS = (1, 8, 32)
_SLOW = 1 / 40
"""A step of one position that takes this part of the limit is slow: every other size is left out."""


def measure_steps(judge: Judge, roster: Roster, vocab_size: int, limit_s: float = LIMIT_S) -> StepCost | None:
    """Time steps of 1, 2, 4, ... positions in one row, then in several, by their medians.

    `limit_s` bounds the time in which another size may begin. Nobody may be running. A size that raises ends the
    measurement: a step of it, if there ever is one, runs apart. Returns None where not even one row of two tokens fits.
    Raises: what the judge raises when the device is lost.
    """
    assert not roster.running, "a step is measured alone"
    bench = _Bench(judge, roster, vocab_size)
    bench.time(1, 1, 0.0)  # what is made on first use is not to be measured
    began = perf_counter()
    samples: list[Sample] = []
    stride = 1
    for num_rows, size in _ladder(roster):
        is_due = perf_counter() - began < limit_s
        if not is_due and len({sample.num_positions for sample in samples}) > 1:
            break
        if stride > 1 and size.bit_length() % stride == 0:
            continue
        try:
            seconds = bench.time(num_rows, size, _POINT_SHARE * limit_s)
        except Exception as error:
            if is_device_lost(error):
                raise
            logger.warning("a trial step of %d x %d positions failed: %s", num_rows, size, error)
            break
        if seconds is None:
            continue
        if not samples and seconds > _SLOW * limit_s:
            stride = 2
        samples.append(Sample(num_rows * size, num_rows, seconds))
    bench.end()
    return StepCost.fit(samples, roster.limits.max_batched_tokens) if samples else None


def _ladder(roster: Roster) -> list[tuple[int, int]]:
    """(rows, nodes of each tree), small steps first: every size that there is for a single row and for several."""
    limits, sizes = roster.limits, [2**power for power in range(MAX_TREE_NODES.bit_length())]
    fitting = [
        (num_rows * size, num_rows, size)
        for num_rows in _ROWS
        for size in sizes
        if num_rows <= limits.max_rows and num_rows * size <= limits.max_batched_tokens
    ]
    return [(num_rows, size) for _, num_rows, size in sorted(fitting)]


@dataclass(slots=True)
class _Row:
    """The text of a trial row and where it lies."""

    tokens: list[int]
    pages: list[int]


class _Bench:
    """Runs steps for nobody. Owns its rows, 0, 1, ... and, while a size is measured, their pages."""

    def __init__(self, judge: Judge, roster: Roster, vocab_size: int) -> None:
        self._judge, self._roster, self._vocab_size = judge, roster, vocab_size
        self._trees = DraftTrees.allocate(roster.limits.max_rows)
        self._rows: list[_Row] = []
        self._num_used = 0

    def time(self, num_rows: int, size: int, limit_s: float) -> float | None:
        """Seconds of a step of `num_rows` trees of `size` nodes each; None if they do not fit."""
        length = min(2 + (_NUM_REPEATS + 1) * 2 + size, self._roster.limits.context_len)
        if length < 2 + size or not self._seat(num_rows, length):
            return None
        try:
            times = self._times(size, length, limit_s)
        finally:
            self._release()
        return median(times) if times else None

    def _times(self, size: int, length: int, limit_s: float) -> list[float]:
        """Seconds of some steps, as many as fit into `limit_s` and into rows of `length`."""
        self._start(length)
        self._step(size)  # what is made on first use, and the caches
        times: list[float] = []
        while len(times) < _NUM_REPEATS and (len(times) < _LEAST_REPEATS or sum(times) < limit_s):
            if max(len(row.tokens) for row in self._rows) - 1 + size > length:
                break
            began = perf_counter()
            self._step(size)
            times.append(perf_counter() - began)
        return times

    def _seat(self, num_rows: int, length: int) -> bool:
        """Give rows of two tokens room for `length`; False if there is none."""
        size = self._roster.limits.page_size
        num_pages = -(-length // size)
        pages = self._roster.book.take(num_rows * num_pages)
        if pages is None:
            return False
        tokens = [1 % self._vocab_size, 2 % self._vocab_size]
        self._rows = [_Row([*tokens], pages[row * num_pages : (row + 1) * num_pages]) for row in range(num_rows)]
        self._num_used = max(self._num_used, num_rows)
        return True

    def _start(self, length: int) -> None:
        """Run the first token of every row."""
        sampling = SamplingParams(max_tokens=length, seed=1, temperature=0.0)
        rows = list(enumerate(self._rows))
        self._trees.clear()
        plan = StepPlan(
            starts=tuple(RowStart(row, tuple(one.tokens), len(one.tokens), sampling) for row, one in rows),
            stops=tuple(row for row, _ in rows),  # of the last size, or of trial requests
            pages=tuple((row, index, page) for row, one in rows for index, page in enumerate(one.pages)),
            chunks=tuple(Chunk(row, 0, tuple(one.tokens[:1]), False) for row, one in rows),
        )
        self._judge.run(plan, self._trees, NOTHING)

    def _step(self, size: int) -> None:
        """One step with a tree of `size` nodes in every row; the rows go on with what they won."""
        self._trees.clear()
        parents = [(node - 1) // 2 for node in range(size)]
        parents[0] = -1
        sources = [Source.ROOT] + [Source.OTHER] * (size - 1)
        for row in self._rows:
            tokens = [(row.tokens[-1] + node) % self._vocab_size for node in range(size)]
            self._trees.append(tokens, parents, [1.0] * size, sources)
        slots = tuple(TreeSlot(index, len(row.tokens) - 1, size) for index, row in enumerate(self._rows))
        verdict = self._judge.run(StepPlan(trees=slots), self._trees, NOTHING)
        for index, row in enumerate(self._rows):
            won = verdict.tokens[index, : verdict.num_accepted[index] + 1]
            row.tokens += (won % self._vocab_size).tolist()  # those of a row that failed mean nothing

    def _release(self) -> None:
        for row in self._rows:
            self._roster.book.release(row.pages)
        self._rows = []

    def end(self) -> None:
        """Leave nothing behind."""
        self._roster.free_rows(range(self._num_used))
