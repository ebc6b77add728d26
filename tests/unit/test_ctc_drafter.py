"""The CTC drafter: its memory against the training pass, its trees against the readable search."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from drafters.base import HiddenStates, News, RowContext, Source
from drafters.coupling import Coupling
from drafters.drafter import TreeView, trees_of_frames
from drafters.head import source as source_module
from drafters.head.frames import Guess
from drafters.head.head import Head, HeadShape
from drafters.head.source import HeadSource, bias_of
from tests.collapse import best_first
from tests.drafting import make_view
from verifier.cpu.noise import gumbel
from verifier.tree import DraftTrees

VOCAB, HIDDEN, WINDOW, SLOTS = 40, 12, 8, 5


@dataclass
class Embeddings:
    input_embedding: torch.Tensor
    output_embedding: torch.Tensor


def make_head(seed: int = 0, **changes: int) -> tuple[Head, Embeddings]:
    torch.manual_seed(seed)
    numbers = {
        "width": 16,
        "num_heads": 2,
        "ffn_size": 24,
        "num_slots": SLOTS,
        "window": WINDOW,
        "bias_rank": 4,
        **changes,
    }
    head = Head(HeadShape(vocab_size=VOCAB, embed_size=HIDDEN, hidden_size=HIDDEN, **numbers))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return head, Embeddings(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN))


def trained_pass(head: Head, shared: Embeddings, states: torch.Tensor, tokens: list[int], heat: float) -> torch.Tensor:
    """Frames behind the last token, as training computes them: the whole sequence at once. [T, V + 1]"""
    features = head.read(states[None], shared.input_embedding[tokens[1:]][None])
    positions = torch.arange(1, len(tokens))[None]
    anchor = torch.tensor([[len(tokens) - 2]])
    places = torch.arange(len(tokens) - 1)
    is_visible = (places <= anchor[..., None]) & (places > anchor[..., None] - head.shape.window)
    frames = head.slot_states(
        features[:, anchor[0]],
        positions[:, anchor[0]],
        torch.tensor([heat]),
        head.context(features, positions),
        is_visible,
    )
    return torch.softmax(head.logits(frames, shared.output_embedding)[0, 0], -1)


@pytest.mark.parametrize("seed", range(4))
def test_the_ring_of_a_row_gives_what_the_whole_sequence_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    head, shared = make_head(seed)
    source = HeadSource(head, shared, max_rows=3)
    lengths = [4, 30, 19]
    tokens = [rng.integers(0, VOCAB, length).tolist() for length in lengths]
    states = [torch.randn(length - 1, HIDDEN) for length in lengths]
    done = [0, 0, 0]
    while any(done[row] < lengths[row] - 1 for row in range(3)):
        rows: list[int] = []
        positions: list[int] = []
        for row in range(3):
            count = min(int(rng.integers(0, WINDOW + 3)), lengths[row] - 1 - done[row])
            rows += [row] * count
            positions += range(done[row], done[row] + count)
            done[row] += count
        if rows:
            read = torch.stack([states[row][place] for row, place in zip(rows, positions, strict=True)])
            following = [tokens[row][place + 1] for row, place in zip(rows, positions, strict=True)]
            source.take(np.array(rows, np.int32), np.array(positions), read, np.array(following))
    for asked in ([0, 1, 2], [2], [2, 0]):
        heat = rng.choice([0.0, 0.7, 1.0], len(asked))
        _, guessed = source.guess(np.array(asked, np.int32), heat)
        for index, row in enumerate(asked):
            expected = trained_pass(head, shared, states[row], tokens[row], float(heat[index]))
            assert guessed[index] == pytest.approx(expected.detach().numpy(), abs=2e-5)
            assert source.lengths[row] == lengths[row]


def test_many_anchors_of_a_row_are_each_as_if_alone() -> None:
    head, _ = make_head(2)
    features, positions = torch.randn(2, 11, 16), torch.arange(5, 16).expand(2, 11)
    anchors = torch.tensor([[3, 9, 4], [10, 0, 5]])
    is_visible = torch.arange(11) <= anchors[..., None]
    context, heat = head.context(features, positions), torch.tensor([0.0, 0.7])

    def frames(chosen: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        picked = features.gather(1, chosen[..., None].expand(-1, -1, 16))
        return head.slot_states(picked, positions.gather(1, chosen), heat, context, seen)

    together = frames(anchors, is_visible)
    for index in range(3):
        alone = frames(anchors[:, index, None], is_visible[:, index, None])
        assert torch.allclose(together[:, index, None], alone, atol=1e-5)


LISTED = torch.tensor([0, 3, 4, 9, 11, 12, 20, 21, 33, 38, VOCAB - 1])


def listed(head: Head) -> Head:
    """The same head, guessing only the tokens LISTED."""
    short = Head(replace(head.shape, draft_vocab_size=LISTED.numel()), LISTED)
    weights = head.state_dict() | {"draft_tokens": LISTED}
    for name in ("residual_out", "bias_to", "bias_from"):
        weights[name] = weights[name][LISTED]
    weights["bias_from"] = torch.cat([weights["bias_from"], torch.full((1, head.shape.bias_rank), 0.5)])
    short.load_state_dict(weights)
    return short


def test_a_draft_vocabulary_is_the_whole_one_cut_to_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    head, shared = make_head(3)
    states = torch.randn(9, HIDDEN)

    def guess(one: Head) -> Guess:
        source = HeadSource(one, shared, max_rows=2)
        source.take(np.ones(9, np.int32), np.arange(9), states, np.arange(2, 11))
        return source.guess(np.array([1], np.int32), np.array([0.7]))

    whole, (names, chances) = guess(head)[1][0], guess(listed(head))
    assert names.tolist() == [LISTED.tolist()]
    wanted = whole[:, [*LISTED.tolist(), VOCAB]]
    np.testing.assert_allclose(chances[0], wanted / wanted.sum(1, keepdims=True), rtol=1e-4)
    monkeypatch.setattr(source_module, "_DENSE_VOCAB", 0)
    monkeypatch.setattr(source_module, "PER_FRAME", 3)
    best, picked = guess(listed(head))
    places = np.searchsorted(LISTED.numpy(), best[0])
    np.testing.assert_allclose(picked[0], chances[0][:, [*places, -1]], rtol=1e-5)
    assert set(best[0].tolist()) == set(LISTED[chances[0, :, :-1].argsort(1)[:, -3:].ravel()].tolist())


def test_the_bias_of_a_draft_vocabulary_is_told_by_token() -> None:
    head, _ = make_head(3)
    (before, after), (whole_before, whole_after) = bias_of(listed(head)), bias_of(head)
    is_listed = np.isin(np.arange(VOCAB), LISTED.numpy())
    np.testing.assert_array_equal(before[is_listed], whole_before[is_listed])
    np.testing.assert_array_equal(after[is_listed], whole_after[is_listed])
    assert (before[~is_listed] == 0.5).all(), "all others share a row"
    assert (after[~is_listed] == 0.0).all()


def news(rows: list[int], won: list[list[int]], first: list[int], states: list[torch.Tensor]) -> News:
    starts = np.cumsum([0, *map(len, won)]).astype(np.int32)
    spans = np.cumsum([0, *(len(piece) for piece in states)]).astype(np.int32)
    hidden = HiddenStates(np.array(rows, np.int32), spans, np.array(first, np.int64), torch.cat(states))
    return News(np.array(rows, np.int32), starts, np.array([*itertools.chain(*won)], np.int64), None, hidden)


def started(
    temperature: float = 0.0, stop_ids: tuple[int, ...] = (), coupling: Coupling | None = None, **changes: int
) -> tuple[TreeView, list[int]]:
    """A drafter with row 1 behind its first answer token."""
    head, shared = make_head(1, **changes)
    drafter = make_view("ctc", VOCAB, head=HeadSource(head, shared, coupling, max_rows=4))
    prompt = [3, 9, 4, 4, 7, 11, 2, 30, 31, 5, 6]
    drafter.start(1, RowContext("t", tuple(prompt), len(prompt), 5, temperature, stop_ids))
    drafter.update(news([1], [[8]], [2], [torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(3))]))
    return drafter, [*prompt, 8]


def head_of(drafter: TreeView) -> HeadSource:
    assert drafter.drafter.head is not None
    return drafter.drafter.head


def guess_of(drafter: TreeView, row: int) -> np.ndarray:  # type: ignore[type-arg]
    return head_of(drafter).guess(np.array([row], np.int32), drafter.drafter.memory.rows["temperature"][[row]])[1]


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.3])
@pytest.mark.parametrize("max_nodes", [1, 2, 16, 64])
def test_trees_keep_the_contract(temperature: float, max_nodes: int) -> None:
    drafter, tokens = started(temperature)
    trees = DraftTrees.allocate(4)
    drafter.propose(np.array([1], np.int32), np.array([max_nodes], np.int32), trees)
    trees.check()
    assert trees.tokens[0] == tokens[-1]
    assert 1 <= trees.num_nodes <= max_nodes
    assert (trees.num_nodes > 1) == (max_nodes > 1)
    assert set(trees.sources[1 : trees.num_nodes].tolist()) <= {int(Source.CTC)}
    assert trees.depths[: trees.num_nodes].max() <= drafter.max_depth


def test_more_states_than_the_window_holds_leave_the_last_ones() -> None:
    tokens = [5, 9, 2, 8, 30, 1, 7, 7, 12, 3, 21, 4, 19, 6, 33, 2, 11, 8]
    states = torch.randn(len(tokens) - 1, HIDDEN)

    def frames(pieces: list[int]) -> np.ndarray:  # type: ignore[type-arg]
        head, shared = make_head(1)
        drafter = make_view("ctc", VOCAB, head=HeadSource(head, shared, max_rows=2))
        drafter.start(0, RowContext("t", tuple(tokens[:1]), 1, 5, 0.0))
        done = 0
        for count in pieces:
            drafter.update(news([0], [tokens[done + 1 : done + 1 + count]], [done], [states[done : done + count]]))
            done += count
        return guess_of(drafter, 0)

    assert frames([17]) == pytest.approx(frames([5, 1, 8, 3]), abs=1e-5)


def test_states_that_are_no_numbers_do_not_silence_the_next_request_of_the_row() -> None:
    drafter, _ = started()
    good = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(3))  # fewer than the window holds

    def guessed(states: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
        prompt = tuple(range(1, states.shape[0] + 1))
        drafter.start(1, RowContext("t", prompt, len(prompt), 5, 0.0))
        drafter.update(news([1], [[8]], [0], [states]))
        found = guess_of(drafter, 1)
        drafter.stop(1)
        return found

    expected = guessed(good)
    assert np.isnan(guessed(torch.full((WINDOW, HIDDEN), float("nan")))).any()
    assert guessed(good) == pytest.approx(expected, abs=1e-6)


def test_a_row_whose_last_state_never_came_gets_a_bare_root() -> None:
    drafter, _ = started()
    drafter.update(News(np.array([1], np.int32), np.array([0, 2], np.int32), np.array([21, 22])))
    trees = DraftTrees.allocate(4)
    drafter.propose(np.array([1], np.int32), np.array([16], np.int32), trees)
    assert trees.tokens[: trees.num_nodes].tolist() == [22]


def test_the_head_is_not_run_for_rows_that_get_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, tokens = started()
    for row in (0, 2):
        drafter.start(row, RowContext("t", (3, 9, 4, 6 + row), 4, 5, 0.0))
        drafter.update(news([row], [[8, 12]], [2], [torch.randn(3, HIDDEN)]))
    drafter.start(3, RowContext("t", (3, 9, 4), 3, 5, 0.0))  # its states never came
    passes: list[list[int]] = []
    head = head_of(drafter)
    guess = head.guess

    def watched(rows: np.ndarray, temperatures: np.ndarray) -> Guess:  # type: ignore[type-arg]
        passes.append(rows.tolist())
        return guess(rows, temperatures)

    monkeypatch.setattr(head, "guess", watched)

    def proposed(rows: list[int], max_nodes: list[int]) -> DraftTrees:
        trees = DraftTrees.allocate(4)
        drafter.propose(np.array(rows, np.int32), np.array(max_nodes, np.int32), trees)
        trees.check()
        return trees

    trees = proposed([0, 3, 1, 2], [1, 16, 8, 16])
    assert passes == [[1, 2]]
    starts = trees.row_starts[:5].tolist()
    assert starts[:3] == [0, 1, 2]
    for index, (row, most) in ((2, (1, 8)), (3, (2, 16))):
        alone = proposed([row], [most])
        part = slice(starts[index], starts[index + 1])
        assert alone.num_nodes > 1
        assert trees.tokens[part].tolist() == alone.tokens[: alone.num_nodes].tolist()
        assert trees.scores[part] == pytest.approx(alone.scores[: alone.num_nodes], rel=1e-4)
    passes.clear()
    assert proposed([3, 1, 2], [4, 1, 1]).tokens[:3].tolist() == [4, tokens[-1], 12]
    assert passes == []


def test_nothing_is_proposed_behind_the_end_of_an_answer() -> None:
    trees = DraftTrees.allocate(4)
    started()[0].propose(np.array([1], np.int32), np.array([64], np.int32), trees)
    inner = int(trees.tokens[trees.parents[trees.num_nodes - 1]])
    trees.clear()
    drafter, _ = started(stop_ids=(inner, VOCAB + 5))
    drafter.propose(np.array([1], np.int32), np.array([64], np.int32), trees)
    ends = {node for node in range(1, trees.num_nodes) if trees.tokens[node] == inner}
    assert ends
    assert not ends & set(trees.parents[: trees.num_nodes].tolist())


@pytest.mark.parametrize("seed", range(6))
def test_the_compiled_tree_holds_the_likeliest_strings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2.0, size=(4, 8))
    chances = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    tables = rng.normal(scale=0.7, size=(2, 7, 3)).astype(np.float32)
    bias = (tables[0] @ tables[1].T).astype(np.float64)
    expected = best_first(np.log(chances.astype(np.float64)), 20, root=2, bias=bias)
    trees = trees_of_frames(np.array([2]), (np.arange(7)[None], chances[None]), (tables[0], tables[1]), 20)
    trees.check()
    found = []
    for node in range(1, trees.num_nodes):
        string, at = [], node
        while at > 0:
            string.append(int(trees.tokens[at]))
            at = int(trees.parents[at])
        found.append((tuple(reversed(string)), float(np.log(trees.scores[node]))))
    assert [string for string, _ in found] == [string for string, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=5e-3)


def test_each_slot_couples_its_estimate_by_its_own_factors() -> None:
    factors = np.array([[[1.1, 0.9], [1.0, 0.5], [1.2, 0.2], [0.9, 0.4], [1.0, 1.0]]])
    drafter, tokens = started(temperature=0.8, bias_rank=0, coupling=Coupling((0.8,), factors))
    trees = DraftTrees.allocate(4)
    drafter.propose(np.array([1], np.int32), np.array([40], np.int32), trees)
    found, num_checked = drafter.drafter.memory.found[0], 0
    for node in range(trees.num_nodes):
        size, depth = int(found["sizes"][node]), int(trees.depths[node])
        if not size or depth >= SLOTS:
            continue
        chances = found["alone"][node, :size, 1]
        power, reach = factors[0, depth]
        noise = [gumbel(np.uint64(5), len(tokens) + depth, token) for token in found["tokens"][node, :size].tolist()]
        rest = 16.0 * (max(1.0 - chances.sum(), 1e-3) / 16.0) ** power
        powered = chances**power
        whole = powered.sum() + rest
        rival = np.log(max(rest / whole, 1e-3) / 16.0) + reach * (np.log(16) + np.euler_gamma)
        standings = np.log(powered / whole) + reach * np.array(noise)
        expected = np.exp(standings) / (np.exp(standings).sum() + np.exp(rival))
        assert found["chances"][node, :size] == pytest.approx(np.minimum(expected, 0.999), rel=1e-6)
        num_checked += 1
    assert num_checked > 5
    assert int(trees.depths[: trees.num_nodes].max()) >= 2


def test_the_best_tokens_of_a_large_vocabulary_make_the_same_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for limit in (8192, 10):
        monkeypatch.setattr(source_module, "_DENSE_VOCAB", limit)
        drafter, _ = started()
        trees = DraftTrees.allocate(4)
        drafter.propose(np.array([1], np.int32), np.array([12], np.int32), trees)
        made.append((trees.tokens[:12].tolist(), trees.parents[:12].tolist(), trees.scores[:12].tolist()))
    assert made[0][:2] == made[1][:2]
    assert made[1][2] == pytest.approx(made[0][2], rel=0.05)  # what lies beyond a frame's best is not counted
