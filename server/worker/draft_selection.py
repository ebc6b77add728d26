"""Which of the drafted nodes are verified, as pure functions: the best of the whole batch, down to what still pays.

A node's value is the chance that it will be accepted, so a set of nodes is expected to win the sum of their values. The
best set of j nodes are the j of highest value over the whole batch, and a look at all j finds the best (the rule of
adaptive verification in vLLM, pull request 47808; goodput in TurboSpec, arXiv 2406.14066). No choice made here can
change a text: the token at a position is a function of seed, position and target alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.base import Source
from drafters.compiled import Index, compiled

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
Price = tuple[Float64, Index, float]
_CERTAIN = int(Source.GRAMMAR)


@compiled
def appraise(trees: Any, row_starts: Int32, factors: Float64, values: Float64) -> None:
    """Fill `values` [>= N]: the chance of every packed node to be accepted; 2 for roots, which is above all.

    Args: `trees`, parents, scores and sources of all nodes.

    A drafter's scores give the chance of a node given its parent. What such chances were worth in this row lately, the
    row's factor [R], corrects them at every level, so a drafter that hopes too much is trusted less the deeper it goes.
    What is not a probability counts as none; what a grammar makes certain is as likely as its parent.
    """
    parents, scores, sources = trees
    for row in range(factors.size):
        start = row_starts[row]
        values[start] = 2.0
        for at in range(start + 1, row_starts[row + 1]):
            above = start + parents[at]
            score, given = np.float64(scores[at]), np.float64(scores[above])
            chance = min(1.0, score / given) if score > 0.0 and given > 0.0 else 0.0  # 0 also for what is no number
            factor = 1.0 if sources[at] == _CERTAIN else factors[row]
            values[at] = min(1.0, values[above]) * min(1.0, chance * factor)


@compiled
def best_prefix(values: Float64, order: Int64, price: Price, num_sure: float) -> tuple[Index, float]:
    """How many nodes to verify so that expected tokens per second are highest, and how many these are.

    Args: `values` [N]; `order` [n] of the drafted nodes, highest value first; `price`, seconds of a step by positions
    [M + 1], how many positions it has without drafted nodes, and seconds to be added; `num_sure`, tokens that the step
    wins anyway.
    """
    table, num_fixed, extra_s = price
    last = table.size - 1
    best, best_rate = np.int64(0), num_sure / (table[min(num_fixed, last)] + extra_s)
    won = num_sure
    for index in range(order.size):
        won += values[order[index]]
        rate = won / (table[min(num_fixed + index + 1, last)] + extra_s)
        if rate > best_rate:
            best, best_rate = np.int64(index + 1), rate
    return best, best_rate


@compiled
def paying_prefix(values: Float64, order: Int64, price: Price, rate: float) -> Index:
    """How many nodes pay where a second is worth `rate` tokens. Args: see `best_prefix`."""
    table, num_fixed, _ = price
    last = table.size - 1
    best, best_net, won = np.int64(0), 0.0, 0.0
    for index in range(order.size):
        won += values[order[index]]
        net = won - rate * (table[min(num_fixed + index + 1, last)] - table[min(num_fixed, last)])
        if net > best_net:
            best, best_net = np.int64(index + 1), net
    return best


@compiled
def keep(trees: Any, num_rows: Index, chosen: Int64, memory: tuple[Any, Int64]) -> None:
    """Cut packed trees, in place, to their roots and the `chosen` packed nodes, with whom their parents are chosen.

    `trees`: tokens, parents, depths, ancestors, scores, sources, row_starts of DraftTrees.
    Working memory: whether a node stays [>= N] bool, False before and after, and new places within a tree
    [MAX_TREE_NODES].
    """
    tokens, parents, depths, ancestors, scores, sources, row_starts = trees
    is_kept, places = memory
    for index in range(chosen.size):
        is_kept[chosen[index]] = True
    write = np.int64(0)
    start = np.int64(row_starts[0])
    for row in range(num_rows):
        stop, first = np.int64(row_starts[row + 1]), write
        for at in range(start, stop):
            if at > start and not is_kept[at]:
                continue
            node = write - first
            places[at - start] = node
            parent, above = np.int64(-1), np.int64(0)
            if at > start:
                parent = places[parents[at]]
                above = ancestors[first + parent]
                is_kept[at] = False
            tokens[write], parents[write], depths[write] = tokens[at], parent, depths[at]
            ancestors[write] = above | (np.int64(1) << node)
            scores[write], sources[write] = scores[at], sources[at]
            write += 1
        row_starts[row + 1] = write
        start = stop


@compiled
def compare(drafted: Any, starts: Int32, won: Int64, expected: Float64, accepted: Float64) -> None:
    """Walk each drafted tree along the tokens that its row won, whether or not its nodes were verified.

    At each node on the way the children were put to the test: one of them at most came true. So drafts that were cut
    away teach as well as those that were verified, and what is known of a row never goes stale while it drafts.

    Certain tokens are passed by: they say nothing of drafters.

    Args: `drafted`, tokens, parents, scores, sources and row_starts of the trees before they were cut; row r won
    won[starts[r] : starts[r + 1]]. Fills `expected` [R], the summed chances of the nodes that were put to the test,
    and `accepted` [R], how many of these came true.
    """
    tokens, parents, scores, sources, row_starts = drafted
    for row in range(expected.size):
        start, stop = row_starts[row], row_starts[row + 1]
        expected[row] = accepted[row] = 0.0
        node = start
        for place in range(starts[row], starts[row + 1]):
            total, found = 0.0, np.int64(-1)
            given = np.float64(scores[node])
            for at in range(node + 1, stop):
                if start + parents[at] == node:
                    total += np.float64(scores[at])
                    if tokens[at] == won[place]:
                        found = np.int64(at)
            if found >= 0 and sources[found] == _CERTAIN:
                node = found
                continue
            if total <= 0.0 or not given > 0.0:
                break
            expected[row] += min(1.0, total / given)
            if found < 0:
                break
            accepted[row] += 1.0
            node = found
