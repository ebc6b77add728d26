"""Which hidden states of a step are news of which row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.base import HiddenStates, Int32
from verifier.plan import Chunk, TreeSlot
from verifier.tree import DraftTrees
from verifier.verdict import Hidden, Verdict


def tree_states(
    verdict: Verdict, trees: DraftTrees, slots: Sequence[TreeSlot], first: int, counts: Int32
) -> HiddenStates:
    """States of the nodes that predicted the tokens which rows won in their trees: the root and accepted nodes.

    Args: `slots` are those of all trees of the step; trees first, first + 1, ... kept counts[0], counts[1], ... tokens
    each, at least one.
    """
    assert verdict.hidden is not None, "a verdict without states"
    stop = first + counts.size
    roots = trees.row_starts[first:stop, None].astype(np.int64)
    nodes = np.concatenate([roots, roots + verdict.nodes[first:stop]], axis=1)
    return HiddenStates(
        rows=verdict.rows[first:stop],
        starts=_starts(counts),
        first=np.array([slot.num_cached for slot in slots[first:stop]], np.int64),
        states=_pick(verdict.hidden.states, nodes[np.arange(nodes.shape[1]) < counts[:, None]]),
    )


def chunk_states(hidden: Hidden, chunks: Sequence[Chunk], chosen: Sequence[int], window: int) -> HiddenStates:
    """At most `window` last states of each of the `chosen` chunks (indices)."""
    stops = hidden.chunk_starts[1:][chosen].astype(np.int64)
    counts = np.minimum(stops - hidden.chunk_starts[chosen], window)
    ends = [chunks[index].num_cached + len(chunks[index].tokens) for index in chosen]
    return HiddenStates(
        rows=np.array([chunks[index].row for index in chosen], np.int32),
        starts=_starts(counts),
        first=np.array(ends, np.int64) - counts,
        states=_pick(
            hidden.states,
            np.concatenate([np.arange(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]),
        ),
    )


def _starts(counts: NDArray[np.integer[Any]]) -> Int32:
    starts = np.zeros(counts.size + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _pick(states: Any, places: NDArray[np.int64]) -> Any:
    """These rows of `states` [K, H]: without a copy if they are neighbours, as after a chunk or with a chain."""
    first, count = int(places[0]), places.size
    if int(places[-1]) - first == count - 1 and bool((np.diff(places) == 1).all()):
        return states[first : first + count]
    import torch  # a target that makes no states needs none of it

    return states.index_select(0, torch.from_numpy(places).to(states.device))
