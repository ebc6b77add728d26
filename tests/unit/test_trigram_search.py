"""The draft makers against a slow, readable search over a slow, readable estimate."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from drafters.base import News, RowContext, Source, Verified
from drafters.ngram.backoff import BlendOptions
from drafters.ngram.cache import SUCCESSORS, TOKENS, TOTAL, WEIGHTS, extend_key, find_slot
from drafters.ngram.drafter import ExploreOptions, LayerOptions, TrigramDrafter, TrigramOptions
from drafters.ngram.table import Table, find_row, long_context_key
from training.ngram_counts import BuildOptions, build_table
from verifier.noise import gumbel
from verifier.tree import DraftTrees

VOCAB = 30
LAYER = LayerOptions(
    slots=256, decay=0.9, committed=0.5, verified=1.0, committed_orders=(1, 2, 3, 4), verified_orders=(1, 2, 3)
)
OPTIONS = TrigramOptions(vocab_size=VOCAB, request=LAYER, tenant=replace(LAYER, slots=1024), max_rows=4, max_tenants=2)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "t.tri"
    options = BuildOptions(files=(), out=out, tokenizer="t", top_k=6, shows_progress=False)
    build_table(
        options, lambda texts: [], {str(index): index for index in range(VOCAB)}, token_streams=text(7, 20, 200)
    )
    return str(out)


def text(seed, documents, length):
    """Documents with likely and unlikely successors."""
    random = np.random.default_rng(seed)
    follow = np.random.default_rng(5).integers(0, VOCAB, (VOCAB, 4))
    for _ in range(documents):
        tokens = [int(random.integers(VOCAB))]
        while len(tokens) < length:
            tokens.append(int(follow[tokens[-1], min(3, random.geometric(0.5) - 1)]))
        yield tokens


def taught(options, temperature=0.0, is_shown=True, stop_ids=()):
    """A drafter with two live rows of two tenants that have seen traffic, and its rows' tokens.

    Without `is_shown` it saw no candidates, so that what it learned does not depend on its trees.
    """
    drafter = TrigramDrafter(options)
    known = {}
    trees = DraftTrees.allocate(2)
    random = np.random.default_rng(3)
    for row, tokens in enumerate(text(11, 2, 60)):
        known[row] = tokens
        drafter.start(row, RowContext(f"tenant {row}", tuple(tokens), 60, 2**63 + row, temperature, stop_ids))
    for more in zip(*(tokens for tokens in text(12, 2, 30)), strict=True):
        trees.clear()
        drafter.propose(np.array([0, 1], np.int32), np.array([8, 8], np.int32), trees)
        candidates = random.integers(0, VOCAB, (trees.num_nodes, 4)).astype(np.int32)
        logits = -np.sort(random.exponential(2, (trees.num_nodes, 4)).astype(np.float32))
        news = News(
            np.array([0, 1], np.int32), np.array([0, 1, 2], np.int32), np.array(more, np.int64),
            Verified(trees, 0, candidates, logits) if is_shown else None,
        )  # fmt: skip
        drafter.read(news)
        for row in (0, 1):
            known[row].append(more[row])
    return drafter, known


def slow_estimate(drafter, options, row, context, floor):
    """Probability of each next token: the blend as its docstring tells it."""
    table, blend = Table.open(options.table), options.blend
    shares, mass = defaultdict(float), 1.0
    stop = max(floor, blend.stop_mass)
    layers = ((drafter._request, row, blend.request), (drafter._tenant, row, blend.tenant))
    for order in range(min(4, len(context)), 0, -1):
        recent = context[-order:]
        key = np.uint64(0)
        for token in reversed(recent):
            key = np.uint64(extend_key(key, token))
        found = []
        for pool, layer, weights in layers:
            slot = find_slot(pool.words, layer * pool.slots, pool.slots, key)
            if slot >= 0:
                weight = weights[order - 1]
                seen = {
                    int(pool.words[slot, TOKENS + place]): weight * float(pool.floats[slot, WEIGHTS + place])
                    for place in range(SUCCESSORS)
                    if pool.floats[slot, WEIGHTS + place] > 0
                }
                found.append((weight * float(pool.floats[slot, TOTAL]), seen, False))
        packed = 0
        if order <= 3:
            corpus = table.corpus
            packed = (
                int(corpus[1][recent[-1]])
                if order == 1
                else int(find_row(corpus[0], (recent[0] << 20 | recent[1]) + 1))
                if order == 2
                else int(find_row(corpus[0], long_context_key(*recent)))
            )
        if packed:
            count = float(table.corpus[4][packed & 255])
            worth = blend.corpus[order - 1] * count / (count + blend.half_count)
            found.append((worth, {token: worth * share for token, share in table._entries(packed)}, True))
        total = sum(part[0] for part in found)
        if total <= 0:
            continue
        given = mass / (total + blend.smoothing[order - 1])
        for _, seen, is_corpus in found:
            for token, weight in seen.items():
                if not is_corpus or given * weight >= 0.25 * floor:
                    shares[token] += given * weight
        mass -= given * total
        if mass < stop:
            return shares
    for entry in table.corpus[2].tolist():
        share = mass * (entry & 4095) / 4095
        if share < 0.25 * floor:
            break
        shares[entry >> 12] += share
    return shares


def adjusted(shares, seed, position, temperature, trust):
    """What a candidate is worth: sharpened at temperature 0, else its chance under the shared noise."""
    rest = 1 - sum(shares.values())
    if temperature == 0:
        raised = {token: share**1.25 for token, share in shares.items()}
        total = sum(raised.values()) + 16 * (max(rest, 1e-9) / 16) ** 1.25
        return {token: share / total for token, share in raised.items()}
    standing = {
        token: math.log(max(share, 1e-9)) / temperature + gumbel(np.uint64(seed), position, token)
        for token, share in shares.items()
    }
    rival = math.log(max(rest, 1e-3) / 16) / temperature + math.log(16) + 0.5772156649
    powers = {token: math.exp(trust * value) for token, value in standing.items()}
    total = sum(powers.values()) + math.exp(trust * rival)
    return {token: value / total for token, value in powers.items()}


def slow_best_first(drafter, options, row, tokens, max_nodes, temperature):
    """Paths with scores in the order in which a heap gives them."""
    floor = max(options.min_score, options.cut / max_nodes)
    tree, heap = {(): 1.0}, []
    newest = ()
    while len(tree) < max_nodes:
        if len(newest) < options.max_depth:
            score = tree[newest]
            shares = slow_estimate(drafter, options, row, [*tokens, *newest], floor / score)
            worth = adjusted(shares, 2**63 + row, len(tokens) + len(newest), temperature, options.trust)
            for token, share in worth.items():
                heapq.heappush(heap, (-score * share, (*newest, token)))
        if not heap:
            break
        negative, newest = heapq.heappop(heap)
        if -negative < options.min_score:
            break
        tree[newest] = -negative
    return tree


def proposed(drafter, rows, sizes):
    trees = DraftTrees.allocate(len(rows))
    drafter.propose(np.array(rows, np.int32), np.array(sizes, np.int32), trees)
    trees.check(sizes)
    found = []
    for index in range(len(rows)):
        span = trees.span(index)
        tokens, parents = trees.tokens[span].tolist(), trees.parents[span].tolist()
        paths = [()]
        for node in range(1, len(tokens)):
            paths.append((*paths[parents[node]], tokens[node]))
        found.append(dict(zip(paths, trees.scores[span].tolist(), strict=True)))
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("max_nodes", [2, 8, 64])
def test_best_first_equals_the_slow_search(table, temperature, max_nodes):
    options = replace(OPTIONS, table=table)
    drafter, known = taught(options, temperature)
    for row, found in enumerate(proposed(drafter, [0, 1], [max_nodes, max_nodes])):
        slow = slow_best_first(drafter, options, row, known[row], max_nodes, temperature)
        assert len(found) == len(slow) == max_nodes
        assert np.allclose(sorted(found.values()), sorted(slow.values()), rtol=1e-3)
        common = found.keys() & slow.keys()
        assert len(common) >= max_nodes - 2  # what differs are ties at the edge
        assert all(math.isclose(found[path], slow[path], rel_tol=1e-3) for path in common)


def test_scores_fall_along_paths_and_over_the_tree(table):
    drafter, _ = taught(replace(OPTIONS, table=table))
    scores = list(proposed(drafter, [1], [64])[0].values())
    assert scores[0] == 1.0
    assert all(first >= second for first, second in pairwise(scores))


@pytest.mark.parametrize("search", ["best-first", "explore"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_gets_the_same_tree_alone_and_in_a_batch(table, search, temperature):
    options = replace(OPTIONS, table=table, search=search, explore=ExploreOptions(iterations=60))
    drafter, _ = taught(options, temperature)
    together = proposed(drafter, [1, 0, 1], [5, 64, 20])
    assert together == [proposed(drafter, [row], [size])[0] for row, size in ((1, 5), (0, 64), (1, 20))]
    assert [len(tree) for tree in together] == [5, 64, 20]
    assert proposed(drafter, [0], [1]) == [{(): 1.0}]


def test_limits_are_kept(table):
    shallow, _ = taught(replace(OPTIONS, table=table, max_depth=2))
    assert max(map(len, proposed(shallow, [0], [64])[0])) == 2
    picky, _ = taught(replace(OPTIONS, table=table, min_score=0.05))
    tree = proposed(picky, [0], [64])[0]
    assert 1 < len(tree) < 64
    assert min(tree.values()) >= 0.05
    explorer, _ = taught(replace(OPTIONS, table=table, search="explore", explore=ExploreOptions(depth=3)))
    assert max(map(len, proposed(explorer, [0], [64])[0])) == 3


def test_explore_prefers_what_best_first_prefers(table):
    """With its large bonus the visits follow the probabilities, so both begin with much the same nodes."""
    options = replace(OPTIONS, table=table, cut=0.0)
    best, _ = taught(options, is_shown=False)
    patient = ExploreOptions(iterations=600)
    explorer, _ = taught(replace(options, search="explore", explore=patient), is_shown=False)
    for row in (0, 1):
        exact, explored = proposed(best, [row], [16])[0], proposed(explorer, [row], [16])[0]
        assert sum(explored.values()) <= sum(exact.values()) * 1.001
        assert sum(explored.values()) >= sum(exact.values()) * 0.85


def test_nodes_name_their_source(table):
    drafter, _ = taught(replace(OPTIONS, table=table))
    trees = DraftTrees.allocate(1)
    drafter.propose(np.array([0], np.int32), np.array([16], np.int32), trees)
    assert trees.sources[:16].tolist() == [Source.ROOT] + [Source.TRIGRAM] * 15


def test_nothing_known_is_a_bare_root():
    drafter = TrigramDrafter(replace(OPTIONS, blend=BlendOptions()))
    drafter.start(0, RowContext("a", (3,), 1, 0, 0.0))
    assert proposed(drafter, [0], [64]) == [{(): 1.0}]


@pytest.mark.parametrize("search", ["best-first", "explore"])
def test_nothing_is_drafted_behind_the_end_of_an_answer(table, search):
    options = replace(OPTIONS, table=table, search=search, explore=ExploreOptions(depth=5))
    drafter, known = taught(options, is_shown=False)
    free = proposed(drafter, [0], [64])[0]
    inner = next(path[:-1] for path in free if len(path) > 1)
    ending, _ = taught(options, is_shown=False, stop_ids=(inner[-1],))
    tree = proposed(ending, [0], [64])[0]
    assert inner in tree
    assert all(inner[-1] not in path[:-1] for path in tree)
    # The root is the exception: who goes on after an end is told to.
    after, _ = taught(options, is_shown=False, stop_ids=(known[0][-1],))
    assert len(proposed(after, [0], [64])[0]) > 1


def test_the_deepest_node_is_announced():
    assert TrigramDrafter(replace(OPTIONS, max_depth=7)).max_depth == 7
    assert TrigramDrafter(replace(OPTIONS, search="explore", explore=ExploreOptions(depth=4))).max_depth == 4
