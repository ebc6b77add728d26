"""The budget's choices against brute force on small random cases, and the cut of packed trees."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from server.worker.admission import (
    NUM_BINS,
    Batch,
    Float64,
    believe_best,
    best_prefix,
    bin_of,
    choose_rows,
    keep,
    paying_prefix,
    survive,
)
from verifier.tree import DraftTrees

Costs = Float64
"""[M + 1] seconds of a step."""


def random_costs(rng: random.Random, kind: str, size: int = 40) -> Costs:
    """Seconds of a step: straight, with a flat start as on a GPU, or any rising numbers."""
    base, slope, knee = rng.uniform(0.2, 3.0), rng.uniform(0.01, 0.5), rng.randrange(1, 20)
    if kind == "straight":
        return base + slope * np.arange(size + 1.0)
    if kind == "flat first":
        return base + slope * np.maximum(0.0, np.arange(size + 1.0) - knee)
    return base + np.cumsum([rng.expovariate(1.0 / slope) for _ in range(size + 1)])


def random_trees(rng: random.Random, num_rows: int, most: int) -> DraftTrees:
    """Trees with any scores at all: not sorted, not below the parent's."""
    trees = DraftTrees.allocate(num_rows)
    for _ in range(num_rows):
        size = rng.randint(1, most)
        parents = [-1] + [rng.randrange(node) for node in range(1, size)]
        scores = [1.0] + [rng.choice([0.0, 0.5, rng.random(), rng.random()]) for _ in range(1, size)]
        trees.append(rng.sample(range(100), size), parents, scores, [0] + [4] * (size - 1))
    return trees


def packed(trees: DraftTrees) -> tuple[object, ...]:
    return (
        *(trees.tokens, trees.parents, trees.depths, trees.ancestors),
        *(trees.scores, trees.sources, trees.row_starts),
    )


def values_of(trees: DraftTrees, factors: list[float]) -> tuple[Float64, Float64]:
    survivals, values = np.zeros(trees.num_nodes), np.zeros(trees.num_nodes)
    survive(packed(trees), trees.num_rows, np.array(factors), survivals, values)
    return survivals, values


def closed_sets(trees: DraftTrees) -> list[list[int]]:
    """Every set of packed nodes, roots left out, that holds the parent of each of its nodes."""
    nodes = [(at, int(trees.row_starts[row]), int(trees.parents[at])) for row in range(trees.num_rows)
             for at in range(int(trees.row_starts[row]) + 1, int(trees.row_starts[row + 1]))]  # fmt: skip
    found = []
    for chosen in itertools.chain.from_iterable(itertools.combinations(nodes, n) for n in range(len(nodes) + 1)):
        held = {at for at, _, _ in chosen}
        if all(parent == 0 or start + parent in held for _, start, parent in chosen):
            found.append(sorted(held))
    return found


@pytest.mark.parametrize("kind", ["straight", "flat first", "any"])
def test_the_best_nodes_are_those_of_an_exhaustive_search(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(60):
        num_rows = rng.randint(1, 3)
        trees = random_trees(rng, num_rows, {1: 9, 2: 5, 3: 4}[num_rows])
        _, values = values_of(trees, [rng.choice([0.3, 1.0, 1.5]) for _ in range(num_rows)])
        costs, spent_s = random_costs(rng, kind), rng.choice([0.0, 0.7])
        roots = trees.row_starts[:num_rows].tolist()
        drafts = np.delete(np.arange(trees.num_nodes), roots)
        order = drafts[np.argsort(-values[drafts], kind="stable")]
        count, rate = best_prefix(values, order, (costs, num_rows, spent_s), num_rows)
        sets = closed_sets(trees)

        def rate_of(nodes: list[int], costs: Costs = costs, values: Float64 = values, num: int = num_rows,
                    spent_s: float = spent_s) -> float:  # fmt: skip
            return float((num + values[nodes].sum()) / (costs[num + len(nodes)] + spent_s))

        assert sorted(order[:count].tolist()) in sets, "a node without its parent"
        assert rate == pytest.approx(max(map(rate_of, sets)))
        assert rate == pytest.approx(rate_of(order[:count].tolist()))
        price = rng.uniform(0.1, 5.0)
        paying = paying_prefix(values, order, (costs, num_rows, 0.0), price)
        net = values[order[:paying]].sum() - price * costs[num_rows + paying]
        assert net == pytest.approx(max(values[s].sum() - price * costs[num_rows + len(s)] for s in sets))


def random_batch(rng: random.Random) -> tuple[Batch, list[list[float]]]:
    """Rows with trees that are always alike, their survivals, and drafters that take time."""
    num_rows, num_drafters = rng.randint(1, 4), rng.randint(1, 2)
    survivals = [
        sorted((rng.random() ** rng.choice([0.3, 1.0, 3.0]) for _ in range(rng.randint(0, 4))), reverse=True)
        for _ in range(num_rows)
    ]
    counts, sums = np.zeros((num_rows, NUM_BINS)), np.zeros((num_rows, NUM_BINS))
    for row, tree in enumerate(survivals):
        for one in tree:
            counts[row, bin_of(one)] += 1
            sums[row, bin_of(one)] += one
    who = np.array([rng.randrange(num_drafters) for _ in range(num_rows)])
    fixed_s = np.array([rng.choice([0.0, rng.uniform(0, 1.0)]) for _ in range(num_drafters)])
    row_s = np.array([rng.choice([0.0, rng.uniform(0, 0.2)]) for _ in range(num_rows)])
    return ((counts, sums), (who, fixed_s, row_s), float(num_rows + rng.randint(0, 2))), survivals


def best_with(batch: Batch, survivals: list[list[float]], costs: Costs, rows: tuple[int, ...]) -> float:
    """Tokens per second if exactly these rows draft and the best of their nodes are verified."""
    _, (who, fixed_s, row_s), least = batch
    spent_s = sum(fixed_s[place] for place in {int(who[row]) for row in rows}) + sum(row_s[row] for row in rows)
    nodes = sorted((one for row in rows for one in survivals[row]), reverse=True)
    return max((least + sum(nodes[:count])) / (costs[int(least) + count] + spent_s) for count in range(len(nodes) + 1))


@pytest.mark.parametrize("kind", ["straight", "flat first", "any"])
def test_the_rows_that_draft_are_nearly_those_of_an_exhaustive_search(kind: str) -> None:
    """Rows are judged one after another and their nodes in bins 12 % wide, so a little may be left."""
    rng, num_drafting, losses = random.Random(kind), 0, []
    for _ in range(400):
        batch, survivals = random_batch(rng)
        costs = random_costs(rng, kind)
        num_rows = len(survivals)
        is_in = np.ones(num_rows, np.bool_)
        _, said = choose_rows(batch, (costs, 0.0), np.zeros(8), is_in)
        subsets = itertools.chain.from_iterable(itertools.combinations(range(num_rows), n) for n in range(num_rows + 1))
        best = max(best_with(batch, survivals, costs, rows) for rows in subsets)
        rate = best_with(batch, survivals, costs, tuple(np.flatnonzero(is_in).tolist()))
        losses.append(1.0 - rate / best)
        assert said == pytest.approx(rate, rel=0.25 if kind == "any" else 0.1)
        assert rate >= 0.99 * batch[2] / costs[int(batch[2])], "slower than nobody drafting"
        num_drafting += bool(is_in.any())
    assert np.mean(losses) < 0.004
    assert max(losses) < (0.03 if kind == "straight" else 0.2)
    assert 40 < num_drafting < 400


def test_bins_fall_with_survival_and_hold_all_of_it() -> None:
    places = [int(bin_of(one)) for one in (1.0, 0.95, 0.8, 0.5, 0.1, 0.01, 1e-12, 0.0)]
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] == NUM_BINS - 1


