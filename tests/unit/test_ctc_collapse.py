"""Prefix probabilities against a sum over all alignments; compiled and training versions against the readable one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from drafters.head import frames as compiled
from tests.collapse import Float64, Prefix, best_first, empty, extend, log_end, log_next, log_psi, log_q
from training.loss import is_spellable, next_log_weights, token_losses


def collapse(alignment: tuple[int, ...], blank: int) -> tuple[int, ...]:
    merged = [symbol for symbol, _ in itertools.groupby(alignment)]
    return tuple(symbol for symbol in merged if symbol != blank)


def strings(frames: Float64) -> dict[tuple[int, ...], float]:
    """Probability of every string, alignment by alignment."""
    num_frames, num_symbols = frames.shape
    found: dict[tuple[int, ...], float] = {}
    for alignment in itertools.product(range(num_symbols), repeat=num_frames):
        chance = float(np.prod(frames[range(num_frames), alignment]))
        string = collapse(alignment, num_symbols - 1)
        found[string] = found.get(string, 0.0) + chance
    return found


def random_frames(rng: np.random.Generator, num_frames: int, num_symbols: int) -> Float64:
    logits = rng.normal(scale=rng.uniform(0.3, 4.0), size=(num_frames, num_symbols))
    chances: Float64 = np.exp(logits - logits.max(1, keepdims=True))
    return chances / chances.sum(1, keepdims=True)


def prefix_of(tokens: tuple[int, ...], log_frames: Float64) -> Prefix:
    prefix = empty(log_frames)
    for token in tokens:
        prefix = extend(prefix, token, log_frames)
    return prefix


@pytest.mark.parametrize("seed", range(10))
def test_prefix_probabilities_equal_the_sum_over_all_alignments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        num_frames, vocab = int(rng.integers(1, 6)), int(rng.integers(1, 4))
        frames = random_frames(rng, num_frames, vocab + 1)
        logs, chances = np.log(frames), strings(frames)
        y = tuple(int(token) for token in rng.integers(0, vocab, int(rng.integers(0, num_frames + 1))))
        prefix = prefix_of(y, logs)

        def mass(head: tuple[int, ...], chances: dict[tuple[int, ...], float] = chances) -> float:
            return sum(chance for string, chance in chances.items() if string[: len(head)] == head)

        psi, ends = np.exp(log_psi(prefix, logs)), np.exp(log_end(prefix))
        nexts = np.exp(log_next(prefix, logs))
        assert psi == pytest.approx(mass(y), abs=1e-10)
        assert ends == pytest.approx(chances.get(y, 0.0), abs=1e-10)
        assert nexts == pytest.approx([mass((*y, token)) for token in range(vocab)], abs=1e-10)
        assert nexts.sum() + ends == pytest.approx(psi, abs=1e-10)
        if psi - ends > 1e-12:
            q = [mass((*y, token)) / (psi - ends) for token in range(vocab)]
            assert np.exp(log_q(prefix, logs)) == pytest.approx(q, abs=1e-10)


def test_a_repeat_is_spelt_through_a_blank_and_never_without() -> None:
    certain = np.full((3, 3), -np.inf)  # tokens 0 and 1, blank 2
    certain[[0, 1, 2], [0, 2, 0]] = 0.0
    twice = prefix_of((0, 0), certain)
    assert log_end(twice) == 0.0
    certain[[0, 1, 2], [0, 0, 0]] = 0.0
    certain[1, 2] = -np.inf
    assert log_psi(prefix_of((0, 0), certain), certain) == -np.inf
    assert log_end(prefix_of((0,), certain)) == 0.0


def test_blanks_alone_spell_nothing() -> None:
    blanks = np.full((4, 3), -np.inf)
    blanks[:, 2] = 0.0
    nothing = empty(blanks)
    assert log_end(nothing) == log_psi(nothing, blanks) == 0.0
    assert best_first(blanks, 8) == []


def test_a_string_longer_than_the_frames_is_impossible() -> None:
    logs = np.log(random_frames(np.random.default_rng(0), 2, 4))
    assert log_psi(prefix_of((0, 1, 2), logs), logs) == -np.inf


@pytest.mark.parametrize("seed", range(5))
def test_the_compiled_pass_equals_the_readable_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        num_frames, vocab = int(rng.integers(1, 10)), int(rng.integers(1, 9))
        chances = random_frames(rng, num_frames, vocab + 1).astype(np.float32)
        logs = np.log(chances.astype(np.float64))
        held, marks = np.zeros(1, compiled.FRAMES), np.full(vocab, -1)
        frames = held[0]
        compiled.choose(0, np.arange(vocab)[None], chances[None], frames, marks)
        assert frames["num_tokens"] == vocab
        assert (marks == -1).all()
        prefix, previous = empty(logs), 0
        before, after = rng.normal(size=(2, vocab, 3)).astype(np.float32)
        for node in range(min(num_frames, 5)):
            compiled.weigh(node, frames)
            expected = np.exp(log_next(prefix, logs))
            order = frames["tokens"][:vocab]
            assert frames["weights"][:vocab] == pytest.approx(expected[order], rel=1e-12, abs=1e-300)
            compiled.lean(previous, frames, before, after)
            bias = (before[previous] @ after.T).astype(np.float64)
            q = np.exp(log_q(prefix, logs, bias))[order]
            assert frames["weights"][:vocab] == pytest.approx(q, rel=1e-5, abs=1e-300)
            choice = int(rng.integers(0, vocab))
            compiled.extend(node + 1, node, choice, frames)
            previous = int(order[choice])
            prefix = extend(prefix, previous, logs)


@pytest.mark.parametrize("names", [1, 3])
def test_the_best_tokens_of_each_frame_are_chosen(names: int) -> None:
    """Also where a token is listed several times, once for each frame that has it."""
    rng = np.random.default_rng(names)
    chances = rng.dirichlet(np.full(61, 0.3), 4).astype(np.float32)
    tokens = np.tile(rng.permutation(100)[:60], names)
    listed = np.concatenate([np.tile(chances[:, :60], names), chances[:, 60:]], axis=1)
    held, marks = np.zeros(1, compiled.FRAMES), np.full(100, -1)
    compiled.choose(0, tokens[None], listed[None], held[0], marks)
    best = {int(tokens[place]) for frame in chances for place in np.argsort(-frame[:60])[: compiled.PER_FRAME]}
    assert set(held[0]["tokens"][: held[0]["num_tokens"]].tolist()) == best
    place = held[0]["tokens"].tolist().index(int(tokens[5])) if int(tokens[5]) in best else 0
    at = tokens.tolist().index(int(held[0]["tokens"][place]))
    assert held[0]["shares"][:4, place].tolist() == chances[:, at].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_training_scores_equal_the_readable_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_frames, vocab, num_labels = int(rng.integers(2, 9)), int(rng.integers(2, 9)), int(rng.integers(1, 6))
    rows = [np.log(random_frames(rng, num_frames, vocab + 1)) for _ in range(4)]
    labels = rng.integers(0, vocab, (4, num_labels))
    weights, _ = next_log_weights(torch.from_numpy(np.stack(rows)), torch.from_numpy(labels))
    losses = token_losses(weights, torch.from_numpy(labels))
    for row, logs in enumerate(rows):
        prefix = empty(logs)
        for place, token in enumerate(labels[row].tolist()[:num_frames]):
            expected = log_q(prefix, logs)
            if expected[token] < -25.0:  # a repeat that hardly any alignment spells
                break
            assert torch.softmax(weights[row, place], 0).numpy() == pytest.approx(np.exp(expected), abs=1e-9)
            assert losses[row, place].item() == pytest.approx(-expected[token], abs=1e-6)
            prefix = extend(prefix, token, logs)


def test_the_training_loss_has_finite_gradients_where_a_label_is_impossible() -> None:
    scores = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[1, 1, 1, 1], [0, 1, 2, 3]])  # more repeats, and more tokens, than three frames can spell
    weights, _ = next_log_weights(torch.log_softmax(scores, -1), labels)
    token_losses(weights, labels).mean().backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_best_first_takes_the_likeliest_strings() -> None:
    rng = np.random.default_rng(3)
    logs = np.log(random_frames(rng, 4, 4))
    found = best_first(logs, 12)
    chances = dict(found)
    every = {}
    for length in range(1, 5):
        for tokens in itertools.product(range(3), repeat=length):
            prefix, total = empty(logs), 0.0
            for token in tokens:
                total += log_q(prefix, logs)[token]
                prefix = extend(prefix, token, logs)
            every[tokens] = total
    best = sorted(every.values(), reverse=True)[:11]
    assert sorted(chances.values(), reverse=True) == pytest.approx(best)


def test_labels_that_the_frames_cannot_spell_are_known() -> None:
    labels = torch.tensor([[7, 7, 3, 3], [1, 2, 3, 4], [5, 5, 5, 5]])
    assert is_spellable(labels, 4).tolist() == [[True, True, True, False], [True] * 4, [True, True, False, False]]
    for row in labels.tolist():
        logs = np.log(random_frames(np.random.default_rng(0), 4, 9))
        for length in range(1, 5):
            is_possible = log_psi(prefix_of(tuple(row[:length]), logs), logs) > -np.inf
            assert is_possible == bool(is_spellable(torch.tensor([row]), 4)[0, length - 1])
