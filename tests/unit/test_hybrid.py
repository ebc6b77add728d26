"""The hybrid drafter: its trees keep the contract, its estimates learn what they are worth, every part is heard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drafters.base import Drafter, HiddenStates, News, RowContext, Source
from drafters.calibration import SILENT, credit_of_span, learn
from drafters.combine import WIDTH
from drafters.drafter import HybridDrafter, HybridOptions
from drafters.head.drafter import CtcDrafter, CtcOptions
from drafters.head.frames import Guess
from drafters.head.head import Head, HeadShape
from drafters.ngram.drafter import TrigramDrafter, TrigramOptions
from drafters.rates import FLOOR, first_rates, observe, survival
from tests.unit.test_ctc_drafter import HIDDEN, SLOTS, VOCAB, Embeddings, make_head
from verifier.tree import DraftTrees


def make_hybrid(*, has_head: bool = True, options: HybridOptions | None = None) -> HybridDrafter:
    trigram = TrigramDrafter(TrigramOptions(vocab_size=VOCAB, max_rows=4))
    ctc = CtcDrafter(*make_head(1), CtcOptions(max_rows=4)) if has_head else None
    return HybridDrafter(trigram, ctc, options or HybridOptions(max_rows=4))


def told(row: int, length: int, won: list[int], seed: int = 0) -> News:
    """News of one row whose text had `length` tokens."""
    states = torch.randn(len(won), HIDDEN, generator=torch.Generator().manual_seed(seed))
    hidden = HiddenStates(np.array([row], np.int32), np.array([0, len(won)], np.int32), np.array([length - 1]), states)
    return News(np.array([row], np.int32), np.array([0, len(won)], np.int32), np.array(won), None, hidden)


def propose(drafter: HybridDrafter, rows: list[int], max_nodes: list[int]) -> DraftTrees:
    trees = DraftTrees.allocate(4)
    drafter.propose(np.array(rows, np.int32), np.array(max_nodes, np.int32), trees)
    trees.check()
    return trees


def watch_head(drafter: CtcDrafter, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of every pass of the head from now on."""
    passes: list[list[int]] = []
    guess = drafter._runner.guess

    def watched(rows: np.ndarray, temperatures: np.ndarray) -> Guess:  # type: ignore[type-arg]
        passes.append(rows.tolist())
        return guess(rows, temperatures)

    monkeypatch.setattr(drafter._runner, "guess", watched)
    return passes


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_light_way_is_that_of_a_hybrid_without_a_head(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    whole, headless = make_hybrid(), make_hybrid(has_head=False)
    assert whole.has_light
    assert not headless.has_light
    assert whole._ctc is not None
    passes = watch_head(whole._ctc, monkeypatch)
    prompt = rng.integers(0, 6, 40).tolist()
    for drafter in (whole, headless):
        drafter.start(1, RowContext("t", tuple(prompt), len(prompt), 7, temperature))
    length, num_nodes = len(prompt), 0
    for _ in range(30):
        won = rng.integers(0, 6, int(rng.integers(1, 5))).tolist()
        trees = [DraftTrees.allocate(1) for _ in range(2)]
        for drafter, propose, tree in zip(
            (whole, headless), (whole.propose_light, headless.propose), trees, strict=True
        ):
            drafter.read(told(1, length, won))
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
        drafter.read(news if rng.random() < 0.8 else News(news.rows, news.starts, news.tokens))
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
    drafter.read(told(0, len(prompt), [phrase[4]]))
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
    drafter.read(told(0, 3, [20]))
    trees = propose(drafter, [0], [8])
    assert trees.tokens[1:4].tolist() == [21, 22, 23]
    assert set(trees.sources[1:4].tolist()) == {int(Source.PREDICTION)}


def test_estimates_that_are_never_right_lose_their_weight() -> None:
    drafter = make_hybrid(options=HybridOptions(max_rows=4, worth_prior=2.0))
    prompt = [3, 4, 5, 6, 3, 4, 5, 6, 3, 4]
    drafter.start(0, RowContext("t", tuple(prompt), len(prompt), 7, 0.0))
    drafter.read(told(0, len(prompt), [5]))
    length = len(prompt) + 1
    first = propose(drafter, [0], [12]).scores[1:].max()
    for step in range(60):
        trees = propose(drafter, [0], [12])
        guessed = set(trees.tokens[: trees.num_nodes].tolist())
        wrong = next(token for token in range(VOCAB) if token not in guessed)
        drafter.read(told(0, length, [wrong], step))
        drafter.read(told(0, length + 1, [5], step))
        length += 2
    assert propose(drafter, [0], [12]).scores[1:].max() < 0.6 * first


def test_without_a_head_no_states_are_asked_for() -> None:
    assert not make_hybrid(has_head=False).wants_hidden
    drafter = make_hybrid()
    assert drafter.wants_hidden
    assert drafter.hidden_window > 0


def wins(drafter: Drafter, text: list[int], first: int) -> float:
    """Tokens won per step when `text` is what the target says behind its first `first` tokens."""
    drafter.start(0, RowContext("t", tuple(text[:first]), first, 7, 0.0))
    drafter.read(told(0, first, text[first : first + 1]))
    length, steps = first + 1, 0
    while length < len(text):
        trees = DraftTrees.allocate(4)
        drafter.propose(np.zeros(1, np.int32), np.array([12], np.int32), trees)
        node, won = 0, 0
        while node >= 0 and length + won < len(text):
            children = [child for child in range(node + 1, trees.num_nodes) if trees.parents[child] == node]
            node = next((child for child in children if trees.tokens[child] == text[length + won]), -1)
            won += 1
        drafter.read(told(0, length, text[length : length + won], steps))
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
    assert survival(np.array([[0.0, 100.0], [30.0, 40.0]]), 0, FLOOR) == FLOOR
    assert survival(np.array([[0.0, 100.0], [30.0, 40.0]]), 1, FLOOR) == 0.75
    drafter = make_hybrid(has_head=False)
    drafter._memory.calibration.worth[:, 0] = 1e-12  # nothing that was expected ever came
    drafter.start(0, RowContext("ours", (1, 2, 3), 3, 7, 0.0, (), (20, 21, 22, 23)))
    drafter.read(told(0, 3, [20]))
    trees = propose(drafter, [0], [4])
    assert trees.tokens[1] == 21
    assert trees.scores[1] == pytest.approx(0.1 * drafter._memory.asked.estimates[0, 1])


def test_the_head_is_not_run_for_rows_that_get_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = make_hybrid()
    for row in range(3):
        drafter.start(row, RowContext("t", (1, 2, 3 + row), 3, 7, 0.0))
        drafter.read(told(row, 3, [7, 8, 9 + row], row))
    assert drafter._ctc is not None
    passes = watch_head(drafter._ctc, monkeypatch)
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
    """Only the head is heard, and no noise: two candidates stand as the head's chances for them do, tempered."""
    options = HybridOptions(max_rows=4, sampled_powers=(0.0, 1.0, 0.0, 1.0), reach=0.0, floor=1e-9)
    drafter = make_hybrid(options=options)
    drafter.start(0, RowContext("t", (1, 2, 3), 3, 7, temperature))
    drafter.read(told(0, 3, [4]))
    drafter._memory.calibration.losses[0] = 1000.0, 0.0
    trees = propose(drafter, [0], [64])
    asked, size = drafter._memory.asked, trees.num_nodes
    children = [node for node in range(1, size) if trees.parents[node] == 0 and asked.alone[0, node, 1] > 1e-6]
    assert len(children) > 1
    found, said = asked.estimates[0, children], asked.alone[0, children, 1]
    expected = np.log(said / said[0]) / max(1.0, temperature)
    assert np.log(found / found[0]) == pytest.approx(expected, abs=1e-6)


def test_what_an_earlier_tree_thought_teaches_nothing() -> None:
    """A token that only a copied span names has no estimate of tri-gram or head, whatever stood in its place before."""
    drafter = make_hybrid()
    pool = drafter._memory.pool
    text = [7, 8, 9, 10, 11, 12, 7, 8]
    drafter.start(0, RowContext("t", tuple(text), len(text), 7, 0.0))
    drafter.read(told(0, len(text), [9]))
    pool.alone[:] = 0.75
    trees = propose(drafter, [0], [12])
    copied = [node for node in range(1, trees.num_nodes) if trees.sources[node] == Source.SUFFIX]
    assert copied, "nothing was copied"
    listed = {tuple(part) for node in range(trees.num_nodes) for part in pool.alone[node, : pool.sizes[node]].tolist()}
    assert 0.75 not in {value for part in listed for value in part}


def test_a_span_earns_by_what_only_it_knew() -> None:
    assert credit_of_span(0.2, 0.9) < 0.25
    assert credit_of_span(0.2, 0.001) > 0.99
    assert credit_of_span(0.5, 0.5) == pytest.approx(2 / 3)


def test_copies_that_tell_nothing_new_fade_and_others_stay() -> None:
    """Where tri-gram and head say the same word, a copied span loses its share although it is right."""
    shares = []
    for unaided in (0.9, 0.0):
        rates, cell = first_rates(4.0, 0.1), 60
        for _ in range(200):
            observe(rates, cell, credit_of_span(rates[cell, 0] / rates[cell, 1], unaided), 0.998)
        shares.append(survival(rates, cell, 0.02))
    assert shares[0] < 0.1
    assert shares[1] > 0.9


@pytest.mark.parametrize("num_wrong", [3_000, 400_000])
def test_a_span_that_was_wrong_for_long_recovers(num_wrong: int) -> None:
    drafter = make_hybrid(has_head=False)
    calibration, asked = drafter._memory.calibration, drafter._memory.asked
    asked.tokens[0, 1], asked.parents[0, 1], asked.span_cells[0, 1], asked.alone[0, 1, 2] = 9, 0, 60, 0.2
    calibration.rates[60] = 4.0 * 0.998**num_wrong, 1.0 / (1.0 - 0.998)
    for _ in range(1_500):
        asked.sizes[0] = 2
        learn(np.array([0], np.int32), np.array([0, 1], np.int32), np.array([9]), *drafter._memory.bare()[:2])
    assert survival(calibration.rates, 60, FLOOR) > 0.5


def test_a_flat_head_leaves_room_for_the_prediction() -> None:
    """Where the head names more candidates than a node keeps, the best of them stay, and so do copied spans."""
    vocab = 300
    torch.manual_seed(0)
    head = Head(HeadShape(vocab_size=vocab, embed_size=HIDDEN, hidden_size=HIDDEN, width=16, num_heads=2, ffn_size=24))
    shared = Embeddings(torch.randn(vocab, HIDDEN), torch.randn(vocab, HIDDEN) * 0.05)
    trigram = TrigramDrafter(TrigramOptions(vocab_size=vocab, max_rows=4))
    drafter = HybridDrafter(
        trigram, CtcDrafter(head, shared, CtcOptions(max_rows=4)), HybridOptions(max_rows=4, cut=0.0)
    )
    drafter.start(0, RowContext("t", (1, 2, 3), 3, 7, 0.0, (), (290, 291, 292, 293)))
    drafter.read(told(0, 3, [290]))
    trees = propose(drafter, [0], [64])
    pool = drafter._memory.pool
    assert pool.sizes[0] > WIDTH - 10
    named = pool.tokens[0, : pool.sizes[0]].tolist()
    assert 291 in named
    assert int(Source.PREDICTION) in trees.sources[1 : trees.num_nodes]
    (_, frames), _ = drafter._ctc.guess(np.array([0], np.int32))  # type: ignore[union-attr]
    best = np.argsort(-frames[0, 0, :-1])[:8].tolist()
    assert set(best) <= set(named)


def test_a_head_without_a_word_is_no_veto() -> None:
    """Behind the head's last frame the tri-gram speaks alone, as it does without a head."""
    text = [*range(3, 15)] * 6
    parts: list[dict[int, float]] = []
    for has_head in (True, False):
        drafter = make_hybrid(has_head=has_head)
        drafter.start(0, RowContext("t", tuple(text), len(text), 7, 0.0))
        drafter.read(told(0, len(text), [3]))
        trees = propose(drafter, [0], [64])
        pool = drafter._memory.pool
        chain = [0]
        while following := [
            node
            for node in range(chain[-1] + 1, trees.num_nodes)
            if trees.parents[node] == chain[-1] and trees.tokens[node] == 3 + len(chain) % 12
        ]:
            chain.append(following[0])
        assert len(chain) > SLOTS + 2, "the tree is not deep enough to show it"
        node = chain[SLOTS]
        size = pool.sizes[node]
        if has_head:
            assert (pool.alone[node, :size, 1] == SILENT).all()
            assert (pool.alone[chain[1], : pool.sizes[chain[1]], 1] != SILENT).all()
        parts.append(dict(zip(pool.tokens[node, :size].tolist(), pool.alone[node, :size, 2].tolist(), strict=True)))
    token = 3 + (SLOTS + 1) % 12
    assert parts[0][token] == pytest.approx(parts[1][token], rel=0.02)
