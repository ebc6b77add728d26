"""The drafters of this worker: which row each serves, and what happens when one of them fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import methodcaller
from time import perf_counter

import numpy as np

from drafters import PLAIN
from drafters.base import Drafter, Int32, News, RowContext, Verified
from server.worker.states import chunk_states, tree_states
from verifier.plan import MAX_TREE_NODES, StepPlan, TreeSlot, Wanted
from verifier.tree import DraftTrees
from verifier.verdict import Hidden, Verdict

logger = logging.getLogger(__name__)


class Effort(IntEnum):
    """How much a step spends on drafting."""

    NONE = 0
    CHEAP = 1
    """The sources that cost next to nothing."""
    FULL = 2
    """All of them, a head's pass too."""


class DraftError(Exception):
    """A drafter broke its contract."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Adjacent trees of one drafter: indices first .. stop - 1."""

    name: str
    first: int
    stop: int


class Drafting:
    """Asks each row's drafter for its tree and tells it what became true.

    A drafter that raises or breaks its contract is replaced by plain decoding for the rows it was called for: a wrong
    or missing guess costs time, never correctness. Owns the drafters, the packed trees of the step, what drafters spent
    on it, and the map from row to drafter.
    """

    def __init__(
        self, drafters: Mapping[str, Drafter], *, max_rows: int, vocab_size: int, is_checked: bool = False
    ) -> None:
        """`is_checked` also checks the shape of every tree, node by node: slow, for debugging and tests."""
        self._drafters = {name: drafter for name, drafter in drafters.items() if name != PLAIN}
        self._vocab_size = vocab_size
        self._is_checked = is_checked
        self._serving = [PLAIN] * max_rows
        self._runs: list[_Run] = []
        self._num_failures = 0
        self._failed: list[int] = []
        self._logged: set[str] = set()
        self._num_candidates = 0
        self._effort = Effort.FULL
        self.is_asleep = False
        """Whether nobody drafts, as their code is not loaded yet. Rows that start meanwhile must be started again."""
        self.hears_states = True
        """Whether drafters with dear sources are told hidden states. They draft worse for what they missed."""
        self.trees = DraftTrees.allocate(max_rows, MAX_TREE_NODES)
        self.spent_s: dict[str, float] = {}
        """Seconds in each drafter since the owner last emptied it."""

    @property
    def drafters(self) -> Mapping[str, Drafter]:
        """All but plain decoding, by name."""
        return self._drafters

    @property
    def names(self) -> tuple[str, ...]:
        """What a request may name."""
        return (PLAIN, *self._drafters)

    def take_failures(self) -> tuple[int, list[int]]:
        """How often drafters failed since the last call, and the rows that lost theirs by it."""
        failures = self._num_failures, self._failed
        self._num_failures, self._failed = 0, []
        return failures

    def start(self, row: int, name: str, context: RowContext) -> None:
        """A request that wants drafter `name` now lives in `row`."""
        self._serving[row] = PLAIN if self.is_asleep else name
        if self._serving[row] != PLAIN:
            self._guard(name, [row], methodcaller("start", row, context))

    def stop(self, row: int) -> None:
        """The row is free."""
        name, self._serving[row] = self._serving[row], PLAIN
        if name != PLAIN:
            self._guard(name, [], methodcaller("stop", row))

    def has_full(self, rows: Sequence[int]) -> bool:
        """Whether full effort differs from cheap effort for one of these rows."""
        names = {self._serving[row] for row in rows} - {PLAIN}
        return any(self._drafters[name].has_cheap for name in names)

    def propose(self, slots: Sequence[TreeSlot], roots: Sequence[int], effort: Effort = Effort.FULL) -> None:
        """Fill `trees` with one tree per slot, in order; roots[i] is the last token of slots[i].row.

        A drafter is not asked for those of its rows, the last ones, that may have a root only.
        """
        self.trees.clear()
        self._effort = effort
        self._num_candidates = 0
        self._runs = list(self._split([slot.row for slot in slots], 0))
        for run in self._runs:
            stop = run.stop
            while stop > run.first and slots[stop - 1].max_nodes == 1:
                stop -= 1
            is_bare = run.name == PLAIN or effort is Effort.NONE or stop == run.first
            if is_bare or not self._propose_run(run, slots, roots, stop):
                stop = run.first
            self.trees.truncate_rows(stop)
            for root in roots[stop : run.stop]:
                self.trees.append_root(root)

    def wanted(self, plan: StepPlan) -> Wanted:
        """What the drafters of the plan's rows want to see of its step, now that the trees are there."""
        tails = [1 for slot in plan.trees if self._window(slot.row)]
        tails += [self._window(chunk.row) for chunk in plan.chunks]
        return Wanted(self._num_candidates, max(tails, default=0))

    def update(self, plan: StepPlan, verdict: Verdict, kept: Sequence[int]) -> None:
        """Tell each drafter the kept[s] tokens that row verdict.rows[s] won. [S]"""
        if not self._drafters:
            return
        if kept:
            self._tell_won(plan, verdict, kept)
        if verdict.hidden is not None:
            self._tell_unfinished(plan, verdict.hidden)

    def _tell_won(self, plan: StepPlan, verdict: Verdict, kept: Sequence[int]) -> None:
        counts = np.asarray(kept, np.int32)
        tokens = verdict.tokens[np.arange(verdict.tokens.shape[1]) < counts[:, None]]
        starts = np.zeros(len(kept) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        num_trees = self.trees.num_rows
        last = [index for index, chunk in enumerate(plan.chunks) if chunk.is_last]
        runs = [*self._runs, *self._split(verdict.rows[num_trees:].tolist(), num_trees)]
        for run in _without_empty(runs, kept):
            rows = verdict.rows[run.first : run.stop]
            # A row may have lost its drafter since the trees were made.
            if run.name == PLAIN or any(self._serving[row] != run.name for row in rows.tolist()):
                continue
            verified = None
            if run.first < num_trees and verdict.candidates is not None and verdict.candidate_logits is not None:
                verified = Verified(self.trees, run.first, verdict.candidates, verdict.candidate_logits)
            hidden = None
            if verdict.hidden is not None and (window := self._window(int(rows[0]))):
                if run.first < num_trees:
                    hidden = tree_states(verdict, self.trees, plan.trees, run.first, counts[run.first : run.stop])
                else:
                    chunks = last[run.first - num_trees : run.stop - num_trees]
                    hidden = chunk_states(verdict.hidden, plan.chunks, chunks, window)
            news = News(
                rows=rows,
                starts=starts[run.first : run.stop + 1] - starts[run.first],
                tokens=tokens[starts[run.first] : starts[run.stop]],
                verified=verified,
                hidden=hidden,
            )
            self._guard(run.name, rows.tolist(), methodcaller("update", news))

    def _tell_unfinished(self, plan: StepPlan, hidden: Hidden) -> None:
        """The states of prompts that go on: nothing was won there yet."""
        found: dict[str, list[int]] = {}
        for index, chunk in enumerate(plan.chunks):
            if not chunk.is_last and self._window(chunk.row):
                found.setdefault(self._serving[chunk.row], []).append(index)
        for name, chunks in found.items():
            rows = [plan.chunks[index].row for index in chunks]
            states = chunk_states(hidden, plan.chunks, chunks, self._window(rows[0]))
            news = News(np.zeros(0, np.int32), np.zeros(1, np.int32), np.zeros(0, np.int64), hidden=states)
            self._guard(name, rows, methodcaller("update", news))

    def _window(self, row: int) -> int:
        """How many of a chunk's last states the row's drafter wants, at least one; 0 if it wants no states now."""
        name = self._serving[row]
        drafter = self._drafters.get(name)
        if drafter is None or not drafter.wants_hidden or (drafter.has_cheap and not self.hears_states):
            return 0
        return max(1, drafter.hidden_window)

    def save(self) -> None:
        """Keep what drafters learned, where they were told to."""
        for name in self._drafters:
            self._guard(name, [], methodcaller("save"))

    def sizes(self) -> dict[str, dict[str, int]]:
        """Bytes of what each drafter holds, by part."""
        found: dict[str, dict[str, int]] = {}
        for name in self._drafters:
            self._guard(name, [], lambda drafter, name=name: found.update({name: drafter.sizes()}))  # type: ignore[misc]
        return found

    def _split(self, rows: Sequence[int], offset: int) -> Iterator[_Run]:
        first = 0
        for index in range(1, len(rows) + 1):
            name = self._serving[rows[first]]
            if index == len(rows) or self._serving[rows[index]] != name:
                yield _Run(name, offset + first, offset + index)
                first = index

    def _propose_run(self, run: _Run, slots: Sequence[TreeSlot], roots: Sequence[int], stop: int) -> bool:
        """Ask for the trees of the run before index `stop`. If that fails, all rows of the run go on without."""
        rows = [slot.row for slot in slots[run.first : run.stop]]
        asked = _Run(run.name, run.first, stop)
        max_nodes = np.array([slot.max_nodes for slot in slots[run.first : stop]], np.int32)

        def ask(drafter: Drafter) -> None:
            is_cheap = drafter.has_cheap and self._effort < Effort.FULL
            propose = drafter.propose_cheap if is_cheap else drafter.propose
            propose(np.array(rows[: max_nodes.size], np.int32), max_nodes, self.trees)
            self._check(asked, max_nodes, roots)
            self._num_candidates = max(self._num_candidates, drafter.num_candidates)

        return self._guard(run.name, rows, ask)

    def _check(self, run: _Run, max_nodes: Int32, roots: Sequence[int]) -> None:
        """Refuse trees that would write where they must not; the rest of the contract only when checked."""
        trees = self.trees
        if trees.num_rows != run.stop:
            raise DraftError(f"{trees.num_rows - run.first} trees for {run.stop - run.first} rows")
        starts = trees.row_starts[run.first : run.stop + 1]
        sizes = np.diff(starts)
        if (sizes < 1).any() or (sizes > max_nodes).any():
            raise DraftError(f"trees of {sizes.tolist()} nodes, limits {max_nodes.tolist()}")
        if trees.tokens[starts[:-1]].tolist() != list(roots[run.first : run.stop]):
            raise DraftError("a root is not the last token of its row")
        tokens = trees.tokens[starts[0] : starts[-1]]
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise DraftError(f"tokens {tokens.min()} .. {tokens.max()} with a vocabulary of {self._vocab_size}")
        if self._is_checked:
            trees.check()

    def _guard(self, name: str, rows: Sequence[int], call: Callable[[Drafter], object]) -> bool:
        """Call a drafter; if it fails, its rows go on without. Any exception is its fault, and none may pass."""
        began = perf_counter()
        try:
            call(self._drafters[name])
            self.spent_s[name] = self.spent_s.get(name, 0.0) + perf_counter() - began
        except Exception:
            if name not in self._logged:
                self._logged.add(name)
                logger.exception("drafter %s failed; rows %s go on without drafts (logged once)", name, list(rows))
            self._num_failures += 1
            self._failed += rows
            for row in rows:
                self.stop(row)
            return False
        return True


def _without_empty(runs: Sequence[_Run], kept: Sequence[int]) -> Iterator[_Run]:
    """Cut the rows that won nothing (they failed) out of the runs."""
    for run in runs:
        first = run.first
        for index in range(run.first, run.stop + 1):
            if index == run.stop or kept[index] == 0:
                if index > first:
                    yield _Run(run.name, first, index)
                first = index + 1
