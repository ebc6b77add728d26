"""The tree drafter: its trees keep the contract, its estimates learn what they are worth, every part is heard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drafters import COPY, HEAD, NGRAM, combine
from drafters.base import NOBODY, Drafter, HiddenStates, News, RowContext, Source
from drafters.calibration import LEAST_RATE, calibrate, credit_of_span, first_rates, observe_span, survival
from drafters.candidates import SILENT, WIDTH
from drafters.drafter import TreeView
from drafters.head.frames import Guess
from drafters.head.head import Head, HeadShape
from drafters.head.source import HeadSource
from drafters.rows import ROW
from tests.drafting import make_view, make_views
from tests.unit.test_ctc_drafter import HIDDEN, SLOTS, VOCAB, Embeddings, make_head
from verifier.tree import DraftTrees


def make_hybrid(*, has_head: bool = True) -> TreeView:
    head = HeadSource(*make_head(1), max_rows=4) if has_head else None
    return make_view("hybrid", VOCAB, head=head)


def told(row: int, length: int, won: list[int], seed: int = 0) -> News:
    """News of one row whose text had `length` tokens."""
    states = torch.randn(len(won), HIDDEN, generator=torch.Generator().manual_seed(seed))
    hidden = HiddenStates(np.array([row], np.int32), np.array([0, len(won)], np.int32), np.array([length - 1]), states)
    return News(np.array([row], np.int32), np.array([0, len(won)], np.int32), np.array(won), None, hidden)


def propose(drafter: TreeView, rows: list[int], max_nodes: list[int]) -> DraftTrees:
    trees = DraftTrees.allocate(4)
    drafter.propose(np.array(rows, np.int32), np.array(max_nodes, np.int32), trees)
    trees.check()
    return trees


def watch_head(drafter: TreeView, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of every pass of the head from now on."""
    passes: list[list[int]] = []
    assert drafter.drafter.head is not None
    head = drafter.drafter.head
    guess = head.guess

    def watched(rows: np.ndarray, temperatures: np.ndarray) -> Guess:  # type: ignore[type-arg]
        passes.append(rows.tolist())
        return guess(rows, temperatures)

    monkeypatch.setattr(head, "guess", watched)
    return passes


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_cheap_way_is_that_of_a_hybrid_without_a_head(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    whole, headless = make_hybrid(), make_hybrid(has_head=False)
    assert whole.has_cheap
    assert not headless.has_cheap
    passes = watch_head(whole, monkeypatch)
    prompt = rng.integers(0, 6, 40).tolist()
    for drafter in (whole, headless):
        drafter.start(1, RowContext("t", tuple(prompt), len(prompt), 7, temperature))
    length, num_nodes = len(prompt), 0
    for _ in range(30):
        won = rng.integers(0, 6, int(rng.integers(1, 5))).tolist()
        trees = [DraftTrees.allocate(1) for _ in range(2)]
        for drafter, propose, tree in zip(
            (whole, headless), (whole.propose_cheap, headless.propose), trees, strict=True
        ):
            drafter.update(told(1, length, won))
            propose(np.array([1], np.int32), np.array([12], np.int32), tree)
        size = trees[0].num_nodes
        assert trees[0].row_starts[:2].tolist() == trees[1].row_starts[:2].tolist()
        for name in ("tokens", "parents", "scores", "sources"):
            assert getattr(trees[0], name)[:size].tolist() == getattr(trees[1], name)[:size].tolist()
        length, num_nodes = length + len(won), num_nodes + size
    assert num_nodes > 100
    assert not passes, "the head ran"


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.4])
def test_random_texts_keep_the_contract(temperature: float, has_head: bool) -> None:
    rng = np.random.default_rng(int(10 * temperature))
    drafter = make_hybrid(has_head=has_head)
    texts: dict[int, list[int]] = {}
    num_deep = 0
    for _ in range(60):
        row = int(rng.integers(0, 4))
        if row not in texts or rng.random() < 0.1:
            prompt = rng.integers(0, 6, int(rng.integers(1, 30))).tolist()
            prediction = tuple(rng.integers(0, 6, int(rng.integers(0, 9))).tolist())
            drafter.start(row, RowContext("t", tuple(prompt), len(prompt), 7, temperature, (5,), prediction))
            texts[row] = prompt
        won = rng.integers(0, 6, int(rng.integers(1, 5))).tolist()
        news = told(row, len(texts[row]), won, row)
        drafter.update(news if rng.random() < 0.8 else News(news.rows, news.starts, news.tokens))
        texts[row] += won
        rows = sorted(texts)
        limits = rng.integers(1, 65, len(rows)).tolist()
        trees = propose(drafter, rows, limits)
        for index, one in enumerate(rows):
            start, stop = trees.row_starts[index], trees.row_starts[index + 1]
            assert 1 <= stop - start <= limits[index]
            assert trees.tokens[start] == texts[one][-1]
            ends = {node for node in range(1, stop - start) if trees.tokens[start + node] == 5}
            assert not ends & set(trees.parents[start:stop].tolist())
            num_deep += int(trees.depths[start:stop].max() > 2)
    assert num_deep > 20


