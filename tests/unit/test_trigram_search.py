"""The compiled search, n-gram alone, against a slow, readable search over a slow, readable estimate."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest

from drafters.base import News, RowContext, Source, Verified
from drafters.calibration import first_worth
from drafters.drafter import EXPLORATION
from drafters.ngram import backoff
from drafters.ngram.cache import SUCCESSORS, extend_key, find_slot
from drafters.ngram.source import NgramFiles
from drafters.ngram.table import COUNTS, find_row, long_context_key
from drafters.tree_search import MAX_DEPTH
from tests.bench.mcts import MctsDrafter, Published
from tests.drafting import make_view
from tests.tables import entries_of
from training.ngram_table import BuildOptions, build_table
from verifier.cpu.noise import gumbel
from verifier.tree import DraftTrees

VOCAB = 30


def make(table="", exploration=0.0):
    return make_view("trigram", VOCAB, max_rows=2, files=NgramFiles(table=table), exploration=(exploration, 0.0))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "t.tri"
    options = BuildOptions(out=out, tokenizer="t", top_k=6)
    build_table(options, {str(index): index for index in range(VOCAB)}, text(7, 20, 200))
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


def taught(table, temperature=0.0, stop_ids=(), exploration=0.0):
    """A drafter with two live rows of two tenants that have seen traffic, and its rows' tokens."""
    drafter = make(table, exploration)
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
            Verified(trees, 0, candidates, logits),
        )  # fmt: skip
        drafter.update(news)
        for row in (0, 1):
            known[row].append(more[row])
    drafter.drafter.memory.worth[:] = first_worth()  # the oracle knows no calibration
    return drafter, known


def slow_estimate(drafter, row, context, floor):
    """Probability of each next token, the back-off as its docstring tells it; and how often it was seen."""
    ngram = drafter.drafter.ngram
    corpus, shares, counts, mass = ngram.corpus, defaultdict(float), defaultdict(float), 1.0
    stop = max(floor, backoff.STOP_MASS)
    for order in range(min(4, len(context)), 0, -1):
        recent = context[-order:]
        key = np.uint64(0)
        for token in reversed(recent):
            key = np.uint64(extend_key(key, token))
        found = []
        for caches, weight in ((ngram.request, backoff.REQUEST_WEIGHTS[order - 1]), (ngram.tenant, 1.0)):
            place = find_slot(caches[row], key)
            if place >= 0:
                slot = caches[row, place]
                seen = {
                    int(slot["tokens"][index]): weight * float(slot["weights"][index])
                    for index in range(SUCCESSORS)
                    if slot["weights"][index] > 0
                }
                found.append((weight * float(slot["total"]), seen, False))
        packed = 0
        if order <= 3:
            packed = (
                int(corpus[1][recent[-1]])
                if order == 1
                else int(find_row(corpus[0], (recent[0] << 20 | recent[1]) + 1))
                if order == 2
                else int(find_row(corpus[0], long_context_key(*recent)))
            )
        if packed:
            count = float(COUNTS[packed & 255])
            worth = backoff.CORPUS_WEIGHTS[order - 1] * count / (count + backoff.HALF_COUNT)
            found.append((worth, {token: worth * share for token, share in entries_of(corpus, packed)}, True))
        total = sum(part[0] for part in found)
        if total <= 0:
            continue
        given = mass / (total + backoff.SMOOTHING[order - 1])
        for _, seen, is_corpus in found:
            for token, weight in seen.items():
                if not is_corpus or given * weight >= 0.25 * floor:
                    shares[token] += given * weight
                    counts[token] += weight
        mass -= given * total
        if mass < stop:
            break
    else:
        for entry in corpus[2].tolist():
            share = mass * (entry & 4095) / 4095
            if share < 0.25 * floor:
                break
            shares[entry >> 12] += share
            counts[entry >> 12] += (entry & 4095) / 4095
    return {token: share for token, share in shares.items() if share >= 0.25 * floor}, counts


def adjusted(shares, seed, position, temperature):
    """What a candidate is worth: sharpened at temperature 0, else its chance under the shared noise."""
    power = 1.25 if temperature == 0 else 0.85 / temperature
    rivals = 4 if temperature == 0 else 16
    raised = {token: share**power for token, share in shares.items()}
    whole = sum(raised.values()) + rivals * (max(1 - sum(shares.values()), 1e-3) / 16) ** power
    found = {token: share / whole for token, share in raised.items()}
    if temperature > 0:
        reach = 0.9 * math.sqrt(min(1.0, temperature))
        rest = max(1 - sum(found.values()), 1e-3)
        rival = math.exp(math.log(rest / 16) + reach * (math.log(16) + 0.5772156649))
        found = {
            token: math.exp(math.log(max(share, 1e-9)) + reach * gumbel(np.uint64(seed), position, token))
            for token, share in found.items()
        }
        whole = sum(found.values()) + rival
        found = {token: share / whole for token, share in found.items()}
    return {token: min(0.999, share) for token, share in found.items()}


