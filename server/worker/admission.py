"""Which rows draft in a step, and which of the drafted nodes are verified: the budget's choices, as pure functions.

Both maximise expected tokens per second. A node's survival is the chance that it will be accepted, so a set of nodes is
expected to win the sum of their survivals. What a step costs is known for every size; then the best set of j nodes are
the j of highest survival over the whole batch, and a look at all j finds the best (the rule of adaptive verification in
vLLM, pull request 47808; goodput in TurboSpec, arXiv 2406.14066). No choice made here can change a text: the token at a
position is a function of seed, position and target alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.compiled import Index, compiled, inlined

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]

NUM_BINS = 40
"""Survivals are counted in bins, the highest first."""
_PER_OCTAVE = 6.0

Worth = tuple[Float64, Float64]
"""[R, NUM_BINS] expected nodes by bin of survival, and the sum of their survivals."""
Drafters = tuple[Int64, Float64, Float64]
"""[R] who drafts for a row; [G] seconds of asking a drafter at all; [R] seconds of the row's tree."""
Batch = tuple[Worth, Drafters, float]
"""R rows that may draft, who drafts for them, and how many rows the step has in all: each wins one token at least."""
Prices = tuple[Float64, float]
"""[M + 1] seconds of a step by positions, and what is to be added to all of them."""
Packed = tuple[Int64, Int32, Int32, Int64, Any, Any, Int32]
"""tokens, parents, depths, ancestors, scores, sources, row_starts of DraftTrees."""
Scratch = tuple[Bools, Int64, Float64]
"""Working memory of `keep`: whether a node stays [>= N], False before and after; its new place within its tree
[MAX_TREE_NODES]; and what is set: the sum of the survivals of what stays of each tree, root left out [>= num_rows]."""

_ENOUGH = 1.0001
"""A rate that is higher by less is the same."""


@inlined
def bin_of(survival: Any) -> Index:
    """The bin of a survival in 0 .. 1."""
    octaves = -math.log2(max(survival, 1e-9))
    return np.int64(min(NUM_BINS - 1.0, octaves * _PER_OCTAVE))


@inlined
def _seconds(positions: Any, prices: Prices) -> Any:
    """Seconds of a step of so many positions, which need not be a whole number."""
    table, extra = prices
    low: Index = min(np.int64(positions), table.size - 1)
    high: Index = min(low + 1, table.size - 1)
    return table[low] + (positions - low) * (table[high] - table[low]) + extra


@compiled
def _best_bin(batch: Batch, prices: Prices, rate: float, found: Float64, is_in: Bools) -> Index:
    """Down to which bin nodes of the rows that are in pay at `rate` tokens per second; -1 for none at all.

    `found` [2] gets their number and what they are expected to win.
    """
    (counts, sums), _, least = batch
    best, best_net = np.int64(-1), 0.0
    bare = _seconds(least, prices)
    num_nodes, gain = 0.0, 0.0
    for index in range(NUM_BINS):
        for row in range(is_in.size):
            if is_in[row]:
                num_nodes += counts[row, index]
                gain += sums[row, index]
        net = gain - rate * (_seconds(least + num_nodes, prices) - bare)
        if net > best_net:
            best, best_net = np.int64(index), net
            found[0], found[1] = num_nodes, gain
    return best


@compiled
def _drop(batch: Batch, prices: Prices, last: Index, rate: float, memory: Float64, is_in: Bools) -> bool:
    """Take out rows, then drafters, whose nodes down to bin `last` win less than what the step saves without them.

    Returns whether there were any. `memory` [>= 3 G].
    """
    (counts, sums), (who, fixed_s, row_s), least = batch
    num_drafters = fixed_s.size
    saved, gains, nodes = memory[:num_drafters], memory[num_drafters:], memory[2 * num_drafters :]
    memory[: 3 * num_drafters] = 0.0
    size = least
    for row in range(is_in.size):
        if is_in[row]:
            for index in range(last + 1):
                size += counts[row, index]
    is_dropped = False
    for row in range(is_in.size):
        if is_in[row]:
            drafter, gain, num_nodes = who[row], 0.0, 0.0
            for index in range(last + 1):
                gain += sums[row, index]
                num_nodes += counts[row, index]
            lower = _seconds(size - num_nodes, prices)
            if gain > rate * (_seconds(size, prices) - lower + row_s[row]):
                saved[drafter] += row_s[row]
                gains[drafter] += gain
                nodes[drafter] += num_nodes
            else:
                is_in[row], is_dropped = False, True
                size -= num_nodes
    for row in range(is_in.size):
        if is_in[row]:
            drafter = who[row]
            lower = _seconds(size - nodes[drafter], prices)
            spared = _seconds(size, prices) - lower + saved[drafter] + fixed_s[drafter]
            if gains[drafter] <= rate * spared:
                is_in[row], is_dropped = False, True
    return is_dropped