def test_a_text_that_repeats_is_copied_far() -> None:
    drafter = make_hybrid()
    phrase = list(range(10, 34))
    prompt = [*phrase, 1, *phrase[:4]]
    drafter.start(0, RowContext("t", tuple(prompt), len(prompt), 7, 0.0))
    drafter.update(told(0, len(prompt), [phrase[4]]))
    trees = propose(drafter, [0], [24])
    node, depth = 0, 0
    while 5 + depth < len(phrase):
        following = [
            child
            for child in range(node + 1, trees.num_nodes)
            if trees.parents[child] == node and trees.tokens[child] == phrase[5 + depth]
        ]
        if not following:
            break
        node, depth = following[0], depth + 1
    assert depth >= 8
    assert int(Source.SUFFIX) in trees.sources[1 : trees.num_nodes]


def test_the_prediction_is_the_first_guess() -> None:
    drafter = make_hybrid(has_head=False)
    drafter.start(0, RowContext("t", (1, 2, 3), 3, 7, 0.0, (), (20, 21, 22, 23)))
    drafter.update(told(0, 3, [20]))
    trees = propose(drafter, [0], [8])
    assert trees.tokens[1:4].tolist() == [21, 22, 23]
    assert set(trees.sources[1:4].tolist()) == {int(Source.PREDICTION)}


def test_estimates_that_are_never_right_lose_their_weight() -> None:
    drafter = make_hybrid()
    prompt = [3, 4, 5, 6, 3, 4, 5, 6, 3, 4]
    drafter.start(0, RowContext("t", tuple(prompt), len(prompt), 7, 0.0))
    drafter.update(told(0, len(prompt), [5]))
    length = len(prompt) + 1
    first = propose(drafter, [0], [12]).scores[1:].max()
    for step in range(90):
        trees = propose(drafter, [0], [12])
        guessed = set(trees.tokens[: trees.num_nodes].tolist())
        wrong = next(token for token in range(VOCAB) if token not in guessed)
        drafter.update(told(0, length, [wrong], step))
        drafter.update(told(0, length + 1, [5], step))
        length += 2
    assert propose(drafter, [0], [12]).scores[1:].max() < 0.6 * first


@pytest.mark.parametrize("tenant", [NOBODY, "t"])
def test_what_trial_requests_teach_is_not_kept(tenant: str) -> None:
    drafter = make_hybrid()
    memory = drafter.drafter.memory
    before = memory.worth.copy(), memory.rates.copy()
    prompt = [3, 4, 5, 6, 3, 4, 5, 6, 3, 4]
    drafter.start(0, RowContext(tenant, tuple(prompt), len(prompt), 7, 0.0))
    drafter.update(told(0, len(prompt), [5]))
    propose(drafter, [0], [12])
    drafter.update(told(0, len(prompt) + 1, [6]))
    is_same = np.array_equal(memory.worth, before[0]) and np.array_equal(memory.rates, before[1])
    assert is_same == (tenant == NOBODY)


def test_without_a_head_no_states_are_asked_for() -> None:
    assert not make_hybrid(has_head=False).wants_hidden
    drafter = make_hybrid()
    assert drafter.wants_hidden
    assert drafter.hidden_window > 0


