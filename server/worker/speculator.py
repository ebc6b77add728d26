"""The speculator: the only owner of effort. How much is drafted in a step, and what of it is verified.

It maximises expected tokens per second, from what steps cost (server.worker.step_cost) and from how often drafts came
true lately. Nothing it does can change a text, so it may look at anything and be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from drafters import PLAIN
from drafters.base import RowContext
from server.worker import draft_selection as selection
from server.worker.draft_selection import Float64, Int64
from server.worker.drafting import Drafting, Effort
from server.worker.step_cost import StepCost
from verifier.plan import MAX_TREE_NODES, StepPlan
from verifier.tree import DraftTrees
from verifier.verdict import Verdict

_LOOK_SHARE = 0.01
"""Part of the time that may go into looking at efforts and sizes that are not chosen now."""
_LEAST_PERIOD, _MOST_PERIOD = 4, 64
"""Steps from one look to the next. The upper bound holds whatever a look seems to cost: a wrong price must not hide an
effort that has begun to pay."""
_HOPE, _HOPED = math.log(1.3), 4.0
"""What an effort that nobody has seen is expected to win (a factor, in nats), and the looks that this counts as."""
_RECENT, _HALF_LIFE = 16.0, 16.0
"""Looks at an effort that count, and the steps without one after which those before it count half."""
_MEMORY, _MEMORY_ALL = 48.0, 400.0
"""Expected tokens of a row, and of all rows of a drafter, that are remembered."""
_TRUST = 8.0
"""Expected tokens after which a row's factor is to one half its own, and else that of all rows of its drafter."""
_LEAST_FACTOR, _MOST_FACTOR = 0.05, 2.0
_ROOM, _MORE = 2.0, 4
"""Trees are drafted with so many times the nodes that were kept lately, and some: they differ from step to step."""
_WAKE = 8
"""Steps before a look at full effort in which drafters see hidden states: a head needs its last tokens."""
_UNPROFILED_NODES = 48
"""Nodes that the trees of a step share while nothing is known of costs."""


