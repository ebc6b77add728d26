"""The constraints of a step's rows: what they do to its trees, and to what may be chosen."""

from __future__ import annotations

import numpy as np

from server.worker.constraint import num_words
from server.worker.roster import Roster
from verifier.masks import TokenMasks
from verifier.plan import StepPlan
from verifier.tree import DraftTrees


def guide_trees(plan: StepPlan, trees: DraftTrees, roster: Roster) -> None:
    """Take the nodes out that a row's constraint forbids, and add those it makes certain, in place."""
    constraints = [roster.sequence(slot.row).constraint for slot in plan.trees]
    if not any(constraints):
        return
    guided = []
    for index, (slot, constraint) in enumerate(zip(plan.trees, constraints, strict=True)):
        if constraint is None:
            nodes = trees.span(index)
            arrays = (trees.tokens, trees.parents, trees.scores, trees.sources)
            tokens, parents, scores, sources = (array[nodes].tolist() for array in arrays)
            guided.append((tokens, parents, scores, sources))
        else:
            guided.append(constraint.guide(trees, index, slot.max_nodes))
    trees.clear()
    for tree in guided:
        trees.append(*tree)


def masks_of(plan: StepPlan, trees: DraftTrees, roster: Roster, vocab_size: int) -> TokenMasks | None:
    """What may be chosen at the places of constrained rows: all nodes of their trees, the ends of their last chunks."""
    places: list[int] = []
    parts = []
    for index, slot in enumerate(plan.trees):
        constraint = roster.sequence(slot.row).constraint
        if constraint is not None:
            nodes = trees.span(index)
            bits = np.empty((nodes.stop - nodes.start, num_words(vocab_size)), np.int32)
            constraint.fill(trees.tokens[nodes].tolist(), trees.parents[nodes].tolist(), bits)
            places += range(nodes.start, nodes.stop)
            parts.append(bits)
    last = [chunk.row for chunk in plan.chunks if chunk.is_last]
    for place, row in enumerate(last, trees.num_nodes):
        constraint = roster.sequence(row).constraint
        if constraint is not None:
            bits = np.empty((1, num_words(vocab_size)), np.int32)
            constraint.fill([0], [-1], bits)
            places.append(place)
            parts.append(bits)
    return TokenMasks(np.array(places, np.int64), np.concatenate(parts)) if places else None
