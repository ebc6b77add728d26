"""The copy source: what it finds, what is made of it, what is learned, and how much it remembers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters import COPY
from drafters import copy as texts
from drafters.base import News, RowContext, Source
from drafters.calibration import SPAN_CELLS, first_rates, span_cell
from drafters.copy import LONGEST, MAX_MATCHES, SEPARATOR, CopySource, copied_token, match
from tests.bench.simulate import Recording, simulate
from tests.drafting import make_view, read, tree
from verifier.tree import DraftTrees, walk


def context(tokens, prediction=(), num_prompt=None, temperature=0.0, stop_ids=()):
    count = len(tokens) if num_prompt is None else num_prompt
    return RowContext("a", tuple(tokens), count, 1, temperature, tuple(stop_ids), tuple(prediction))


VOCAB = 3000


def copier():
    return make_view("suffix", VOCAB)


def drafted(drafter, row=0, max_nodes=16):
    trees = tree(drafter, row, max_nodes)
    return trees.tokens[trees.span(0)].tolist()


def found(row_texts, row=0, limit=4):
    starts, lengths = np.zeros(MAX_MATCHES, np.int64), np.zeros(MAX_MATCHES, np.int64)
    count = match(row, limit, row_texts.texts, starts, lengths)
    return list(zip(starts[:count].tolist(), lengths[:count].tolist(), strict=True))


def naive(tokens, limit):
    """Every place is tried, every match measured; SEPARATOR matches nothing."""
    candidates = []
    for start in range(1, len(tokens)):
        length = 0
        while (
            length < min(start, LONGEST)
            and tokens[start - 1 - length] == tokens[-1 - length]
            and tokens[start - 1 - length] != SEPARATOR
        ):
            length += 1
        if length >= 2 and tokens[start] != SEPARATOR:
            candidates.append((start, length))
    candidates.sort(key=lambda pair: (-pair[1], -pair[0]))
    firsts, rest, seen = [], [], set()
    for pair in candidates:
        (rest if tokens[pair[0]] in seen else firsts).append(pair)
        seen.add(tokens[pair[0]])
    return (firsts + rest)[:limit]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_matches_are_those_of_the_naive_search(data):
    alphabet = data.draw(st.integers(2, 6))
    token = st.integers(0, alphabet - 1)
    prediction = data.draw(st.lists(token, max_size=25))
    prompt = data.draw(st.lists(token, min_size=1, max_size=20))
    answer = data.draw(st.lists(token, max_size=20))
    limit = data.draw(st.integers(1, 8))
    row_texts = CopySource(2)
    row_texts.start(1, context(prompt + answer, prediction, len(prompt)))
    row_texts.texts.facts["pointer"][1] = -1
    whole = [*prediction, SEPARATOR, *prompt, *answer] if prediction else prompt + answer
    assert found(row_texts, 1, limit) == naive(whole, limit)


def test_the_walk_is_bounded():
    row_texts = CopySource(1)
    row_texts.start(0, context([9, 1, 2, 5, *[1, 2, 7] * 40, 9, 1, 2]))
    # The long match lies behind more than WALK shorter ones: what is found is the most recent.
    assert found(row_texts)[0] == (4 + 3 * 40 - 1, 2)


def test_a_repetition_goes_on_beyond_its_own_end():
    row_texts = CopySource(1)
    row_texts.start(0, context([1, 2, 3, 1, 2, 3, 1]))
    start, length = found(row_texts)[0]
    assert (start, length) == (4, 4)
    assert [copied_token(0, start, offset, row_texts.texts) for offset in range(7)] == [2, 3, 1, 2, 3, 1, 2]


def test_a_guess_from_the_prediction_ends_with_it():
    row_texts = CopySource(1)
    row_texts.start(0, context([5, 6], [5, 6, 7]))
    row_texts.texts.facts["pointer"][0] = -1
    assert found(row_texts) == [(2, 2)]
    assert [copied_token(0, 2, offset, row_texts.texts) for offset in range(4)] == [7, SEPARATOR, SEPARATOR, SEPARATOR]


def test_a_repeated_passage_is_drafted_as_a_chain():
    drafter = copier()
    drafter.start(0, context([4, 5, 6, 7, 8, 9, 1, 2, 4, 5]))
    trees = tree(drafter, 0, 6)
    assert trees.tokens[:6].tolist() == [5, 6, 7, 8, 9, 1]
    assert trees.parents[:6].tolist() == [-1, 0, 1, 2, 3, 4]
    assert trees.sources[:6].tolist() == [Source.ROOT, *[Source.SUFFIX] * 5]


def test_spans_that_part_share_what_they_have_in_common():
    drafter = copier()
    drafter.start(0, context([1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 0, 1, 2]))
    trees = tree(drafter)
    size = trees.num_nodes
    assert trees.tokens[:size].tolist().count(3) >= 1
    children = [(trees.parents[node], trees.tokens[node]) for node in range(1, size)]
    assert sum(parent == 0 for parent, _ in children) == 1
    assert {token for parent, token in children if parent == 1} == {4, 6}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_trees_keep_the_contract(data):
    token = st.integers(0, data.draw(st.integers(1, 5)))
    drafter = copier()
    stop_ids = data.draw(st.lists(token, max_size=2, unique=True))
    trees = DraftTrees.allocate(3)
    rows = np.arange(3, dtype=np.int32)
    for row in rows.tolist():
        prompt = data.draw(st.lists(token, min_size=1, max_size=30))
        drafter.start(row, context(prompt, data.draw(st.lists(token, max_size=30)), stop_ids=stop_ids))
    for _ in range(3):
        sizes = np.array(data.draw(st.lists(st.integers(1, 64), min_size=3, max_size=3)), np.int32)
        trees.clear()
        drafter.propose(rows, sizes, trees)
        trees.check(sizes)
        assert trees.num_rows == 3
        assert (trees.tokens[: trees.num_nodes] >= 0).all()
        for index in range(3):
            nodes = trees.span(index)
            parents, scores = trees.parents[nodes][1:], trees.scores[nodes]
            assert (scores[1:] <= scores[parents]).all()
            assert not set(trees.tokens[nodes][parents][parents > 0].tolist()) & set(stop_ids)
        won = data.draw(st.lists(token, min_size=3, max_size=9))
        starts = np.array([0, 1, 2, len(won)], np.int32)
        drafter.update(News(rows, starts, np.array(won, np.int64)))


def test_nothing_is_drafted_behind_the_end_of_an_answer():
    drafter = copier()
    drafter.start(0, context([4, 5, 6, 2, 9, 4, 5], stop_ids=(3, 2)))
    assert drafted(drafter) == [5, 6, 2]
    many = tuple(range(100, 140))
    drafter.start(0, context([4, 5, 6, 139, 9, 4, 5], stop_ids=many))
    assert drafted(drafter) == [5, 6, 139]


def test_before_the_answer_the_guess_is_how_the_prediction_begins():
    drafter = copier()
    drafter.start(0, context([1, 2], [7, 8, 9, 10]))
    trees = tree(drafter)
    assert trees.tokens[: trees.num_nodes].tolist() == [2, 7, 8, 9, 10]
    assert set(trees.sources[1 : trees.num_nodes].tolist()) == {Source.PREDICTION}


def test_after_a_restart_the_prediction_goes_on_where_it_was():
    drafter = copier()
    drafter.start(0, context([1, 2, 7, 8], [7, 8, 9, 10], num_prompt=2))
    assert drafted(drafter) == [8, 9, 10]


def test_one_other_word_does_not_lose_the_place():
    drafter = copier()
    drafter.start(0, context([1, 2], list(range(10, 40))))
    read(drafter, 0, [10, 11, 12, 77])  # 77 in place of 13
    assert drafted(drafter)[:4] == [77, 14, 15, 16]


def test_left_out_and_put_in_words_are_found_again():
    prediction = list(range(10, 60))
    drafter = copier()
    drafter.start(0, context([1, 2], prediction))
    read(drafter, 0, [10, 11, 30, 31])  # 12 to 29 left out
    trees = tree(drafter)
    children = {int(trees.tokens[node]) for node in range(1, trees.num_nodes) if trees.parents[node] == 0}
    assert 32 in children
    read(drafter, 0, [32, 33, *range(80, 90), 34, 35])  # ten put in
    assert drafted(drafter)[:4] == [35, 36, 37, 38]


def test_a_prediction_that_was_wrong_for_long_is_no_longer_offered():
    drafter = copier()
    drafter.start(0, context([1, 2], list(range(10, 60))))
    read(drafter, 0, list(range(100, 100 + texts.MAX_MISSES)))
    assert len(drafted(drafter)) > 1
    read(drafter, 0, [200])
    assert drafted(drafter) == [200]


def answered(answer, prompt, prediction, max_nodes, temperature=0.0):
    """Steps and tokens of a whole answer, by the plain-Python walk."""
    drafter = copier()
    drafter.start(0, context(prompt, prediction, temperature=temperature))
    read(drafter, 0, answer[:1])
    won, steps = 1, 0
    while won < len(answer):
        trees = tree(drafter, 0, max_nodes)
        left = answer[won:]
        tokens, _ = walk(trees, 0, lambda _, path, left=left: left[len(path)] if len(path) < len(left) else -1)
        tokens = tokens[: len(left)]
        read(drafter, 0, tokens)
        won += len(tokens)
        steps += 1
    return (len(answer) - 1) / steps


@pytest.mark.parametrize(("max_nodes", "least"), [(8, 7.8), (16, 15.0), (64, 24.0)])
def test_a_right_prediction_is_accepted_to_the_last_node(max_nodes, least):
    answer = np.random.default_rng(0).integers(0, 1000, 800).tolist()
    assert answered(answer, [1, 2], answer, max_nodes) >= least
    assert answered(answer, [1, 2], [], max_nodes) < 1.1


def test_an_edited_text_is_copied_around_its_edits():
    rng = np.random.default_rng(1)
    prediction = rng.integers(0, 1000, 600).tolist()
    answer = [token if rng.random() > 0.03 else 2000 + index for index, token in enumerate(prediction)]
    assert answered(answer, [1, 2], prediction, 16) > 8
    assert answered(answer, [1, 2, *prediction], [], 16) > 6


def test_a_quoted_prompt_is_accepted_in_long_spans():
    rng = np.random.default_rng(2)
    page = rng.integers(0, 300, 400).tolist()
    answer = [*page[100:200], *rng.integers(300, 400, 10).tolist(), *page[250:350]]
    recording = Recording(prompt=tuple(page), answer=tuple(answer))
    result = simulate(copier(), [recording], 16)
    assert result.acceptance_length > 7


def test_scores_follow_what_was_accepted():
    """Copies of copies that always hold raise the estimate, copies that never hold lower it."""
    drafter = copier()
    page = list(range(100))
    drafter.start(0, context([*page, 0, 1]))
    first = float(tree(drafter, 0, 2).scores[1])
    for token in range(2, 90):
        tree(drafter, 0, 2)
        read(drafter, 0, [token])
    drafter.start(1, context([*page, 0, 1]))
    sure = rates_of(drafter)[span_cell(False, False, False, 32, 1)]
    assert sure[0] / sure[1] > 0.97
    rng = np.random.default_rng(0)
    drafter.start(2, context([7, 8, 9]))
    for _ in range(60):
        tree(drafter, 2, 4)
        read(drafter, 2, [int(rng.integers(200, 1000)), 7, 8])
    drafter.start(3, context([*page, 0, 1]))
    assert float(tree(drafter, 3, 2).scores[1]) < first


def test_a_tree_that_was_never_verified_teaches_nothing_twice():
    drafter = copier()
    drafter.start(0, context([4, 5, 6, 4, 5]))
    tree(drafter)
    read(drafter, 0, [9])
    before = rates_of(drafter).copy()
    read(drafter, 0, [4, 5, 6])
    assert (rates_of(drafter) == before).all()
    tree(drafter)
    drafter.stop(0)
    drafter.start(0, context([1, 2]))
    read(drafter, 0, [6])
    assert (rates_of(drafter) == before).all()


def test_cells_are_apart_and_priors_are_chances():
    cells = {
        span_cell(noisy, predicted, second, length, depth)
        for noisy in (0, 1)
        for predicted in (0, 1)
        for second in (0, 1)
        for length in range(LONGEST + 1)
        for depth in range(1, 64)
    }
    assert cells == set(range(SPAN_CELLS))
    rates = first_rates()
    assert ((rates[..., 0] / rates[..., 1] > 0) & (rates[..., 0] / rates[..., 1] <= 1)).all()


def test_many_wrong_predictions_do_not_spoil_a_right_one():
    rng = np.random.default_rng(0)
    drafter = copier()
    for _ in range(300):
        drafter.start(0, context([1, 2], rng.integers(0, 1000, 20).tolist()))
        for token in rng.integers(1000, 2000, 6).tolist():
            tree(drafter)
            read(drafter, 0, [token])
    for _ in range(20):
        answer = rng.integers(0, 1000, 400).tolist()
        drafter.start(0, context([1, 2], answer))
        assert len(drafted(drafter)) > 1
        read(drafter, 0, answer[:2])
    drafter.start(0, context([1, 2], answer))
    assert len(drafted(drafter)) > 3


def test_temperature_has_estimates_of_its_own():
    drafter = copier()
    page = [4, 5, 6, 4, 5]
    drafter.start(0, context(page))
    drafter.start(1, context(page, temperature=0.8))
    drafter.start(2, context(page, temperature=0.8))
    for _ in range(5):
        tree(drafter, 1)
        read(drafter, 1, [9, 4, 5])
    fresh = copier()
    fresh.start(2, context(page, temperature=0.8))
    assert float(tree(drafter, 2).scores[1]) < float(tree(fresh, 2).scores[1])
    fresh.start(0, context(page))
    assert float(tree(drafter, 0).scores[1]) == float(tree(fresh, 0).scores[1])


def test_a_row_forgets_when_it_is_given_to_another_request():
    drafter = copier()
    drafter.start(0, context([4, 5, 6, 7], [8, 9]))
    drafter.stop(0)
    drafter.start(0, context([4, 5]))
    assert drafted(drafter) == [5]


def rates_of(drafter):
    return drafter.drafter.memory.rates[COPY]


def test_texts_grow():
    drafter = copier()
    drafter.start(0, context([4, 5, 6, 4, 5]))
    drafter.start(3, context([1, 2, 3, 1, 2]))
    read(drafter, 3, [*range(10, 2990)] * 2)
    assert drafted(drafter, 0) == [5, 6, 4, 5, 6, 4, 5, 6, 4, 5, 6, 4, 5, 6, 4, 5]
    read(drafter, 3, [1, 2])
    assert drafted(drafter, 3)[:3] == [2, 10, 11]


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(texts, "MAX_TEXT", 4096)
    monkeypatch.setattr(texts, "MAX_PREDICTION", 1000)
    monkeypatch.setattr(texts, "PROMPT_WINDOW", 2000)
    rng = np.random.default_rng(0)
    prediction = rng.integers(0, 5000, 1500).tolist()
    row_texts = CopySource(2)
    row_texts.start(1, context([7, 8]))
    row_texts.start(0, context(rng.integers(0, 5000, 9000).tolist(), prediction))
    assert row_texts.texts.facts[0].tolist() == (1001, 3001, 0, 0)
    told = rng.integers(0, 5000, 60_000)
    for first in range(0, told.size, 50):
        row_texts.make_room(50)
        texts.append(0, told[first : first + 50], row_texts.texts)
        mark = row_texts.texts.facts[0]
        assert mark["length"] - mark["begin"] <= 4096
    assert row_texts.texts.tokens.shape[1] <= 4096 + 1001
    assert row_texts.texts.tokens[0, mark["length"] - 2000 : mark["length"]].tolist() == told[-2000:].tolist()
    assert row_texts.texts.tokens[1, :2].tolist() == [7, 8]
    texts.append(0, np.array(prediction[500:510]), row_texts.texts)
    assert found(row_texts)[0] == (510, 10)


def test_a_long_answer_of_a_resumed_request_fits():
    answer = np.random.default_rng(0).integers(0, 5000, 70_000).tolist()
    row_texts = CopySource(1)
    row_texts.start(0, context([1, 2, *answer], answer[:40], num_prompt=2))
    mark = row_texts.texts.facts[0]
    assert row_texts.texts.tokens.shape[1] <= texts.MAX_PREDICTION + 1 + texts.MAX_TEXT
    assert row_texts.texts.tokens[0, mark["length"] - 100 : mark["length"]].tolist() == answer[-100:]
