"""Clean trees from guessed paths."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from drafters import trie
from drafters.base import Source
from verifier.tree import DraftTrees

PATHS = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0.0, 1.0, width=32)), min_size=1, max_size=6), max_size=12
)


def built(paths, max_nodes):
    trees = DraftTrees.allocate(2)
    trees.append_root(9)
    tokens = [[token for token, _ in path] for path in paths]
    scores = [[score for _, score in path] for path in paths]
    trie.build(trees, 7, tokens, scores, max_nodes=max_nodes)
    return trees


def prefixes(trees, index):
    span = trees.span(index)
    tokens, parents = trees.tokens[span].tolist(), trees.parents[span].tolist()
    found = [()]
    for node in range(1, len(tokens)):
        found.append((*found[parents[node]], tokens[node]))
    return found


@settings(deadline=None)
@given(PATHS, st.integers(1, 64))
def test_tree_is_clean_and_grows_only_from_the_paths(paths, max_nodes):
    trees = built(paths, max_nodes)
    trees.check([1, max_nodes])
    span = trees.span(1)
    scores, parents = trees.scores[span], trees.parents[span]
    assert trees.tokens[span][0] == 7
    assert scores[0] == 1.0
    assert all(scores[node] <= scores[parents[node]] for node in range(1, len(scores)))
    known = {tuple(token for token, _ in path[:stop]) for path in paths for stop in range(len(path) + 1)} | {()}
    found = prefixes(trees, 1)
    assert set(found) <= known
    assert len(found) == min(max_nodes, len(known))
    assert set(trees.sources[span][1:].tolist()) <= {int(Source.OTHER)}


@settings(deadline=None)
@given(PATHS)
def test_a_smaller_tree_is_the_beginning_of_a_larger_one(paths):
    large = prefixes(built(paths, 64), 1)
    for size in (1, 2, 5):
        assert prefixes(built(paths, size), 1) == large[:size]


def test_equal_prefixes_keep_the_best_estimate():
    best = built([[(1, 0.5), (2, 0.25)], [(1, 0.25), (3, 0.25)]], 64)
    assert best.scores[best.span(1)].tolist() == [1.0, 0.5, 0.25, 0.25]


def test_the_least_probable_nodes_are_left_out():
    trees = built([[(1, 0.9), (2, 0.1)], [(3, 0.6), (4, 0.5)]], 4)
    assert prefixes(trees, 1) == [(), (1,), (3,), (3, 4)]
