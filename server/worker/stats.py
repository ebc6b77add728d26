"""What one step did, counted for the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from drafters.base import Int32, Source
from server.messages import StepStats
from server.worker.roster import Roster
from verifier.plan import StepPlan
from verifier.tree import DraftTrees
from verifier.verdict import Verdict

_NUM_SOURCES = len(Source)
_NO_SOURCES = (0,) * _NUM_SOURCES


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Drafts of one step, and what became of them."""

    num_nodes: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    accepted_by_depth: tuple[int, ...] = ()
    """Entry j: draft tokens accepted at depth j + 1."""
    num_bypassed: int = 0
    """Rows that could have drafted and were not let."""
    num_won: int = 0
    """Tokens that answers got, the target's own ones included."""
    accepted_by_source: tuple[int, ...] = _NO_SOURCES
    drafted_by_source: tuple[int, ...] = _NO_SOURCES
    drafted_by_depth: tuple[int, ...] = ()
    """Entry j: draft tokens verified at depth j + 1."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one step, room by room."""

    plan_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    commit_s: float = 0.0
    forward_s: float = 0.0
    """Part of verify_s."""
    drafters_s: Mapping[str, float] = field(default_factory=dict)
    """Drafting and reading the news, by drafter."""
    decode_s: float = 0.0
    plain_s: float = 0.0
    """What such a step took, and what its tokens would have taken without speculation: see StepStats."""


def count_drafts(
    trees: DraftTrees, sizes: Sequence[int], verdict: Verdict, accepted: Sequence[int], num_bypassed: int = 0
) -> DraftCounts:
    """Count by depth and source. `sizes` [trees] nodes of each tree; `accepted` [S] draft tokens that counted."""
    num_trees, num_nodes = len(sizes), trees.num_nodes
    if num_nodes == num_trees:
        return DraftCounts(num_nodes=num_nodes, num_bypassed=num_bypassed)
    won = np.asarray(accepted[:num_trees], np.int64)
    is_won = np.arange(verdict.nodes.shape[1]) < won[:, None]  # [trees, D]
    winners = (verdict.nodes[:num_trees] + trees.row_starts[:num_trees, None])[is_won]
    depths = is_won.sum(0)
    drafted = np.bincount(trees.sources[:num_nodes], minlength=_NUM_SOURCES)
    drafted -= np.bincount(trees.sources[trees.row_starts[:num_trees]], minlength=_NUM_SOURCES)
    return DraftCounts(
        num_nodes=num_nodes,
        num_drafts=sum(size > 1 for size in sizes),
        num_draft_tokens=num_nodes - num_trees,
        num_accepted=int(won.sum()),
        num_bypassed=num_bypassed,
        accepted_by_depth=tuple(depths[: np.count_nonzero(depths)].tolist()),
        accepted_by_source=tuple(np.bincount(trees.sources[winners], minlength=_NUM_SOURCES).tolist()),
        drafted_by_source=tuple(drafted.tolist()),
        drafted_by_depth=tuple(np.bincount(trees.depths[:num_nodes])[1:].tolist()),
    )


def count_predicted(trees: DraftTrees, index: int, accepted: Int32) -> tuple[int, int]:
    """Nodes of tree `index` that were copied from the prediction: all of them, and those among `accepted` (nodes)."""
    is_predicted = trees.sources[trees.span(index)] == Source.PREDICTION
    return int(is_predicted.sum()), int(is_predicted[accepted].sum())


def step_stats(
    roster: Roster, plan: StepPlan | None, drafts: DraftCounts, num_failures: int, times: Times
) -> StepStats:
    """The whole record of a step; without a plan, only how things stand."""
    return StepStats(
        num_rows=len(plan.trees) + len(plan.chunks) if plan else 0,
        num_waiting=len(roster.waiting),
        num_running=len(roster.running),
        num_chunk_tokens=sum(len(chunk.tokens) for chunk in plan.chunks) if plan else 0,
        num_nodes=drafts.num_nodes,
        num_drafts=drafts.num_drafts,
        num_draft_tokens=drafts.num_draft_tokens,
        num_bypassed=drafts.num_bypassed,
        num_accepted=drafts.num_accepted,
        num_won=drafts.num_won,
        accepted_by_depth=drafts.accepted_by_depth,
        accepted_by_source=drafts.accepted_by_source,
        drafted_by_source=drafts.drafted_by_source,
        pages_free=roster.book.num_free,
        pages_total=roster.book.num_usable,
        num_preempted=roster.counts.num_preempted,
        num_prefix_hit_tokens=roster.counts.num_prefix_hit_tokens,
        num_prefix_query_tokens=roster.counts.num_prefix_query_tokens,
        num_drafter_failures=num_failures,
        plan_s=times.plan_s,
        draft_s=times.draft_s,
        verify_s=times.verify_s,
        commit_s=times.commit_s,
        forward_s=times.forward_s,
        drafted_by_depth=drafts.drafted_by_depth,
        drafters_s=dict(times.drafters_s),
        decode_s=times.decode_s,
        plain_s=times.plain_s,
    )