class Speculator:
    """Chooses an effort for each step, drafts, and cuts the trees of the whole batch to the nodes that pay.

    The loop calls, in this order: `choose` (through the scheduler, which must know how large trees may be), `draft`,
    `update` and `observe`. Until `begin` nothing is known of costs: every row drafts with full effort, in equal parts.

    Efforts are compared by the factor that they win over plain decoding, as it was expected of the trees they drafted
    lately beside about as many rows. An effort that is not chosen gets a look every 4 to 64 steps, the rarer the more
    the last look cost; a look drafts, and so finds out what could be won, and verifies what pays. Owns the drafting,
    the cost model, these factors, and by row how far its drafts can be trusted; no texts, so tenants may share it.
    """

    def __init__(self, drafting: Drafting, max_rows: int) -> None:
        self.drafting = drafting
        self.cost: StepCost | None = None
        num_groups = max(1, max_rows).bit_length()
        self._gains: Float64 = np.zeros((num_groups, len(Effort)))  # [by power of two of drafting rows, effort]
        self._num_looks: Float64 = np.zeros((num_groups, len(Effort)))
        self._looks = dict.fromkeys(Effort, (0, _HOPE))  # step of the last look, and its gain over the best
        # Accepted and expected tokens: what one effort's trees are worth says nothing of another's.
        self._own: Float64 = np.zeros((len(Effort), max_rows, 2))  # [effort, row]
        self._all = {name: np.zeros((len(Effort), 2)) for name in drafting.names}  # by drafter, [effort]
        self._names = [PLAIN] * max_rows
        self._nodes: Float64 = np.full(max_rows, float(MAX_TREE_NODES))  # [row] nodes kept lately, a running mean
        self._usual = 1.0  # positions of steps lately
        self._values: Float64 = np.zeros(max_rows * MAX_TREE_NODES)
        self._scratch = np.zeros(max_rows * MAX_TREE_NODES, np.bool_), np.zeros(MAX_TREE_NODES, np.int64)
        self._num_steps = 0
        self._size = 0  # to which the trees of this step are grown, to see what it costs; 0 for none
        self._is_paired = False  # whether cheap effort is looked at beside full effort
        self._cheap_s = 0.0  # what that took
        # The trees of the step before they were cut, by effort: tokens, parents, scores, sources, row_starts.
        self._drafted: dict[Effort, tuple[Any, ...]] = {}
        # Seconds of plain decoding for what these are expected to win, and of the step but for drafting.
        self._looked: dict[Effort, tuple[float, float]] = {}
        self.effort = Effort.FULL
        """Of the step under way."""
        self.trial_effort: Effort | None = None
        """While this is set, every row drafts with this effort, whatever it costs, and nothing is cut."""
        self.num_bypassed = 0
        """Rows of the step that could have drafted and do not."""
        self._reset()

    def begin(self, cost: StepCost) -> None:
        """From now on efforts and sizes are chosen by these costs. What trial requests taught is forgotten."""
        self.cost = cost
        self._reset()

    def _reset(self) -> None:
        self._gains[:] = _HOPE
        self._gains[:, Effort.NONE] = 0.0
        self._num_looks[:] = _HOPED
        self._own[:] = 0.0
        for counts in self._all.values():
            counts[:] = 0.0

    def start(self, row: int, name: str, context: RowContext) -> None:
        """A request that wants drafter `name` now lives in `row`."""
        self._names[row] = name
        self._own[:, row] = 0.0
        self._nodes[row] = MAX_TREE_NODES
        self.drafting.start(row, name, context)

    # ---- before drafting

    def choose(self, rows: Sequence[int], limits: Sequence[int], num_trees: int, has_prompts: bool) -> list[int]:
        """Choose the effort of the next step. Returns how many nodes, root included, each tree may have; 1 is none.

        Args: all rows that could draft, and the most nodes of each (more than 1); how many trees the step has, bare
        roots included; whether pieces of prompts may run beside them: then what it takes says nothing of sizes.
        """
        self._num_steps += 1
        self._size, self._is_paired, self.num_bypassed = 0, False, 0
        if not rows:
            self.effort = Effort.NONE
            return []
        if self.drafting.is_asleep:
            self.effort, self.num_bypassed = Effort.NONE, len(rows)
            return [1] * len(rows)
        if self.trial_effort is not None:
            self.effort, self.drafting.hears_states = self.trial_effort, True
            return list(limits)
        if self.cost is None:
            self.effort, self.drafting.hears_states = Effort.FULL, True
            shared = max(1, _UNPROFILED_NODES // len(rows)) if len(rows) > 1 else MAX_TREE_NODES
            return [min(limit, shared) for limit in limits]
        group = len(rows).bit_length() - 1
        has_full = self.drafting.has_full(rows)
        efforts = [Effort.NONE, Effort.CHEAP, *([Effort.FULL] if has_full else [])]
        best = max(efforts, key=lambda effort: float(self._gains[group, effort]))
        self.effort = max(effort for effort in efforts if effort == best or (effort > best and self._is_due(effort)))
        if not has_prompts:
            self._size = self.cost.size_to_try(num_trees, len(rows), round(self._usual))
        if self._size > num_trees and self.effort is Effort.NONE:
            self.effort = Effort.CHEAP
        # Cheap drafts cost next to nothing beside full ones, and both are compared on the same texts.
        self._is_paired = self.effort is Effort.FULL
        is_near = Effort.FULL in (best, self.effort) or self._is_due(Effort.FULL, _WAKE)
        self.drafting.hears_states = has_full and is_near
        if self.effort is Effort.NONE:
            self.num_bypassed = len(rows)
            return [1] * len(rows)
        least = (self._size - num_trees) // len(rows) + 1
        wanted = np.maximum(np.ceil(_ROOM * self._nodes[list(rows)]) + _MORE, least)
        return [min(limit, int(nodes)) for limit, nodes in zip(limits, wanted.tolist(), strict=True)]

    def _is_due(self, effort: Effort, soon: int = 0) -> bool:
        """Whether a look at an effort is due, at the latest in `soon` steps."""
        return self._num_steps + soon - self._looks[effort][0] >= self._period(effort)

    def _period(self, effort: Effort) -> int:
        """Steps between two looks, by what the last one lost."""
        lost = 1.0 - math.exp(min(0.0, self._looks[effort][1]))
        return min(_MOST_PERIOD, max(_LEAST_PERIOD, math.ceil(lost / _LOOK_SHARE)))

    # ---- drafting

    def draft(self, plan: StepPlan, roots: Sequence[int], guide: Callable[[DraftTrees], None]) -> DraftTrees:
        """The trees of the step, one for each slot of the plan, cut to the nodes that pay.

        Args: `guide` takes the nodes out of drafted trees that a row's constraint forbids, and adds those it makes
        certain.
        """
        drafting = self.drafting
        self._drafted, self._looked = {}, {}
        drafting.spent_s, self._cheap_s = {}, 0.0
        slots = plan.trees
        cost = None if self.trial_effort is not None or not _num_drafting(plan) else self.cost
        if cost is not None and self._is_paired:
            drafting.propose(slots, roots, Effort.CHEAP)
            guide(drafting.trees)
            self._look(plan, drafting.trees, Effort.CHEAP, cost)
            self._cheap_s = sum(drafting.spent_s.values())
        drafting.propose(slots, roots, self.effort)
        guide(drafting.trees)
        if self.effort is Effort.NONE:
            return drafting.trees
        if cost is not None and drafting.trees.num_nodes > len(slots):
            self._cut(plan, drafting.trees, cost)
        elif cost is not None:
            self._note(self.effort, _num_drafting(plan), 0.0)
        return drafting.trees

    def _cut(self, plan: StepPlan, trees: DraftTrees, cost: StepCost) -> None:
        """Cut the drafted trees to the nodes that pay, in place."""
        rate, order, count = self._look(plan, trees, self.effort, cost)
        num_nodes, num_trees = trees.num_nodes, trees.num_rows
        rows = np.array([slot.row for slot in plan.trees], np.int64)
        num_beside = sum(len(chunk.tokens) for chunk in plan.chunks)
        if num_beside:
            # Prompts are work of their own: what a second is worth is judged without them, what a node costs with them.
            price = (cost.table, num_trees + num_beside, 0.0)
            count = int(selection.paying_prefix(self._values[:num_nodes], order, price, rate))
        elif self._size:
            count = self._size - num_trees
        arrays = (trees.tokens, trees.parents, trees.depths, trees.ancestors, trees.scores, trees.sources)
        selection.keep((*arrays, trees.row_starts), num_trees, order[: max(0, count)], self._scratch)
        sizes = np.diff(trees.row_starts[: num_trees + 1])
        self._nodes[rows] += 0.25 * (np.minimum(sizes, MAX_TREE_NODES) - self._nodes[rows])
        self._usual += 0.125 * (trees.num_nodes - self._usual)

    def _look(self, plan: StepPlan, trees: DraftTrees, effort: Effort, cost: StepCost) -> tuple[float, Int64, int]:
        """What the best cut of these trees is expected to win.

        Returns tokens per second at scale 1, the drafted nodes with the best first, and how many of these to verify.
        """
        num_trees, num_nodes = trees.num_rows, trees.num_nodes
        arrays = (trees.tokens, trees.parents, trees.scores, trees.sources)
        nodes = (array[:num_nodes].copy() for array in arrays)
        self._drafted[effort] = (*nodes, trees.row_starts[: num_trees + 1].copy())
        values = self._values[:num_nodes]
        drafted = (trees.parents, trees.scores, trees.sources)
        selection.appraise(drafted, trees.row_starts, self._factors(plan, effort), values)
        order = np.argsort(-values, kind="stable")[num_trees:]  # no node is before its parent, the roots are first
        draft_s = cost.draft_s(effort, _num_drafting(plan))
        extra_s = cost.row_s * (num_trees - 1) + draft_s
        count, rate = selection.best_prefix(values, order, (cost.table, num_trees, extra_s), float(num_trees))
        num_won = num_trees + float(values[order[:count]].sum())
        self._looked[effort] = num_won * cost.shape_s(num_trees, num_trees) / num_trees, num_won / rate - draft_s
        return float(rate), order, int(count)

    def _note(self, effort: Effort, num_drafting: int, gain: float) -> None:
        """Remember what an effort would win."""
        if effort is Effort.NONE:
            return
        group = max(1, num_drafting).bit_length() - 1
        looks, age = self._num_looks[group], self._num_steps - self._looks[effort][0]
        looks[effort] = min(_RECENT, looks[effort] * 0.5 ** (age / _HALF_LIFE) + 1.0)
        self._gains[group, effort] += (gain - self._gains[group, effort]) / looks[effort]
        best = float(self._gains[group].max())
        self._looks[effort] = self._num_steps, gain - best

    def _factors(self, plan: StepPlan, effort: Effort) -> Float64:
        """What the chances of each tree's nodes are to be multiplied with. [R]"""
        rows = [slot.row for slot in plan.trees]
        all_counts = np.array([self._all[self._names[row]][effort] for row in rows])
        prior = (all_counts[:, 0] + _TRUST) / (all_counts[:, 1] + _TRUST)
        own = self._own[effort, rows]
        factors: Float64 = (own[:, 0] + _TRUST * prior) / (own[:, 1] + _TRUST)
        return np.clip(factors, _LEAST_FACTOR, _MOST_FACTOR, out=factors)

    # ---- after the step

    def update(self, plan: StepPlan, verdict: Verdict, kept: Sequence[int]) -> None:
        """Tell the drafters what came true, and learn how far their drafts can be trusted.

        Args: `kept` [S], how many of its tokens each row of the verdict won.
        """
        if self._drafted:
            rows = np.array([slot.row for slot in plan.trees], np.int64)
            counts = np.asarray(kept[: rows.size], np.int32)
            starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            tokens = verdict.tokens[: rows.size]
            won = tokens[np.arange(tokens.shape[1]) < counts[:, None]]
            expected, accepted = np.empty(rows.size), np.empty(rows.size)
            for effort, drafted in self._drafted.items():
                selection.compare(drafted, starts, won, expected, accepted)
                self._learn(effort, rows, expected, accepted)
        self.drafting.update(plan, verdict, kept)

    def _learn(self, effort: Effort, rows: Int64, expected: Float64, accepted: Float64) -> None:
        own = self._own[effort, rows] + np.stack([accepted, expected], axis=1)
        own *= (_MEMORY / np.maximum(own[:, 1], _MEMORY))[:, None]
        self._own[effort, rows] = own
        for row, won, hoped in zip(rows.tolist(), accepted.tolist(), expected.tolist(), strict=True):
            counts = self._all[self._names[row]][effort]
            counts += (won, hoped)
            counts *= _MEMORY_ALL / max(counts[1], _MEMORY_ALL)

    def observe(self, plan: StepPlan, num_nodes: int, step_s: float, drafting_s: float) -> None:
        """A step ran: `num_nodes` of all trees, roots included.

        Args: `step_s`, all that it took but for what drafters spent; `drafting_s`, what they did.
        """
        if self.cost is None or self.trial_effort is not None:
            return
        num_drafting = _num_drafting(plan)
        if not plan.chunks:  # most positions of a prompt have no logits, and so another price
            self.cost.observe_step(num_nodes, len(plan.trees), step_s)
            if num_drafting and self.effort is not Effort.NONE:
                self.cost.observe_draft(self.effort, num_drafting, drafting_s - self._cheap_s)
            else:
                self._usual += 0.125 * (num_nodes - self._usual)
        for effort, (plain_s, step_s) in self._looked.items():  # at the price that was just seen
            self._note(effort, num_drafting, math.log(plain_s / (step_s + self.cost.draft_s(effort, num_drafting))))


def _num_drafting(plan: StepPlan) -> int:
    return sum(slot.max_nodes > 1 for slot in plan.trees)
