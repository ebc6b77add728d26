"""A step that raised, run again row by row: who breaks it fails alone, everybody else wins what they would have won."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from server.worker.roster import Roster
from verifier.parallel.wire import RankLost
from verifier.plan import Chunk, RowStart, StepPlan, TreeSlot
from verifier.tree import DraftTrees
from verifier.verdict import TokenLogprobs, Verdict

Run = Callable[[StepPlan, DraftTrees], Verdict]


@dataclass(frozen=True, slots=True)
class Apart:
    """What the rows of a step won one by one."""

    verdict: Verdict
    """As if of one step; rows that raised are among its `failed`."""
    errors: dict[int, Exception]
    """Why, for each row that raised alone."""


def is_device_lost(error: Exception) -> bool:
    """Whether only a new process can use the device again; running out of its memory is not that."""
    return isinstance(error, RankLost) or is_device_fault(error)


def is_device_fault(error: Exception) -> bool:
    """Whether a GPU did what it cannot go on from, as a kernel of ours may have made it do."""
    text = str(error)
    return "CUDA" in text and "out of memory" not in text


def run_apart(run: Run, roster: Roster, plan: StepPlan, trees: DraftTrees) -> Apart:
    """Run each row of `plan` in a step of its own. Raises: what `run` raises when the device is lost.

    Nobody knows how much of the plan was applied before it raised, so each row is told again from its start: tokens,
    sampling state, all of its pages. The K/V that the step wrote are written again, at the same places. The verdict
    carries no hidden states: drafters that read them have to bear such a gap anyway.
    """
    results: list[Verdict | None] = []
    errors: dict[int, Exception] = {}
    works: list[TreeSlot | Chunk] = [*plan.trees, *plan.chunks]
    for index, work in enumerate(works):
        is_tree = index < len(plan.trees)
        alone = _tree_alone(trees, index if is_tree else None)
        try:
            results.append(run(_plan_alone(roster, plan, work), alone))
        except Exception as error:
            if is_device_lost(error):
                raise
            errors[work.row] = error
            results.append(None)
    return Apart(_merge(plan, trees, results, tuple(errors)), errors)


def _plan_alone(roster: Roster, plan: StepPlan, work: TreeSlot | Chunk) -> StepPlan:
    sequence, row = roster.sequence(work.row), work.row
    started = {start.row for start in plan.starts}
    return StepPlan(
        starts=(RowStart(row, tuple(sequence.tokens), sequence.num_prompt, sequence.sampling),),
        stops=(row, *(stop for stop in plan.stops if stop not in started)),
        pages=tuple((row, index, page) for index, page in enumerate(sequence.pages)),
        trees=(work,) if isinstance(work, TreeSlot) else (),
        chunks=(work,) if isinstance(work, Chunk) else (),
    )


def _tree_alone(trees: DraftTrees, index: int | None) -> DraftTrees:
    """Tree `index` by itself, or no tree."""
    nodes = slice(0, 0) if index is None else trees.span(index)
    return DraftTrees(
        tokens=trees.tokens[nodes],
        parents=trees.parents[nodes],
        depths=trees.depths[nodes],
        ancestors=trees.ancestors[nodes],
        scores=trees.scores[nodes],
        sources=trees.sources[nodes],
        row_starts=np.array([0, nodes.stop - nodes.start], np.int32),
        num_rows=0 if index is None else 1,
    )


def _merge(plan: StepPlan, trees: DraftTrees, results: list[Verdict | None], raised: tuple[int, ...]) -> Verdict:
    """One verdict of many; a row that raised keeps its place and wins nothing."""
    num_trees = len(plan.trees)
    work: list[TreeSlot | Chunk] = [*plan.trees, *plan.chunks]
    winners = [
        index for index, one in enumerate(work) if not isinstance(one, Chunk) or one.is_last
    ]  # indices into work, in the order of a verdict
    known = [result for result in results if result is not None]
    depth = max((result.nodes.shape[1] for result in known), default=0)
    tokens = np.full((len(winners), depth + 1), -1, np.int64)
    nodes = np.full((len(winners), depth), -1, np.int32)
    num_accepted = np.zeros(len(winners), np.int32)
    logprobs: dict[int, list[TokenLogprobs]] = {}
    scores = {index: result.scores[0] for index, result in enumerate(results[num_trees:]) if result and result.scores}
    for place, index in enumerate(winners):
        result = results[index]
        if result is not None:
            tokens[place, : result.tokens.shape[1]] = result.tokens[0]
            nodes[place, : result.nodes.shape[1]] = result.nodes[0]
            num_accepted[place] = result.num_accepted[0]
            if 0 in result.logprobs:
                logprobs[place] = result.logprobs[0]
    candidates = logits = None
    width = max((result.candidates.shape[1] for result in known if result.candidates is not None), default=0)
    if width:
        candidates = np.zeros((trees.num_nodes, width), np.int32)
        logits = np.zeros((trees.num_nodes, width), np.float32)
        for index, result in enumerate(results[:num_trees]):
            if result is not None and result.candidates is not None and result.candidate_logits is not None:
                candidates[trees.span(index)] = result.candidates
                logits[trees.span(index)] = result.candidate_logits
    return Verdict(
        rows=np.array([work[index].row for index in winners], np.int32),
        tokens=tokens,
        num_accepted=num_accepted,
        nodes=nodes,
        failed=(*raised, *(row for result in known for row in result.failed)),
        logprobs=logprobs,
        candidates=candidates,
        candidate_logits=logits,
        forward_s=sum(result.forward_s for result in known),
        scores=scores,
    )