def test_what_is_no_probability_survives_nothing_and_no_child_more_than_its_parent() -> None:
    trees = DraftTrees.allocate(2)
    trees.append([1, 2, 3, 4], [-1, 0, 1, 0], [1.0, 0.5, 0.9, float("nan")], [0, 4, 4, 4])
    trees.append([1, 2, 3], [-1, 0, 0], [1.0, 7.0, -1.0], [0, 4, 4])
    survivals, values = values_of(trees, [0.5, 2.0])
    assert survivals.tolist() == [1.0, 0.5, 0.5, 0.0, 1.0, 1.0, 0.0]
    assert values.tolist() == [2.0, 0.25, 0.25, 0.0, 2.0, 1.0, 0.0], "roots before all others"


def test_a_probe_believes_of_the_best_node_what_the_drafter_says() -> None:
    trees = DraftTrees.allocate(3)
    for _ in range(3):
        trees.append([1, 2, 3, 4, 5], [-1, 0, 1, 0, 3], [1.0, 0.5, 0.5, 0.8, 0.8], [0, 4, 4, 4, 4])
    survivals, values = values_of(trees, [0.1, 0.1, 2.0])
    believe_best(trees.row_starts, np.array([1, 2, 2], np.int32), 2, survivals, values)
    assert values.tolist() == pytest.approx(
        [2.0, 0.05, 0.05, 0.08, 0.08, 2.0, 0.05, 0.05, 0.8, 0.08, 2.0, 1.0, 1.0, 1.0, 1.0]
    )


def test_a_cut_tree_is_the_tree_without_the_nodes_that_went() -> None:
    rng = random.Random(0)
    for _ in range(200):
        num_rows = rng.randint(1, 5)
        trees = random_trees(rng, num_rows, rng.choice([1, 4, 64]))
        chosen: list[int] = []
        sums = []
        expected = DraftTrees.allocate(num_rows)
        for row in range(num_rows):
            span = trees.span(row)
            parents = trees.parents[span].tolist()
            kept = [0]
            for node in range(1, len(parents)):
                if parents[node] in kept and rng.random() < 0.6:
                    kept.append(node)
            chosen += [span.start + node for node in kept[1:]]
            sums.append(sum(trees.scores[span.start + node].item() for node in kept[1:]))
            columns = [[array[span.start + node].item() for node in kept] for array in
                       (trees.tokens, trees.scores, trees.sources)]  # fmt: skip
            expected.append(columns[0], [-1, *(kept.index(parents[node]) for node in kept[1:])], *columns[1:])
        rng.shuffle(chosen)
        memory = np.zeros(trees.num_nodes, np.bool_), np.zeros(64, np.int64), np.zeros(num_rows)
        scores = trees.scores[: trees.num_nodes].astype(np.float64)
        keep(packed(trees), num_rows, np.array(chosen, np.int64), scores, memory)
        assert not memory[0].any()
        assert memory[2].tolist() == pytest.approx(sums)
        trees.check()
        assert trees.num_nodes == expected.num_nodes
        for mine, theirs in zip(packed(trees), packed(expected), strict=True):
            size = num_rows + 1 if mine is trees.row_starts else trees.num_nodes
            assert np.array_equal(mine[:size], theirs[:size])  # type: ignore[index]
