"""The budget: which rows draft in a step and which drafted nodes are verified, so that speculation never costs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from drafters.base import Int32
from server.worker.admission import (
    Bools,
    Float64,
    Int64,
    Packed,
    believe_best,
    best_prefix,
    choose_rows,
    keep,
    paying_prefix,
    survive,
)
from server.worker.cost import StepCost
from server.worker.gears import FULL, Gears
from server.worker.ways import Ways
from server.worker.worth import ASKED, PROBED, REFUSED, Worth
from verifier.plan import MAX_TREE_NODES, StepPlan, TreeSlot
from verifier.tree import DraftTrees

_PROBE_SHARE = 0.01
"""Part of the time that may go into finding out whether rows that do not draft should."""
_LEAST_PERIOD, _MOST_PERIOD = 4, 1024
_AWAKE = 2.0
"""What it costs to go another way for one step: it also wakes up the step before, and comes with cold caches."""
_PROBE_NODES = 8
_ROOM, _MORE = 2.0, 3
"""Trees are drafted with so many times the nodes that pay on the average, and some: they differ from step to step."""


@dataclass(slots=True)
class _Choice:
    """What R rows that could draft in a step are to do, and how many tokens per second that is expected to win."""

    ways: Int64  # [R] see server.worker.ways
    memories: Int32  # [R] where Worth keeps what is known of the row on this way
    is_in: Bools  # [R] whether it drafts
    nodes: Float64  # [R] how many nodes its tree is to have
    rate: float

    def probe(self, other: _Choice, is_new: Bools) -> None:
        """Let rows that are new [R] draft as another choice says, with some nodes, because it is time to."""
        self.ways[is_new], self.memories[is_new] = other.ways[is_new], other.memories[is_new]
        self.nodes[is_new] = _PROBE_NODES if self is other else np.maximum(other.nodes[is_new], _PROBE_NODES)
        self.is_in |= is_new


@dataclass(frozen=True, slots=True)
class Taken:
    """What a step that ran took, in seconds."""

    step_s: float
    """All of it, but for what drafters spent."""
    drafters_s: dict[str, float]
    """Drafting and reading the news, by drafter."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """The trees of the step as they were before they were cut; what was expected of them is in the budget's arrays."""

    rows: Int32  # [T] of all trees of the step, as Worth knows them on the way they drafted
    reasons: Int32  # [T] why they were drafted: see server.worker.worth
    starts: Int32  # [T + 1] offsets into the survivals


