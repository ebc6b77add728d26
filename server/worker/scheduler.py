"""Which rows run in the next step, and with how many positions; what its verdict changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from time import perf_counter
from types import MappingProxyType

from server.messages import Delta, RequestError, TokenLogprob, TopLogprob
from server.worker.roster import Counts, Limits, Roster
from server.worker.sequence import Sequence, Status
from server.worker.stats import count_predicted
from verifier.plan import MAX_TREE_NODES, Chunk, StepPlan, TreeSlot
from verifier.tree import DraftTrees
from verifier.verdict import TokenLogprobs, Verdict

MAX_SCORED = 256
"""Positions of one step whose prompt tokens are scored: each needs logits over the whole vocabulary."""
_NOT_FINITE = "the model gave numbers that are not finite for this request"
TreeSizes = Callable[[SequenceOf[int], SequenceOf[int], int, bool], list[int]]
"""Given the rows that could draft, the most nodes of each tree, the number of all trees, and whether prompts may run
beside them: how many nodes, root included, each of these rows may have."""
_NO_REASONS: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Committed:
    """What a verdict changed; lists of numbers go by index of the verdict's rows."""

    deltas: list[Delta]
    errors: list[RequestError]
    kept: list[int]
    """Tokens that count: those after a stop never happened; 0 for a row that failed."""
    accepted: list[int]
    """Draft tokens among the kept ones."""


