"""Clean trees from guessed continuations: siblings distinct, parents before children, never above the node limit."""

from __future__ import annotations

from collections.abc import Sequence

from drafters.base import Source
from verifier.tree import DraftTrees


def build(
    out: DraftTrees,
    root: int,
    paths: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    *,
    max_nodes: int,
) -> None:
    """Append one tree to `out`: the prefixes of `paths` below the token `root`, most probable first.

    Args:
        paths: continuations of the root, best-known first; equal prefixes become one node.
        scores: for each path the estimated probability that its first 1, 2, ... tokens are accepted (same lengths).
            A node gets the best estimate of the paths through it, and never more than its parent.
        max_nodes: most nodes, root included; the least probable ones are left out.
    """
    assert max_nodes >= 1, f"a tree of {max_nodes} nodes"
    best: dict[tuple[int, ...], float] = {}  # by prefix; a prefix comes behind those that it goes on from
    for path, estimates in zip(paths, scores, strict=True):
        assert len(path) == len(estimates), f"{len(path)} tokens with {len(estimates)} scores"
        for depth, score in enumerate(estimates, 1):
            prefix = tuple(path[:depth])
            best[prefix] = max(score, best.get(prefix, 0.0))
    capped: dict[tuple[int, ...], float] = {(): 1.0}
    for prefix, score in best.items():
        capped[prefix] = min(score, capped[prefix[:-1]])
    kept = sorted(capped, key=lambda prefix: -capped[prefix])[:max_nodes]  # stable: parents stay before children
    places = {prefix: place for place, prefix in enumerate(kept)}
    out.append(
        [root, *(prefix[-1] for prefix in kept[1:])],
        [-1, *(places[prefix[:-1]] for prefix in kept[1:])],
        [capped[prefix] for prefix in kept],
        [Source.ROOT, *[Source.OTHER] * (len(kept) - 1)],
    )