@compiled
def choose_rows(batch: Batch, prices: Prices, memory: Float64, is_in: Bools) -> tuple[Index, float]:
    """Take rows out of `is_in` [R] as long as that raises the expected tokens per second of the step.

    Dinkelbach's method for a ratio: with a rate given, rows and nodes are judged one by one by what they win less what
    their time could have won elsewhere; the choice made gives a higher rate, until there is none. Rates only rise, so
    who does not pay at one will not at the next. Returns the last bin whose nodes pay, -1 for none, and the rate.
    `memory` [3 G + 2].
    """
    _, (who, fixed_s, row_s), least = batch
    num_drafters = fixed_s.size
    found = memory[3 * num_drafters :]
    rate = least / _seconds(least, prices)
    while True:
        last = _best_bin(batch, prices, rate, found, is_in)
        if last < 0:
            is_in[:] = False
            return last, rate
        if _drop(batch, prices, last, rate, memory, is_in):
            continue
        spent = _seconds(least + found[0], prices)
        memory[:num_drafters] = 0.0
        for row in range(is_in.size):
            if is_in[row]:
                spent += row_s[row]
                memory[who[row]] = 1.0
        for drafter in range(num_drafters):
            spent += memory[drafter] * fixed_s[drafter]
        higher = (least + found[1]) / spent
        if higher <= rate * _ENOUGH:
            return last, rate
        rate = higher


@compiled
def best_prefix(
    survivals: Float64, order: Int64, step: tuple[Float64, Index, float], sure: Index
) -> tuple[Index, float]:
    """How many nodes to verify so that expected tokens per second are highest, and how many these are.

    Args:
        survivals: by packed node [N].
        order: [n] of the drafted nodes, highest survival first.
        step: seconds of a step by positions [M + 1], how many positions it has without drafted nodes, and how many
            seconds are to be added for what was spent on it already.
        sure: tokens that the step wins anyway.
    """
    table, least, spent = step
    last = table.size - 1
    best, best_rate = np.int64(0), sure / (table[min(least, last)] + spent)
    won = np.float64(sure)
    for index in range(order.size):
        won += survivals[order[index]]
        rate = won / (table[min(least + index + 1, last)] + spent)
        if rate > best_rate:
            best, best_rate = np.int64(index + 1), rate
    return best, best_rate


@compiled
def paying_prefix(survivals: Float64, order: Int64, step: tuple[Float64, Index, float], rate: float) -> Index:
    """How many nodes pay where a second is worth `rate` tokens. Args: see `best_prefix`."""
    table, least, _ = step
    last = table.size - 1
    best, best_net, won = np.int64(0), 0.0, 0.0
    for index in range(order.size):
        won += survivals[order[index]]
        net = won - rate * (table[min(least + index + 1, last)] - table[min(least, last)])
        if net > best_net:
            best, best_net = np.int64(index + 1), net
    return best


@compiled
def survive(out: Packed, num_rows: Index, factors: Float64, survivals: Float64, values: Float64) -> None:
    """Survival of every packed node: what the drafter expects of it, and that corrected by its row's factor [R].

    A node cannot survive where its parent does not, so neither number is higher than the parent's; what is not a
    probability counts as none. `survivals` and `values` [>= N] are filled; roots get 1 and 2, which is above all.
    """
    scores, parents, row_starts = out[4], out[1], out[6]
    for row in range(num_rows):
        start = row_starts[row]
        survivals[start], values[start] = 1.0, 2.0
        for at in range(start + 1, row_starts[row + 1]):
            score, above = np.float64(scores[at]), start + parents[at]
            survivals[at] = min(score, survivals[above]) if score >= 0.0 else 0.0  # 0 also for what is not a number
            values[at] = min(1.0, survivals[at] * factors[row], values[above])


@compiled
def believe_best(row_starts: Int32, reasons: Int32, reason: Index, survivals: Float64, values: Float64) -> None:
    """Of the best node of each tree that was drafted for `reason`, believe what the drafter says."""
    for row in range(reasons.size):
        if reasons[row] == reason and row_starts[row + 1] - row_starts[row] > 1:
            best = row_starts[row] + 1
            for at in range(best + 1, row_starts[row + 1]):
                if survivals[at] > survivals[best]:
                    best = np.int64(at)
            values[best] = max(values[best], survivals[best])


@compiled
def keep(trees: Packed, num_rows: Index, chosen: Int64, survivals: Float64, memory: Scratch) -> None:
    """Cut packed trees, in place, to their roots and the `chosen` packed nodes, with whom their parents are chosen.

    `survivals` [N] are summed up over what stays of each tree.
    """
    tokens, parents, depths, ancestors, scores, sources, row_starts = trees
    is_kept, places, expected = memory
    for index in range(chosen.size):
        is_kept[chosen[index]] = True
    write = np.int64(0)
    start = np.int64(row_starts[0])
    for row in range(num_rows):
        stop, first = np.int64(row_starts[row + 1]), write
        expected[row] = 0.0
        for at in range(start, stop):
            if at > start and not is_kept[at]:
                continue
            node = write - first
            places[at - start] = node
            parent, above = np.int64(-1), np.int64(0)
            if at > start:
                parent = places[parents[at]]
                above = ancestors[first + parent]
                expected[row] += survivals[at]
                is_kept[at] = False
            tokens[write], parents[write], depths[write] = tokens[at], parent, depths[at]
            ancestors[write] = above | (np.int64(1) << node)
            scores[write], sources[write] = scores[at], sources[at]
            write += 1
        row_starts[row + 1] = write
        start = stop
