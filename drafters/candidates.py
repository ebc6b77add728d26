"""The candidates of the nodes of one tree: working memory of the search, where every source writes what it names."""

from __future__ import annotations

from typing import Any

import numpy as np

from drafters.base import Int64
from drafters.compiled import Index, compiled
from drafters.copy import MAX_MATCHES
from drafters.ngram.cache import MAX_ORDER
from verifier.plan import MAX_TREE_NODES

WIDTH = 48
"""Most candidates that one node keeps. The best of them hold nearly all of the probability."""
SPANS = 4
"""Most copied spans in one tree."""
ROOM = WIDTH - SPANS
"""Most candidates of a node before copied spans name theirs."""
SILENT = -1.0
"""What a head is noted to have thought of a candidate where it thought nothing at all."""

_WIDE = (MAX_TREE_NODES, WIDTH)
CANDIDATES = np.dtype(
    [
        ("tokens", np.int64, _WIDE),
        ("estimates", np.float64, _WIDE),  # the n-gram's, until all sources are combined in it
        ("head_shares", np.float64, _WIDE),  # the head's estimate
        ("chances", np.float64, _WIDE),  # the calibrated estimate: the chance to be accepted if the node is
        ("ranks", np.float64, _WIDE),  # the chance with the exploration bonus; 0 once in the tree
        ("seen", np.float64, _WIDE),  # observations of the candidate in corpus and caches
        ("cells", np.int64, _WIDE),  # who named it, until it becomes its calibration cell
        ("span_cells", np.int64, _WIDE),  # cell of the copied span that says it, -1 for none
        ("spellings", np.int64, _WIDE),  # its place among the head's candidates, -1 for none
        ("alone", np.float64, (*_WIDE, 3)),  # what n-gram and head alone think (SILENT), and both without spans
        ("sizes", np.int64, (MAX_TREE_NODES,)),
        ("offers", np.float64, (MAX_TREE_NODES,)),  # rank of the node's best candidate outside the tree, -1 for none
        ("choices", np.int64, (MAX_TREE_NODES,)),  # which it is
        ("contexts", np.int64, (MAX_TREE_NODES, MAX_ORDER)),  # last token first, -1 before the text
        ("keys", np.uint64, (MAX_ORDER,)),
        ("span_starts", np.int64, (MAX_MATCHES,)),
        ("span_lengths", np.int64, (MAX_MATCHES,)),
        ("span_nodes", np.int64, (MAX_MATCHES,)),  # the node that the span has reached
        ("span_offsets", np.int64, (MAX_MATCHES,)),  # the tokens that this took
        ("num_spans", np.int64),
    ]
)


@compiled
def place_of(node: Index, token: Index, most: Index, found: Any, marks: Int64) -> Index:
    """Place of a token among the candidates of the open node, which it joins if there are fewer than `most`; or -1.

    `marks` [V] holds the place of each token among the candidates of the open node, -1 for none.
    """
    if token >= marks.size:
        return np.int64(-1)
    place = marks[token]
    if place < 0 and found.sizes[node] < most:
        place = found.sizes[node]
        marks[token] = place
        found.tokens[node, place] = token
        found.estimates[node, place] = found.head_shares[node, place] = found.seen[node, place] = 0.0
        found.cells[node, place] = 0
        found.span_cells[node, place] = found.spellings[node, place] = -1
        found.alone[node, place, 0] = found.alone[node, place, 1] = found.alone[node, place, 2] = 0.0
        found.sizes[node] = place + 1
    return place


@compiled
def offer(node: Index, score: float, found: Any) -> None:
    """Remember the best candidate of a node whose own score is `score` that is not in the tree yet."""
    choice, best = np.int64(-1), 0.0
    for index in range(found.sizes[node]):
        if found.ranks[node, index] > best:
            choice, best = np.int64(index), found.ranks[node, index]
    found.choices[node] = choice
    found.offers[node] = score * best if choice >= 0 else -1.0