class Budget:
    """Chooses for expected tokens per second, from measured costs and running acceptance.

    It is asked twice in a step. Before drafting `choose` says which rows draft at all: those whose trees, going by what
    they held lately, win more than their drafting and verifying could win elsewhere. After drafting `cut` keeps the
    best nodes over the whole batch as long as the marginal one pays. Then `observe` learns what the step took and won.
    A row that does not draft costs nothing, and a drafter that nobody drafts with is told tokens only. Every
    so many steps, for _PROBE_SHARE of the time, all rows draft, so that one that has become worth it is found; such a
    probe believes, of one node of each tree, what the drafter says.

    Until `begin` it is idle, and steps have fixed sizes. Owns the cost model, the worth of the rows and the choice of
    the step under way.
    """

    def __init__(
        self, max_rows: int, drafters: Sequence[str], max_step_nodes: int = 0, with_light: Collection[str] = ()
    ) -> None:
        """`max_step_nodes`: most nodes of the trees of a step in which several rows draft; 0 is no limit.

        `with_light`: those of the drafters that have a light way to draft.
        """
        self._cost: StepCost | None = None
        self._max_rows = max_rows
        self._max_step_nodes = max_step_nodes or max_rows * MAX_TREE_NODES
        self.ways = Ways(drafters, with_light)
        num_ways = len(self.ways)
        self._worth = Worth(2 * max_rows, max(1, num_ways))  # rows on their full way, then the same on the light one
        self._memory: Float64 = np.zeros(3 * num_ways + 2)
        self._survivals: Float64 = np.zeros(max_rows * MAX_TREE_NODES)
        self._values: Float64 = np.zeros(max_rows * MAX_TREE_NODES)
        self._expected: Float64 = np.zeros(max_rows)
        self._is_kept: Bools = np.zeros(max_rows * MAX_TREE_NODES, np.bool_)
        self._node_places: Int64 = np.zeros(MAX_TREE_NODES, np.int64)
        self._memories: Int32 = np.arange(max_rows, dtype=np.int32)  # [M] of each row, as it drafted last
        self._periods = [_LEAST_PERIOD] * num_ways  # of each way: steps from one probe to the next
        self._turns = [0] * num_ways  # and the step of the last one
        self._num_steps = 0
        self._probed: set[int] = set()
        self._draft: _Draft | None = None
        self.gears = FULL
        """How the drafters of the step are to be driven."""
        self.num_bypassed = 0
        """Rows of the step that could have drafted and do not."""

    @property
    def is_ready(self) -> bool:
        """Whether it knows what steps cost."""
        return self._cost is not None

    def begin(self, cost: StepCost) -> None:
        """From now on steps are chosen by these costs."""
        self._cost = cost

    def forget_worth(self) -> None:
        """What rows have won so far was a trial and says nothing of clients."""
        self._worth.forget()

    def start(self, row: int, drafter: str) -> None:
        """Somebody new lives in `row`."""
        if drafter in self.ways.full:
            self._worth.start(row, self.ways.full[drafter])
        if drafter in self.ways.light:
            self._worth.start(row + self._max_rows, self.ways.light[drafter])

    def bound_s(self, num_positions: int, num_rows: int) -> float:
        """Seconds that a step of this size should not exceed; 0 while nothing is known."""
        return self._cost.bound_s(num_positions, num_rows) if self._cost is not None else 0.0

    def plain_s(self, num_rows: int) -> float:
        """What a step of so many rows takes when nobody drafts, in seconds. The budget must be ready."""
        assert self._cost is not None, "nothing is known of costs yet"
        return self._cost.positions.at(num_rows) + self._cost.row_s * (num_rows - 1)

    # ---- before drafting

    def choose(self, rows: Sequence[int], drafters: Sequence[str], limits: Sequence[int], num_rows: int) -> list[int]:
        """How many nodes, root included, the trees of `rows` are to be drafted with; 1 is a bypass.

        Args: all rows that could draft in this step of `num_rows` rows, with their drafters and most nodes.
        """
        self._num_steps += 1
        self._probed.clear()
        self.gears, self.num_bypassed = FULL, 0
        if self._cost is None:
            return list(limits)
        if not rows:
            self.gears = Gears(asleep=frozenset(filter(self.ways.is_light, self.ways.light)))
            return []
        full = np.array([self.ways.full[name] for name in drafters], np.int64)
        ids = np.array(rows, np.int32)
        choice, others = self._choice(ids, self.ways.going(full), num_rows), list[_Choice]()
        if self.ways.is_fixed:
            choice.is_in[:], choice.nodes[:] = True, MAX_TREE_NODES
        elif self._num_steps % _LEAST_PERIOD == 0:
            choice, others = self._compare(choice, ids, full, num_rows)
        self._probe(choice, others, num_rows)
        self._memories[ids] = choice.memories
        self.num_bypassed = int(choice.is_in.size - choice.is_in.sum())
        self.gears = self._gears(choice, full)
        return [
            min(limit, int(nodes)) if is_drafting else 1
            for limit, nodes, is_drafting in zip(limits, choice.nodes.tolist(), choice.is_in.tolist(), strict=True)
        ]

    def _compare(self, best: _Choice, rows: Int32, full: Int64, num_rows: int) -> tuple[_Choice, list[_Choice]]:
        """Try for each drafter with two ways, by its `full` way of rows [R], the one it does not go; from now on it
        goes the better one. Returns the best choice, and what would be best on each of the ways that are not gone."""
        others = []
        for way, away in self.ways.others(full):
            other = self._choice(rows, np.where(full == way, away, best.ways), num_rows)
            if other.rate > best.rate:
                self.ways.turn(way, away)
                best, other = other, best
            others.append(other)
        return best, others

    def _choice(self, rows: Int32, ways: Int64, num_rows: int) -> _Choice:
        """The best choice for rows on these ways [R]."""
        assert self._cost is not None
        memories = rows + np.where(ways < len(self.ways.full), 0, self._max_rows).astype(np.int32)
        worth = self._worth.of(memories)
        is_in: Bools = np.ones(rows.size, np.bool_)
        prices = (self._cost.positions.table, self._cost.row_s * (num_rows - 1))
        batch = (worth, self.ways.asking(ways, worth[0].sum(1) + 1.0), float(num_rows))
        last, rate = choose_rows(batch, prices, self._memory, is_in)
        nodes = np.ceil(_ROOM * worth[0][:, : last + 1].sum(1)) + _MORE
        return _Choice(ways, memories, is_in, nodes, rate)

    def _probe(self, choice: _Choice, others: list[_Choice], num_rows: int) -> None:
        """Let rows that do not pay draft when it is time, and drafters go the way that they do not go now."""
        used, probed = set(choice.ways.tolist()), set[str]()
        options = [(choice, way) for way in used]
        for other in others:
            options += [(other, way) for way in set(other.ways.tolist()) - used]
        options.sort(key=lambda one: self._turns[one[1]])  # who had no turn for longest goes first
        for option, way in options:
            is_new = option.ways == way
            if option is choice:
                is_new &= ~choice.is_in
            if self.ways.names[way] in probed or not is_new.any():  # a drafter goes one way in a step
                continue
            period = self._periods[way] = self._period(way, int(is_new.sum()), num_rows, option, choice)
            if self._num_steps % period == 0:
                choice.probe(option, is_new)
                self._probed.update(choice.memories[is_new].tolist())
                self._turns[way] = self._num_steps
                probed.add(self.ways.names[way])

    def _gears(self, choice: _Choice, full: Int64) -> Gears:
        """How the drafters are to be driven. One that sleeps wakes up a step before it is asked for all it knows."""
        light, asleep = set(), set()
        for name, place in self.ways.full.items():
            is_hers = full == place
            if not is_hers.any():
                if self.ways.is_light(name):
                    asleep.add(name)
                continue
            is_light = choice.ways[is_hers] != place
            if is_light.any():
                light.add(name)
            if (is_light | ~choice.is_in[is_hers]).all() and (self._num_steps + 1) % self._periods[place]:
                asleep.add(name)
        return Gears(frozenset(light), frozenset(asleep))

    def _period(self, way: int, num_new: int, num_rows: int, option: _Choice, best: _Choice) -> int:
        """After how many steps so many new rows are to draft on a way of an option that is not the best, or that does
        not let them."""
        assert self._cost is not None
        positions, step_s = self._cost.positions, self.plain_s(num_rows)
        extra_s = self.ways.cost_s(way, num_new * _PROBE_NODES)
        extra_s += positions.at(num_rows + num_new) - positions.at(num_rows)
        if option is not best:
            extra_s = _AWAKE * extra_s + (best.rate / option.rate - 1.0) * step_s
        period = _LEAST_PERIOD
        while period < _MOST_PERIOD and period * _PROBE_SHARE * step_s < extra_s:
            period *= 2
        return period

    # ---- after drafting

    def cut(self, plan: StepPlan, trees: DraftTrees, spent_s: float) -> None:
        """Cut the drafted trees to the nodes that pay, in place. `spent_s`: how long drafting took."""
        self._draft = None
        if self._cost is None or all(slot.max_nodes == 1 for slot in plan.trees):
            return
        num_trees = trees.num_rows
        starts = trees.row_starts[: num_trees + 1].copy()
        rows = self._memories[[slot.row for slot in plan.trees]]
        reasons = np.array([self._reason(slot) for slot in plan.trees], np.int32)
        packed: Packed = (
            *(trees.tokens, trees.parents, trees.depths, trees.ancestors),
            *(trees.scores, trees.sources, trees.row_starts),
        )
        survive(packed, num_trees, self._worth.factors(rows), self._survivals, self._values)
        if self._probed:
            believe_best(starts, reasons, PROBED, self._survivals, self._values)
        chosen = self._admit(plan, starts, spent_s)
        keep(packed, num_trees, chosen, self._survivals, (self._is_kept, self._node_places, self._expected))
        self._draft = _Draft(rows, reasons, starts)

    def _reason(self, slot: TreeSlot) -> int:
        if slot.max_nodes == 1:
            return REFUSED
        return PROBED if int(self._memories[slot.row]) in self._probed else ASKED

    def _admit(self, plan: StepPlan, starts: Int32, spent_s: float) -> Int64:
        """The drafted nodes to verify, as packed indices: the best of all trees, which lie between `starts` [T + 1]."""
        assert self._cost is not None
        num_trees, num_nodes = starts.size - 1, int(starts[-1])
        values, table = self._values[:num_nodes], self._cost.positions.table
        order = np.argsort(-values, kind="stable")[num_trees:]  # no node is before its parent, the roots are first
        count, rate = best_prefix(
            values, order, (table, num_trees, spent_s + self._cost.row_s * (num_trees - 1)), num_trees
        )
        num_beside = sum(len(chunk.tokens) for chunk in plan.chunks)
        if num_beside:
            # Prompts are work of their own: what a second is worth is judged without them, what a node costs with them.
            count = paying_prefix(values, order, (table, num_trees + num_beside, 0.0), rate)
        num_drafting = int(np.count_nonzero(starts[1:] - starts[:-1] > 1))
        if num_drafting > 1:
            count = min(count, max(0, self._max_step_nodes - num_drafting))
        return order[:count]

    # ---- after the step

    def observe(self, plan: StepPlan, num_nodes: int, accepted: Sequence[int], taken: Taken) -> None:
        """A step ran: `num_nodes` of all trees, roots included, and `accepted` [>= trees] draft tokens by tree."""
        if self._cost is None:
            return
        if not plan.chunks:  # most positions of a chunk have no logits, and so another price
            self._cost.observe(num_nodes, len(plan.trees), taken.step_s)
        draft, self._draft = self._draft, None
        if draft is None:
            return
        num_trees = draft.rows.size
        won = np.array(accepted[:num_trees], np.float64)
        drafted = (draft.rows, draft.reasons, draft.starts, self._survivals)
        self._worth.learn(drafted, won, self._expected[:num_trees])
        is_asked = draft.reasons != REFUSED
        nodes = np.bincount(self._worth.who(draft.rows[is_asked]), np.diff(draft.starts)[is_asked])
        self.ways.observe(nodes.astype(np.int64).tolist(), taken.drafters_s)