class Scheduler:
    """Continuous batching without phases, first come first served.

    Every step packs one tree for each generating row, then pieces of prompts, under `max_batched_tokens`. The
    pages of a prompt are taken when it gets its row, those of an answer as it grows. Out of pages, first the
    trees shrink, then the youngest row is preempted and later computed again from its tokens. Owns the roster.
    """

    def __init__(self, limits: Limits) -> None:
        assert limits.max_rows <= limits.max_batched_tokens, f"{limits}: a step must hold one position per row"
        self.limits = limits
        self.roster = Roster(limits)

    @property
    def has_work(self) -> bool:
        """Whether another step would do anything."""
        return bool(self.roster.running or self.roster.waiting)

    def plan(self, tree_sizes: TreeSizes) -> StepPlan | None:
        """Decide the next step; None when there is nothing to run. `tree_sizes` is asked once.

        Trees come grouped by drafter, those to be drafted before bare roots. Rows that left since the last plan are in
        its `stops`, which wait for the next plan when this one is None.
        """
        roster = self.roster
        roster.counts = Counts()
        self._secure_roots()
        generating = [sequence for sequence in roster.running if sequence.status is Status.GENERATING]
        trees, num_left = self._plan_trees(generating, tree_sizes)
        chunks = self._plan_chunks(num_left)
        if not trees and not chunks:
            assert not self.has_work, f"stuck: {len(roster.running)} running, {len(roster.waiting)} waiting"
            return None
        changes = roster.take_changes()
        return StepPlan(
            starts=tuple(changes.starts),
            stops=tuple(changes.stops),
            pages=tuple(changes.pages),
            trees=tuple(trees),
            chunks=tuple(chunks),
        )

    def commit(
        self,
        plan: StepPlan,
        verdict: Verdict,
        tree_sizes: list[int],
        reasons: Mapping[int, str] = _NO_REASONS,
        trees: DraftTrees | None = None,
    ) -> Committed:
        """Make the verdict true: tokens, pages, ends. `tree_sizes` counts the nodes of each tree, root included.

        `reasons` tells why rows failed, by row, where that is not what they fail of otherwise. Of `trees` the nodes
        that were copied from a request's prediction are counted.
        """
        roster, failed = self.roster, verdict.failed
        out = Committed([], [], [], [])
        for index, chunk in enumerate(plan.chunks):
            sequence = roster.sequence(chunk.row)
            if index in verdict.scores and chunk.row not in failed:
                out.deltas.append(_scores_delta(sequence, chunk, verdict.scores[index]))
            sequence.num_cached += len(chunk.tokens)
            if chunk.is_last:
                sequence.status = Status.GENERATING
            elif chunk.row not in failed:
                roster.publish(sequence)
        num_accepted, tokens = verdict.num_accepted.tolist(), verdict.tokens.tolist()
        for index, row in enumerate(verdict.rows.tolist()):
            kept = accepted = 0
            if row not in failed:
                sequence = roster.sequence(row)
                kept = sequence.commit(tokens[index][: num_accepted[index] + 1])
                accepted = min(num_accepted[index], kept)
                if index < len(tree_sizes) and tree_sizes[index] > 1:
                    sequence.count_drafts(tree_sizes[index] - 1, accepted)
                    if trees is not None and sequence.prediction:
                        sequence.count_prediction(*count_predicted(trees, index, verdict.nodes[index, :accepted]))
                out.deltas.append(_delta(sequence, kept, verdict, index))
                roster.publish(sequence)
                if sequence.finish_reason is not None:
                    roster.leave(sequence)
            out.kept.append(kept)
            out.accepted.append(accepted)
        for row in failed:
            out.errors.append(roster.fail(row, reasons.get(row, _NOT_FINITE)))
        return out

    def disable_drafts(self, row: int) -> None:
        """If somebody lives in `row`, it decodes plainly from now on: its drafter failed."""
        sequence = self.roster.occupant(row)
        if sequence is not None:
            sequence.drafter, sequence.max_nodes = "none", 1

    def _secure_roots(self) -> None:
        """Give every generating row a page for its root, at the cost of trees first, of the youngest rows then."""
        roster, size = self.roster, self.limits.page_size
        is_reclaimed = False
        index = 0
        while index < len(roster.running):  # preemption shortens the list from its end
            sequence = roster.running[index]
            index += 1
            if sequence.status is not Status.GENERATING or len(sequence.pages) > sequence.num_cached // size:
                continue
            pages = roster.book.take(1)
            if pages is None and not is_reclaimed:
                is_reclaimed = True
                roster.reclaim_slack()
                pages = roster.book.take(1)
            while pages is None and sequence.status is Status.GENERATING:
                roster.preempt(roster.running[-1])
                pages = roster.book.take(1) if sequence.status is Status.GENERATING else None
            if pages is not None:
                roster.append_pages(sequence, pages)

    def _plan_trees(self, generating: list[Sequence], tree_sizes: TreeSizes) -> tuple[list[TreeSlot], int]:
        """A tree slot for every generating row, grouped by drafter; also the positions left for prompts."""
        roster, num_left = self.roster, self.limits.max_batched_tokens
        has_prompts = len(generating) < len(roster.running) or bool(roster.waiting and roster.has_free_row)
        # While prompts wait, trees take at most half of a step: neither side starves.
        share = num_left // 2 if has_prompts else num_left
        most = min(MAX_TREE_NODES, max(1, share // max(1, len(generating))))
        trees = []
        for sequence, nodes in _sized(generating, most, has_prompts, tree_sizes):
            if nodes > 1:
                nodes = self._fit_tree(sequence, nodes)
            num_left -= nodes
            trees.append(TreeSlot(sequence.row, sequence.num_cached, nodes))
        return trees, num_left

    def _fit_tree(self, sequence: Sequence, nodes: int) -> int:
        """Cut a tree to the context and to the pages there are."""
        size, cached = self.limits.page_size, sequence.num_cached
        nodes = min(nodes, self.limits.context_len - cached)
        num_missing = (cached + nodes - 1) // size + 1 - len(sequence.pages)
        if num_missing > 0:
            pages = self.roster.book.take(min(num_missing, self.roster.book.num_free))
            if pages:
                self.roster.append_pages(sequence, pages)
            nodes = min(nodes, len(sequence.pages) * size - cached)
        return nodes

    def _plan_chunks(self, num_left: int) -> list[Chunk]:
        """Pieces of the prompts that are under way, oldest first, then of new ones."""
        roster = self.roster
        chunks: list[Chunk] = []
        num_scorable = MAX_SCORED
        for sequence in roster.running:
            if num_left == 0:
                return chunks
            if sequence.status is Status.PREFILLING and (num_scorable or not sequence.is_scored):
                chunks.append(_chunk(sequence, num_left, num_scorable))
                num_left -= len(chunks[-1].tokens)
                num_scorable -= len(chunks[-1].targets)
        # Who was just preempted comes back when there is room, not in the same breath.
        while num_left > 0 and roster.waiting and roster.has_free_row and roster.counts.num_preempted == 0:
            sequence = roster.waiting[0]
            if (sequence.is_scored and not num_scorable) or not roster.seat(sequence):
                break
            chunks.append(_chunk(sequence, num_left, num_scorable))
            num_left -= len(chunks[-1].tokens)
            num_scorable -= len(chunks[-1].targets)
        return chunks


def _sized(
    generating: list[Sequence], most: int, has_prompts: bool, tree_sizes: TreeSizes
) -> list[tuple[Sequence, int]]:
    """How many nodes each row may have at most, grouped by drafter, trees before bare roots."""
    # Where the target's own token ends the answer a guess cannot be of use.
    sizes = [1 if sequence.num_left == 1 else min(sequence.max_nodes, most) for sequence in generating]
    able = [index for index, nodes in enumerate(sizes) if nodes > 1]
    rows, limits = [generating[index].row for index in able], [sizes[index] for index in able]
    chosen = tree_sizes(rows, limits, len(generating), has_prompts)
    for index, nodes in zip(able, chosen, strict=True):
        constraint = generating[index].constraint
        # What a grammar makes certain is always worth its nodes.
        num_certain = 0 if constraint is None else constraint.num_forced
        sizes[index] = min(max(nodes, 1 + num_certain), sizes[index])
    return sorted(zip(generating, sizes, strict=True), key=lambda one: (one[0].drafter, one[1] == 1))


def _chunk(sequence: Sequence, num_left: int, num_scorable: int) -> Chunk:
    start = sequence.num_cached
    if sequence.is_scored:
        num_left = min(num_left, num_scorable)
    stop = min(start + num_left, len(sequence.tokens))
    tokens, is_last = tuple(sequence.tokens[start:stop]), stop == len(sequence.tokens)
    targets = sequence.targets(start, stop)
    return Chunk(sequence.row, start, tokens, is_last, targets, max(0, sequence.num_prompt_logprobs))


def _scores_delta(sequence: Sequence, chunk: Chunk, scores: list[TokenLogprobs]) -> Delta:
    """The event that tells log-probabilities of a piece of the prompt."""
    return Delta(sequence.id, (), prompt_logprobs=_logprobs(sequence.take_scores(chunk.num_cached, scores)))


def _logprobs(found: list[TokenLogprobs]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(one.logprob, tuple(TopLogprob(*pair) for pair in one.top), one.rank) for one in found)


def _delta(sequence: Sequence, kept: int, verdict: Verdict, index: int) -> Delta:
    """The event that tells the won tokens; with the end, if they are the last."""
    logprobs = None
    if sequence.sampling.num_logprobs >= 0:
        logprobs = _logprobs(verdict.logprobs[index][:kept])
    is_first, sequence.is_prompt_told = not sequence.is_prompt_told, True
    is_over = sequence.finish_reason is not None
    seated_s = sequence.seated_s if is_first else None
    return Delta(
        id=sequence.id,
        tokens=tuple(sequence.tokens[-kept:]),
        logprobs=logprobs,
        finish_reason=sequence.finish_reason,
        stop_token=sequence.stop_token,
        num_cached_prompt=sequence.num_cached_prompt if is_first else None,
        record=sequence.record() if is_over or sequence.wants_record else None,
        seated_for_s=None if seated_s is None else perf_counter() - seated_s,
    )