def slow_best_first(drafter, row, tokens, max_nodes, temperature):
    """Paths with scores in the order in which a heap gives them; what was seen seldom goes before at temperature 0."""
    bonus = drafter.drafter.options.exploration[0] if temperature == 0 else 0.0
    floor = 0.25 / max_nodes * (0.1 if temperature > 0 else 1.0)
    tree, heap = {(): 1.0}, []
    newest = ()
    while len(tree) < max_nodes:
        if len(newest) < MAX_DEPTH:
            score = tree[newest]
            shares, counts = slow_estimate(drafter, row, [*tokens, *newest], floor / score)
            worth = adjusted(shares, 2**63 + row, len(tokens) + len(newest), temperature)
            for token, share in worth.items():
                rank = share + bonus * math.sqrt(share * (1 - share) / (1 + counts[token]))
                heapq.heappush(heap, (-score * rank, (*newest, token), score * share))
        if not heap:
            break
        _, newest, score = heapq.heappop(heap)
        tree[newest] = score
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
@pytest.mark.parametrize("exploration", [0.0, EXPLORATION[0]])
def test_best_first_equals_the_slow_search(table, temperature, max_nodes, exploration):
    drafter, known = taught(table, temperature, exploration=exploration)
    for row, found in enumerate(proposed(drafter, [0, 1], [max_nodes, max_nodes])):
        slow = slow_best_first(drafter, row, known[row], max_nodes, temperature)
        assert len(found) == len(slow) == max_nodes
        assert np.allclose(sorted(found.values()), sorted(slow.values()), rtol=1e-3)
        common = found.keys() & slow.keys()
        assert len(common) >= max_nodes - 2  # what differs are ties at the edge
        assert all(math.isclose(found[path], slow[path], rel_tol=1e-3) for path in common)


def test_scores_fall_along_paths_and_without_a_bonus_over_the_tree(table):
    drafter, _ = taught(table)
    scores = list(proposed(drafter, [1], [64])[0].values())
    assert scores[0] == 1.0
    assert all(first >= second for first, second in pairwise(scores))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_gets_the_same_tree_alone_and_in_a_batch(table, temperature):
    drafter, _ = taught(table, temperature)
    together = proposed(drafter, [1, 0, 1], [5, 64, 20])
    assert together == [proposed(drafter, [row], [size])[0] for row, size in ((1, 5), (0, 64), (1, 20))]
    assert [len(tree) for tree in together] == [5, 64, 20]
    assert proposed(drafter, [0], [1]) == [{(): 1.0}]


def test_trees_are_no_deeper_than_they_may_be():
    drafter = make()
    drafter.start(0, RowContext("a", tuple([1, 2] * 40), 80, 0, 0.0))
    assert max(map(len, proposed(drafter, [0], [64])[0])) == drafter.max_depth == MAX_DEPTH


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_published_search_keeps_the_contract_and_wins_less(table, temperature):
    """Its visits follow the probabilities, so both begin with much the same nodes."""
    best, _ = taught(table, temperature)
    explorer = MctsDrafter(best.drafter, Published(iterations=600))
    for row in (0, 1):
        exact, explored = proposed(best, [row], [16])[0], proposed(explorer, [row], [16])[0]
        assert max(map(len, explored)) <= Published().depth
        assert sum(explored.values()) <= sum(exact.values()) * 1.001
        assert sum(explored.values()) >= sum(exact.values()) * 0.85


def test_nodes_name_their_source(table):
    drafter, _ = taught(table)
    trees = DraftTrees.allocate(1)
    drafter.propose(np.array([0], np.int32), np.array([16], np.int32), trees)
    assert trees.sources[:16].tolist() == [Source.ROOT] + [Source.TRIGRAM] * 15


def test_nothing_known_is_a_bare_root():
    drafter = make()
    drafter.start(0, RowContext("a", (3,), 1, 0, 0.0))
    assert proposed(drafter, [0], [64]) == [{(): 1.0}]


def test_nothing_is_drafted_behind_the_end_of_an_answer(table):
    drafter, known = taught(table)
    free = proposed(drafter, [0], [64])[0]
    inner = next(path[:-1] for path in free if len(path) > 1)
    for stops in ((inner[-1],), (*range(100, 140), inner[-1])):
        for row in (0, 1):
            drafter.drafter.memory.rows[row]["stops"][: len(stops)] = stops
            drafter.drafter.memory.rows[row]["num_stops"] = len(stops)
        tree = proposed(drafter, [0], [64])[0]
        assert inner in tree
        assert all(inner[-1] not in path[:-1] for path in tree)
    # The root is the exception: who goes on after an end is told to.
    after, known = taught(table, stop_ids=(known[0][-1],))
    assert len(proposed(after, [0], [64])[0]) > 1
