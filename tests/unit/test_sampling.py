"""The host sampler equals the torch oracle, and both equal a by-hand reading of every parameter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verifier.accept import Choice, Walks
from verifier.cpu.accept import accept_host
from verifier.cpu.sampling import _bucket, _exp_below, _keep_nucleus, argmax_finite, choose_host, top_candidates
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.rows import SamplingRows
from verifier.step import StepBuffers
from verifier.torch.accept import accept_device
from verifier.torch.sampling import choose, process, truncate
from verifier.tree import DraftTrees, walk


def random_sampling(rng: np.random.Generator, vocab: int) -> SamplingParams:
    def maybe(value: object, neutral: object) -> object:
        return value if rng.random() < 0.5 else neutral

    return SamplingParams(
        max_tokens=50,
        seed=int(rng.integers(-(2**62), 2**62)),
        temperature=float(rng.choice([0.0, 0.3, 1.0, 1.7])),
        top_k=int(maybe(int(rng.integers(1, vocab + 3)), 0)),  # type: ignore[call-overload]
        top_p=float(maybe(float(rng.uniform(0.05, 1.0)), 1.0)),  # type: ignore[arg-type]
        min_p=float(maybe(float(rng.uniform(0.0, 0.5)), 0.0)),  # type: ignore[arg-type]
        presence_penalty=float(maybe(float(rng.uniform(-2, 2)), 0.0)),  # type: ignore[arg-type]
        frequency_penalty=float(maybe(float(rng.uniform(-2, 2)), 0.0)),  # type: ignore[arg-type]
        repetition_penalty=float(maybe(float(rng.uniform(0.5, 2)), 1.0)),  # type: ignore[arg-type]
        logit_bias=((int(rng.integers(0, vocab)), float(rng.uniform(-100, 100))),) if rng.random() < 0.3 else (),
        min_tokens=int(rng.integers(0, 12)),
        stop_ids=tuple(int(token) for token in rng.integers(0, vocab, int(rng.integers(0, 4)))),
    )


def choose_one(logits: np.ndarray, state: SamplingRows, row: int, position: int) -> int:
    lists = (state.stop_ids[row], state.bias_tokens[row], state.bias_values[row])
    seen = (state.counts[row], state.in_prompt[row])
    return int(
        choose_host(logits, logits.view(np.int32), position, state.records[row], lists, seen, np.empty(logits.shape[0]))
    )


@pytest.mark.parametrize("seed", range(150))
def test_host_equals_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab = int(rng.choice([5, 64, 333]))
    state = SamplingRows(3, vocab)
    for row in range(3):
        tokens = tuple(int(token) for token in rng.integers(0, vocab, 14))
        state.start(RowStart(row, tokens, int(rng.integers(1, 14)), random_sampling(rng, vocab)))
    logits = (rng.normal(size=(3, vocab)) * rng.choice([0.5, 3, 10])).astype(np.float32)
    positions = [14, 15, 20]
    expected = choose(torch.from_numpy(logits), state, Choice([0, 1, 2], positions)).tolist()
    assert [choose_one(logits[row], state, row, positions[row]) for row in range(3)] == expected


def process_one(z: list[float], sampling: SamplingParams, tokens: tuple[int, ...], num_prompt: int) -> list[float]:
    state = SamplingRows(1, len(z))
    state.start(RowStart(0, tokens, num_prompt, sampling))
    return process(torch.tensor([z], dtype=torch.float64), state, Choice([0], [len(tokens)]))[0].tolist()


def test_penalties_by_hand() -> None:
    """Token 0 is in the prompt only, token 1 twice in the answer, token 2 nowhere."""
    sampling = SamplingParams(
        max_tokens=9, seed=0, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25
    )
    assert process_one([3.0, -1.0, 2.0], sampling, (0, 1, 1), 1) == [1.5, -2.0 - 1.0 - 0.25, 2.0]


def test_bias_and_minimum_length_by_hand() -> None:
    sampling = SamplingParams(max_tokens=9, seed=0, logit_bias=((2, 4.0),), min_tokens=2, stop_ids=(1,))
    assert process_one([0.0, 9.0, 0.0], sampling, (0, 0), 1) == [0.0, float("-inf"), 4.0]
    assert process_one([0.0, 9.0, 0.0], sampling, (0, 0, 0), 1) == [0.0, 9.0, 4.0]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (SamplingParams(max_tokens=1, seed=0, top_k=2), {0, 1}),
        (SamplingParams(max_tokens=1, seed=0, top_p=0.6), {0, 1}),
        (SamplingParams(max_tokens=1, seed=0, top_p=0.4), {0}),
        (SamplingParams(max_tokens=1, seed=0, min_p=0.35), {0, 1}),
        (SamplingParams(max_tokens=1, seed=0, top_k=3, top_p=0.9), {0, 1, 2}),
        (SamplingParams(max_tokens=1, seed=0), {0, 1, 2, 3}),
    ],
)
def test_truncations_by_hand(sampling: SamplingParams, kept: set[int]) -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05."""
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    state = SamplingRows(1, 4)
    state.start(RowStart(0, (0,), 1, sampling))
    left = truncate(z, state, [0])[0]
    assert {token for token in range(4) if left[token] > float("-inf")} == kept


