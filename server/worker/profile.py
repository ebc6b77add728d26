"""What a step costs on this machine: trial steps of rising size, before anybody is served."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from drafters.base import Source
from server.worker.apart import is_device_lost
from server.worker.loop import Judge
from server.worker.roster import Roster
from server.worker.step_cost import StepSample
from verifier.plan import MAX_TREE_NODES, NOTHING, Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.tree import DraftTrees

logger = logging.getLogger(__name__)

LIMIT_S = 2.0
"""Measuring takes about so long. A slow model is measured at fewer sizes and less often."""
_FIRST_TURN = 2.0
"""The first turn may take so many times the limit: a size that is not measured is guessed from smaller ones."""
_NUM_TURNS = 5
"""The sizes take turns, so that a busy moment spoils one trial of some sizes and not all trials of one."""
_MOST_WON = MAX_TREE_NODES.bit_length()
"""A trial tree is binary: a row wins no more tokens in a step than it has levels."""
_ROWS = (1, 8, 32)
_LONGEST_S = 0.1
"""Sizes beyond one that takes so long are guessed: somebody may wait for the end of a turn, which is two such steps."""
_SLOW = 1 / 40
"""A step of one position that takes this part of the limit is slow: every other size is left out."""


T = TypeVar("T")
Turns = Generator[None, None, T]
"""Work that is done a turn at a time, and what comes of it."""


def finish(turns: Turns[T]) -> T:
    """Do all turns, one after the other."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            found: T = end.value
            return found


def measure_steps(judge: Judge, roster: Roster, vocab_size: int, limit_s: float = LIMIT_S) -> Turns[list[StepSample]]:
    """The fastest of some steps of each size: 1, 2, 4, ... positions in one row, then in several.

    `limit_s` bounds the time in which another trial may begin; the first one of each size has a little more. Nobody
    may be running during a turn, which is one trial. A size that would take long, or raises, is left out, and all
    larger ones: a step of it, if there ever is one, runs apart. Returns nothing where not even one row of two tokens
    fits. Raises: what the judge raises when the device is lost.
    """
    bench = _Bench(judge, roster, vocab_size)
    bench.time(1, 1)  # what is made on first use is not to be measured
    alone_s = bench.time(1, 1)
    stride = 2 if alone_s is not None and alone_s > _SLOW * limit_s else 1
    sizes = [size for size in _ladder(roster) if size[1].bit_length() % stride == stride - 1]
    best: dict[tuple[int, int], float] = {}
    spent_s = 0.0
    for turn in range(_NUM_TURNS):
        for place, (num_rows, size) in enumerate(sizes):
            yield
            began = perf_counter()
            if spent_s > limit_s and (turn or (spent_s > _FIRST_TURN * limit_s and len(best) > 1)):
                break
            try:
                seconds = bench.time(num_rows, size)
            except Exception as error:
                if is_device_lost(error):
                    raise
                logger.warning("a trial step of %d x %d positions failed: %s", num_rows, size, error)
                sizes = sizes[:place]
                break
            spent_s += perf_counter() - began
            if seconds is not None:
                best[num_rows, size] = min(seconds, best.get((num_rows, size), seconds))
            if seconds is not None and seconds > _LONGEST_S and len(best) > 1:
                sizes = sizes[: place + 1]
                break
    return [StepSample(num_rows * size, num_rows, seconds) for (num_rows, size), seconds in sorted(best.items())]


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
    """Runs steps for nobody. While a size is measured it owns rows 0, 1, ... and their pages."""

    def __init__(self, judge: Judge, roster: Roster, vocab_size: int) -> None:
        self._judge, self._roster, self._vocab_size = judge, roster, vocab_size
        self._trees = DraftTrees.allocate(roster.limits.max_rows)
        self._rows: list[_Row] = []

    def time(self, num_rows: int, size: int) -> float | None:
        """Seconds of a step of `num_rows` trees of `size` nodes each; None if they do not fit."""
        assert not self._roster.running, "a step is measured alone"
        length = min(2 + 2 * _MOST_WON + size, self._roster.limits.context_len)
        if length < 2 + size or not self._seat(num_rows, length):
            return None
        try:
            self._start(length)
            self._step(size)  # the caches
            if max(len(row.tokens) for row in self._rows) - 1 + size > length:
                return None
            began = perf_counter()
            self._step(size)
            return perf_counter() - began
        finally:
            self._release()

    def _seat(self, num_rows: int, length: int) -> bool:
        """Give rows of two tokens room for `length`; False if there is none."""
        size = self._roster.limits.page_size
        num_pages = -(-length // size)
        pages = self._roster.book.take(num_rows * num_pages)
        if pages is None:
            return False
        tokens = [1 % self._vocab_size, 2 % self._vocab_size]
        self._rows = [_Row([*tokens], pages[row * num_pages : (row + 1) * num_pages]) for row in range(num_rows)]
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
        """Leave nothing behind."""
        for row in self._rows:
            self._roster.book.release(row.pages)
        self._roster.free_rows(range(len(self._rows)))
        self._rows = []