def wins(drafter: Drafter, text: list[int], first: int) -> float:
    """Tokens won per step when `text` is what the target says behind its first `first` tokens."""
    drafter.start(0, RowContext("t", tuple(text[:first]), first, 7, 0.0))
    drafter.update(told(0, first, text[first : first + 1]))
    length, steps = first + 1, 0
    while length < len(text):
        trees = DraftTrees.allocate(4)
        drafter.propose(np.zeros(1, np.int32), np.array([12], np.int32), trees)
        node, won = 0, 0
        while node >= 0 and length + won < len(text):
            children = [child for child in range(node + 1, trees.num_nodes) if trees.parents[child] == node]
            node = next((child for child in children if trees.tokens[child] == text[length + won]), -1)
            won += 1
        drafter.update(told(0, length, text[length : length + won], steps))
        length, steps = length + won, steps + 1
    drafter.stop(0)
    return (length - first - 1) / steps


def test_a_head_that_is_always_wrong_is_heard_less_and_less() -> None:
    rng = np.random.default_rng(2)
    phrases = [rng.integers(0, VOCAB, 7).tolist() for _ in range(6)]
    text = [token for index in rng.integers(0, 6, 60).tolist() for token in phrases[index]]
    alone = wins(make_hybrid(has_head=False), text, 60)
    misled = wins(make_hybrid(), text, 60)  # the states are noise, and so is what the head makes of them
    assert alone > 3.0
    assert misled > 0.85 * alone


def test_what_was_wrong_for_long_is_tried_again() -> None:
    """The counts are shared by tenants: whoever sends wrong predictions must not starve those of others."""
    assert survival(np.array([[0.0, 100.0], [30.0, 40.0]]), 0) == LEAST_RATE
    assert survival(np.array([[0.0, 100.0], [30.0, 40.0]]), 1) == 0.75
    drafter = make_hybrid(has_head=False)
    drafter.drafter.memory.worth[:, 0] = 1e-12  # nothing that was expected ever came
    drafter.start(0, RowContext("ours", (1, 2, 3), 3, 7, 0.0, (), (20, 21, 22, 23)))
    drafter.update(told(0, 3, [20]))
    trees = propose(drafter, [0], [4])
    assert trees.tokens[1] == 21
    assert trees.scores[1] == pytest.approx(0.1 * drafter.drafter.memory.asked[0]["estimates"][1])


def test_the_head_is_not_run_for_rows_that_get_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = make_hybrid()
    for row in range(3):
        drafter.start(row, RowContext("t", (1, 2, 3 + row), 3, 7, 0.0))
        drafter.update(told(row, 3, [7, 8, 9 + row], row))
    passes = watch_head(drafter, monkeypatch)
    trees = propose(drafter, [0, 1, 2], [1, 8, 16])
    assert passes == [[1, 2]]
    starts = trees.row_starts[:4].tolist()
    assert starts[1] == 1
    for row, most in ((1, 8), (2, 16)):
        alone = propose(drafter, [row], [most])
        part = slice(starts[row], starts[row + 1])
        assert alone.num_nodes > 1
        assert trees.tokens[part].tolist() == alone.tokens[: alone.num_nodes].tolist()
        assert trees.scores[part] == pytest.approx(alone.scores[: alone.num_nodes], rel=1e-4)
    passes.clear()
    assert propose(drafter, [0, 1, 2], [1, 1, 1]).tokens[:3].tolist() == [9, 10, 11]
    assert passes == []


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_heat_that_the_head_knows_nothing_of_flattens_what_it_says(temperature: float) -> None:
    row = np.zeros(1, ROW)
    row["temperature"], row["factors"] = temperature, 0.8
    heat = max(1.0, temperature)
    assert combine.powers_of(row[0], NGRAM | COPY | HEAD, 1, 1.0) == pytest.approx((0.6 / heat, 0.68 / heat))
    assert combine.powers_of(row[0], HEAD, 1, 1.0) == pytest.approx((0.0, 0.8 / heat))


def test_a_head_that_is_not_heard_leaves_the_n_gram_alone() -> None:
    row = np.zeros(1, ROW)
    for mask in (NGRAM, NGRAM | HEAD):
        assert combine.powers_of(row[0], mask, 0, -1.0) == (1.25, 0.0)
    assert combine.powers_of(row[0], NGRAM | HEAD, 0, 0.0) == (1.25, 0.0)