def test_broken_logits_fail_alone() -> None:
    state = SamplingRows(2, 4)
    for row, temperature in ((0, 0.0), (1, 1.0)):
        state.start(RowStart(row, (0,), 1, SamplingParams(max_tokens=1, seed=0, temperature=temperature)))
    for bad in (np.nan, -np.nan, np.inf):
        logits = np.array([0.0, bad, 1.0, 2.0], np.float32)
        assert argmax_finite(logits.view(np.int32)) == -1
        assert choose_one(logits, state, 1, 1) == -1
        assert choose(torch.from_numpy(logits)[None], state, Choice([0], [1])).tolist() == [-1]
        tokens, values = np.empty((1, 2), np.int32), np.empty((1, 2), np.float32)
        top_candidates(logits[None], logits[None].view(np.int32), tokens, values)
        assert tokens.tolist() == [[-1, -1]]
    all_banned = np.full(4, -np.inf, np.float32)
    assert argmax_finite(all_banned.view(np.int32)) == -1


@pytest.mark.parametrize("seed", range(20))
def test_top_candidates_equal_topk(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab, count = int(rng.choice([7, 64, 1000])), int(rng.choice([1, 4, 6]))
    logits = rng.normal(size=(5, vocab)).astype(np.float32)
    logits[0, :3] = logits[0].max() + 1  # ties go to the lowest token
    logits[1, rng.integers(0, vocab, vocab // 3)] = -np.inf
    tokens, values = np.empty((5, count), np.int32), np.empty((5, count), np.float32)
    top_candidates(logits, logits.view(np.int32), tokens, values)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    assert np.array_equal(values, np.take_along_axis(logits, order, axis=1))
    assert np.array_equal(tokens[np.isfinite(values)], order[np.isfinite(values)])


@pytest.mark.parametrize("seed", range(40))
def test_walks_equal_the_plain_walk(seed: int) -> None:
    """Host and device walks equal tree.walk with the oracle sampler, penalties advanced along the path."""
    rng = np.random.default_rng(seed)
    vocab, num_rows = 8, 4
    trees = DraftTrees.allocate(num_rows)
    prefixes, sizes = [], []
    for _ in range(num_rows):
        size = int(rng.integers(1, 30))
        tokens, parents = [int(rng.integers(0, vocab))], [-1]
        for _ in range(size - 1):
            parent, token = int(rng.integers(0, len(tokens))), int(rng.integers(0, vocab))
            if (parent, token) not in set(zip(parents, tokens, strict=True)):
                tokens.append(token)
                parents.append(parent)
        trees.append(tokens, parents, [1.0] * len(tokens), [0] * len(tokens))
        prefixes.append(int(rng.integers(2, 9)))
        sizes.append(len(tokens))
    params = [random_sampling(rng, vocab) for _ in range(num_rows + 1)]
    starts = [RowStart(r, tuple(rng.integers(0, vocab, 2).tolist()), 1, params[r]) for r in range(num_rows + 1)]
    logits = (rng.normal(size=(trees.num_nodes + 1, vocab)) * 3).astype(np.float32)

    def fresh() -> SamplingRows:
        state = SamplingRows(num_rows + 1, vocab)
        for start in starts:
            state.start(start)
        return state

    slots = tuple(TreeSlot(row, prefix, size) for row, (prefix, size) in enumerate(zip(prefixes, sizes, strict=True)))
    plan = StepPlan(trees=slots, chunks=(Chunk(num_rows, 2, (1, 1, 1, 1), True),))
    step = StepBuffers(num_rows + 1, 256, 64, 4, "cpu").pack(plan, trees)
    walks = Walks.make(trees, step, [num_rows])
    host_state, device_state, state = fresh(), fresh(), fresh()
    host = accept_host(logits, walks, host_state, None)
    device = accept_device(torch.from_numpy(logits), walks, device_state)
    for row in range(num_rows):
        offset = trees.span(row).start

        def pick(node: int, path: list[int], row: int = row, offset: int = offset) -> int:
            place = Choice([row], [prefixes[row] + len(path) + 1])
            token = int(choose(torch.from_numpy(logits[offset + node : offset + node + 1]), state, place)[0])
            state.counts[row, token] += 1
            return token

        won, accepted = walk(trees, row, pick)
        for path in (host, device):
            assert path.tokens[row, : path.num_accepted[row] + 1].tolist() == won
            assert path.nodes[row, : path.num_accepted[row]].tolist() == accepted
    last = choose(torch.from_numpy(logits[-1:]), fresh(), Choice([num_rows], [6])).tolist()
    assert host.tokens[num_rows, :1].tolist() == last
    assert device.tokens[num_rows, :1].tolist() == last
    penalised = [row for row in range(num_rows) if params[row].has_penalties]
    assert np.array_equal(host_state.counts[penalised], device_state.counts[penalised])
    best = logits.argmax(axis=1).astype(np.int32)[: trees.num_nodes]
    again = accept_host(logits, walks, fresh(), best)
    assert np.array_equal(again.tokens, host.tokens)


def test_vector_exp_is_exp() -> None:
    z = np.concatenate([np.linspace(-690, 0, 4001), [-np.inf, -1e-300, -0.5 * np.log(2)]])
    np.testing.assert_allclose(_exp_below(z, 0.0)[:-3], np.exp(z[:-3]), rtol=4e-16)
    assert _exp_below(z, 0.0)[-3] < 1e-300


@pytest.mark.parametrize("seed", range(60))
def test_nucleus_equals_a_full_sort(seed: int) -> None:
    """Also where many tokens tie, where one has it all, and where the mass ends in the tail."""
    rng = np.random.default_rng(seed)
    vocab = int(rng.choice([3, 50, 3000]))
    logits = rng.normal(size=vocab) * rng.choice([0.0, 0.01, 1.0, 30.0])
    if rng.random() < 0.5:
        logits = np.round(logits)
    top_p = float(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-12]))
    state = SamplingRows(1, vocab)
    state.start(RowStart(0, (0,), 1, SamplingParams(max_tokens=1, seed=0, top_p=top_p)))
    expected = truncate(torch.from_numpy(logits)[None], state, [0])[0].numpy()
    z = logits.copy()
    _keep_nucleus(z, top_p, int(logits.argmax()))
    kept, wanted = np.isfinite(z), np.isfinite(expected)
    if not np.array_equal(kept, wanted):  # where the sum's last bits decide, one token more or less is as right
        assert abs(int(kept.sum()) - int(wanted.sum())) <= 1
        weights = np.exp(np.sort(logits)[::-1] - logits.max())
        reached = weights.cumsum()[min(kept.sum(), wanted.sum()) - 1] / weights.sum()
        assert abs(reached - top_p) < 1e-12
    assert np.array_equal(z[kept], logits[kept])


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-300, 1e-30, 1e-5])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_near_nothing_is_greedy(temperature: float, top_p: float) -> None:
    logits = np.array([-5.0, -2.0, -2.5, -90.0], np.float32)
    state = SamplingRows(1, 4)
    state.start(RowStart(0, (0,), 1, SamplingParams(max_tokens=1, seed=3, temperature=temperature, top_p=top_p)))
    assert choose_one(logits, state, 0, 1) == 1
    assert choose(torch.from_numpy(logits)[None], state, Choice([0], [1])).tolist() == [1]


def test_a_penalty_that_overflows_fails_the_row() -> None:
    state = SamplingRows(1, 4)
    sampling = SamplingParams(max_tokens=1, seed=3, repetition_penalty=1e-320, top_p=0.9)
    state.start(RowStart(0, (1,), 1, sampling))
    logits = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    assert choose_one(logits, state, 0, 1) == -1
    assert choose(torch.from_numpy(logits)[None], state, Choice([0], [1])).tolist() == [-1]


def test_buckets_never_leave_their_array() -> None:
    for gap in (np.nan, np.inf, -np.inf, -1.0, 0.0, 1e300, 3.9):
        assert 0 <= _bucket(gap) < 256
