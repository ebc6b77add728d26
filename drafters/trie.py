"""Clean trees from guessed continuations: siblings distinct, parents before children, never above the node limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from drafters.base import Source
from verifier.tree import DraftTrees


@dataclass(slots=True)
class _Node:
    token: int
    score: float
    source: int
    children: dict[int, _Node] = field(default_factory=dict)


def build(
    out: DraftTrees,
    root: int,
    paths: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    *,
    max_nodes: int,
    source: int = Source.OTHER,
) -> None:
    """Append one tree to `out`: the prefixes of `paths` below the token `root`, most probable first.

    Args:
        paths: continuations of the root, best-known first; equal prefixes become one node.
        scores: for each path the estimated probability that its first 1, 2, ... tokens are accepted (same lengths).
            A node gets the best estimate of the paths through it, and never more than its parent.
        max_nodes: most nodes, root included; the least probable ones are left out.
        source: which kind of guess this is, for the metrics.
    """
    assert max_nodes >= 1, f"a tree of {max_nodes} nodes"
    top = _Node(root, 1.0, Source.ROOT)
    for path, estimates in zip(paths, scores, strict=True):
        _insert(top, path, estimates, source)
    tokens, parents, values, sources = [root], [-1], [1.0], [int(Source.ROOT)]
    frontier: list[tuple[float, int, int, _Node]] = []  # -score, order of arrival, parent, node
    arrivals = 0

    def offer(parent: int, node: _Node) -> None:
        nonlocal arrivals
        for child in node.children.values():
            score = min(child.score, values[parent])
            heappush(frontier, (-score, arrivals, parent, child))
            arrivals += 1

    offer(0, top)
    while frontier and len(tokens) < max_nodes:
        negative, _, parent, node = heappop(frontier)
        tokens.append(node.token)
        parents.append(parent)
        values.append(-negative)
        sources.append(node.source)
        offer(len(tokens) - 1, node)
    out.append(tokens, parents, values, sources)


def _insert(top: _Node, path: Sequence[int], estimates: Sequence[float], source: int) -> None:
    assert len(path) == len(estimates), f"{len(path)} tokens with {len(estimates)} scores"
    node = top
    for token, score in zip(path, estimates, strict=True):
        child = node.children.get(token)
        if child is None:
            child = node.children[token] = _Node(token, score, source)
        else:
            child.score = max(child.score, score)
        node = child