def test_rows_of_several_names_share_a_step_and_what_they_learn() -> None:
    views = make_views(VOCAB, head=HeadSource(*make_head(1), max_rows=4))
    assert [name for name in views if views[name].has_cheap] == ["hybrid"]
    assert [name for name in views if views[name].wants_hidden] == ["ctc", "hybrid"]
    text = [3, 4, 5, 6, 7, 3, 4]
    for row, view in enumerate(views.values()):
        view.start(row, RowContext("t", tuple(text), len(text), 7, 0.0))
        view.update(told(row, len(text), [5], row))
    kinds = []
    trees = DraftTrees.allocate(4)
    for row, view in enumerate(views.values()):
        view.propose(np.array([row], np.int32), np.array([12], np.int32), trees)
        kinds.append({Source(kind) for kind in trees.sources[trees.span(row)][1:].tolist()})
    trees.check()
    assert kinds[0] == {Source.TRIGRAM}
    assert kinds[1] == {Source.SUFFIX}
    assert kinds[2] == {Source.CTC}
    # What a row of one name was taught helps those of another of its tenant, and nobody else.
    for row, view in enumerate(views.values()):
        view.stop(row)
    views["trigram"].start(0, RowContext("t", (9,), 1, 7, 0.0))
    views["trigram"].update(told(0, 1, [20, 21, 22, 23]))
    found = views["hybrid"].drafter.memory.found[0]
    for row, tenant in ((1, "t"), (2, "other")):
        views["hybrid"].start(row, RowContext(tenant, (8, 20), 2, 7, 0.0))
        views["hybrid"].update(told(row, 2, [21]))
        propose(views["hybrid"], [row], [12])
        size = found["sizes"][0]
        named = found["tokens"][0, :size][found["alone"][0, :size, 0] > 0.1].tolist()
        assert (22 in named) == (tenant == "t")


def test_the_bonus_favours_what_was_seen_seldom() -> None:
    """Scores stay honest: the bonus moves the order, not the estimate."""
    text = [1, 2, 3] * 12 + [1, 2, 4, 1, 2]
    trees = []
    for exploration in ((0.0, 0.0), (50.0, 0.0)):
        view = make_view("trigram", VOCAB, exploration=exploration)
        view.start(0, RowContext("t", tuple(text), len(text), 7, 0.0))
        trees.append(propose(view, [0], [2]))
    assert trees[0].tokens[1] == 3
    assert trees[1].tokens[1] == 4
    assert trees[1].scores[1] < trees[0].scores[1]


@pytest.mark.parametrize(
    ("name", "temperature", "has_head", "exploration", "counts"),
    [
        ("hybrid", 0.0, False, (50.0, 0.0), True),
        ("hybrid", 0.0, True, (50.0, 0.0), False),
        ("hybrid", 0.0, True, (0.0, 50.0), True),
        ("trigram", 0.7, False, (50.0, 50.0), False),
        ("suffix", 0.0, False, (50.0, 50.0), False),
    ],
)
def test_where_the_bonus_counts(
    name: str, temperature: float, has_head: bool, exploration: tuple[float, float], counts: bool
) -> None:
    text = [1, 2, 3] * 12 + [1, 2, 4, 1, 2]
    trees = []
    for bonus in ((0.0, 0.0), exploration):
        head = HeadSource(*make_head(1), max_rows=4) if has_head else None
        view = make_view(name, VOCAB, head=head, exploration=bonus)
        view.start(0, RowContext("t", tuple(text), len(text), 7, temperature))
        view.update(told(0, len(text), [1, 2]))
        trees.append(propose(view, [0], [6]))
    tokens = [tree.tokens[: tree.num_nodes].tolist() for tree in trees]
    assert (tokens[0] != tokens[1]) == counts


def test_what_an_earlier_tree_thought_teaches_nothing() -> None:
    """A token that only a copied span names has no estimate of tri-gram or head, whatever stood in its place before."""
    drafter = make_hybrid()
    pool = drafter.drafter.memory.found[0]
    text = [7, 8, 9, 10, 11, 12, 7, 8]
    drafter.start(0, RowContext("t", tuple(text), len(text), 7, 0.0))
    drafter.update(told(0, len(text), [9]))
    pool["alone"][:] = 0.75
    trees = propose(drafter, [0], [12])
    copied = [node for node in range(1, trees.num_nodes) if trees.sources[node] == Source.SUFFIX]
    assert copied, "nothing was copied"
    listed = {
        tuple(part) for node in range(trees.num_nodes) for part in pool["alone"][node, : pool["sizes"][node]].tolist()
    }
    assert 0.75 not in {value for part in listed for value in part}


def test_a_span_earns_by_what_only_it_knew() -> None:
    assert credit_of_span(0.2, 0.9) < 0.25
    assert credit_of_span(0.2, 0.001) > 0.99
    assert credit_of_span(0.5, 0.5) == pytest.approx(2 / 3)


def test_copies_that_tell_nothing_new_fade_and_others_stay() -> None:
    """Where tri-gram and head say the same word, a copied span loses its share although it is right."""
    shares = []
    for unaided in (0.9, 0.0):
        rates, cell = first_rates()[NGRAM | COPY | HEAD], 60
        for _ in range(200):
            observe_span(rates, cell, credit_of_span(rates[cell, 0] / rates[cell, 1], unaided))
        shares.append(survival(rates, cell))
    assert shares[0] < 0.1
    assert shares[1] > 0.9


@pytest.mark.parametrize("num_wrong", [3_000, 400_000])
def test_a_span_that_was_wrong_for_long_recovers(num_wrong: int) -> None:
    memory = make_hybrid(has_head=False).drafter.memory
    asked, rates = memory.asked[0], memory.rates[NGRAM | COPY]
    asked["tokens"][1], asked["parents"][1], asked["span_cells"][1], asked["alone"][1, 2] = 9, 0, 60, 0.2
    rates[60] = 4.0 * 0.998**num_wrong, 1.0 / (1.0 - 0.998)
    for _ in range(1_500):
        asked["size"] = 2
        calibrate(np.array([9]), asked, memory.worth, rates)
    assert survival(rates, 60) > 0.5


def test_a_flat_head_leaves_room_for_the_prediction() -> None:
    """Where the head names more candidates than a node keeps, the best of them stay, and so do copied spans."""
    vocab = 300
    torch.manual_seed(0)
    head = Head(HeadShape(vocab_size=vocab, embed_size=HIDDEN, hidden_size=HIDDEN, width=16, num_heads=2, ffn_size=24))
    shared = Embeddings(torch.randn(vocab, HIDDEN), torch.randn(vocab, HIDDEN) * 0.05)
    drafter = make_view("hybrid", vocab, head=HeadSource(head, shared, max_rows=4))
    drafter.start(0, RowContext("t", (1, 2, 3), 3, 7, 0.0, (), (290, 291, 292, 293)))
    drafter.update(told(0, 3, [290]))
    trees = propose(drafter, [0], [64])
    pool = drafter.drafter.memory.found[0]
    assert pool["sizes"][0] > WIDTH - 12
    named = pool["tokens"][0, : pool["sizes"][0]].tolist()
    assert 291 in named
    assert int(Source.PREDICTION) in trees.sources[1 : trees.num_nodes]
    assert drafter.drafter.head is not None
    _, frames = drafter.drafter.head.guess(np.array([0], np.int32), drafter.drafter.memory.rows["temperature"][:1])
    best = np.argsort(-frames[0, 0, :-1])[:8].tolist()
    assert set(best) <= set(named)


def test_a_head_without_a_word_is_no_veto() -> None:
    """Behind the head's last frame the tri-gram speaks alone, as it does without a head."""
    text = [*range(3, 15)] * 6
    parts: list[dict[int, float]] = []
    for has_head in (True, False):
        drafter = make_hybrid(has_head=has_head)
        drafter.start(0, RowContext("t", tuple(text), len(text), 7, 0.0))
        drafter.update(told(0, len(text), [3]))
        trees = propose(drafter, [0], [64])
        pool = drafter.drafter.memory.found[0]
        chain = [0]
        while following := [
            node
            for node in range(chain[-1] + 1, trees.num_nodes)
            if trees.parents[node] == chain[-1] and trees.tokens[node] == 3 + len(chain) % 12
        ]:
            chain.append(following[0])
        assert len(chain) > SLOTS + 2, "the tree is not deep enough to show it"
        node = chain[SLOTS]
        size = pool["sizes"][node]
        if has_head:
            assert (pool["alone"][node, :size, 1] == SILENT).all()
            assert (pool["alone"][chain[1], : pool["sizes"][chain[1]], 1] != SILENT).all()
        parts.append(
            dict(zip(pool["tokens"][node, :size].tolist(), pool["alone"][node, :size, 2].tolist(), strict=True))
        )
    token = 3 + (SLOTS + 1) % 12
    assert parts[0][token] == pytest.approx(parts[1][token], rel=0.02)
