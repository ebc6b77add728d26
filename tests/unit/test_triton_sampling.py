"""Choosing tokens and walking trees by kernels: what the oracles choose, in every corner of the sampling parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tests.devices import DEVICES, require_kernels
from tests.random_sampling import random_logits, random_sampling
from tests.random_trees import pick, random_trees
from verifier.accept import Choice, Walks, walk_levels
from verifier.accept import Path as WalkPath
from verifier.cpu.accept import accept_host
from verifier.kv import KVPool
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.probe import LayerGeometry
from verifier.rows import SamplingRows
from verifier.step import StepBuffers
from verifier.torch.sampling import choose


@pytest.fixture(autouse=True)
def _kernels(device: str) -> None:
    require_kernels(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(56))
def test_sample_equals_the_oracle(seed: int, device: str) -> None:
    from verifier.cuda.kernels.sample import DrawRecords, sample

    rng = np.random.default_rng(seed)
    num_rows, vocab = pick(rng, 1, 2, 3), pick(rng, 5, 64, 150, 333)
    state = SamplingRows(num_rows, vocab)
    for row in range(num_rows):
        state.start(RowStart(row, (0,), 1, random_sampling(rng, vocab)))
    logits = torch.from_numpy(random_logits(rng, (num_rows, vocab))).to(device, pick(rng, torch.float32, torch.float64))
    positions = rng.integers(0, 2**33, num_rows)
    expected = choose(logits, state, Choice(list(range(num_rows)), positions.tolist())).tolist()
    records = DrawRecords.make(state.records, positions, torch.device(device))
    block = 4096 if device == "cuda" else pick(rng, 128, 512)
    assert sample(logits, records, block).tolist() == expected


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to infinity, as on a device
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("sampling", "logits"),
    [
        ({"top_p": 1e-9}, [0.0, 1.0, 1.0, 0.5]),
        ({"top_k": 1}, [0.0, 1.0, 1.0, 0.5]),
        ({"top_k": 2, "top_p": 0.5}, [0.0, -0.0, 0.0, -5.0]),
        ({"temperature": 5e-324}, [-5.0, -2.0, -2.5, -90.0]),
        ({"temperature": 1e-30, "top_p": 0.5}, [-5.0, -2.0, -2.5, -90.0]),
        ({"temperature": 1e300, "min_p": 1.0}, [1.0, 1.0, 1.0, 1.0]),
        ({"temperature": 1e300}, [1.0, -np.inf, 3.0, 1.0]),
        ({"top_p": 0.5, "min_p": 0.999}, [1.0, 1.0, 0.0, 1.0]),
    ],
)
def test_sampling_at_the_edges(sampling: dict[str, Any], logits: list[float], device: str) -> None:
    from verifier.cuda.kernels.sample import DrawRecords, sample

    num_rows = 12 if device == "cuda" else 3
    state = SamplingRows(num_rows, 4)
    for row in range(num_rows):
        state.start(RowStart(row, (0,), 1, SamplingParams(max_tokens=1, **{"seed": row, **sampling})))
    z = torch.tensor([logits] * num_rows, device=device)
    positions = np.arange(num_rows)
    expected = choose(z, state, Choice(list(range(num_rows)), positions.tolist())).tolist()
    assert sample(z, DrawRecords.make(state.records, positions, z.device)).tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
def test_a_mass_too_close_to_call_is_summed_in_float64(device: str) -> None:
    """The mass ahead of token 1 is top_p of the whole, but for 1e-9 more or less."""
    from verifier.cuda.kernels.sample import DrawRecords, sample

    z = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64, device=device).log()
    for seed in range(4):
        for top_p in (0.5 - 1e-9, 0.5 + 1e-9):
            state = SamplingRows(1, 3)
            state.start(RowStart(0, (0,), 1, SamplingParams(max_tokens=1, seed=seed, top_p=top_p)))
            expected = choose(z, state, Choice([0], [7])).tolist()
            assert sample(z, DrawRecords.make(state.records, np.array([7]), z.device)).tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
def test_a_small_nucleus_takes_many_rounds(device: str) -> None:
    """Equal logits: every draw lands far outside, the head is halved again and again, and one program ends it."""
    from verifier.cuda.kernels.sample import DrawRecords, sample

    state = SamplingRows(4, 200)
    for row in range(4):
        state.start(RowStart(row, (0,), 1, SamplingParams(max_tokens=1, seed=row, top_p=0.01)))
    z = torch.zeros((4, 200), device=device)
    expected = choose(z, state, Choice([0, 1, 2, 3], [5, 6, 7, 8])).tolist()
    assert sample(z, DrawRecords.make(state.records, np.array([5, 6, 7, 8]), z.device)).tolist() == expected


class Scene:
    """A step with trees, a prompt that ends, sampling of every kind, and a pool whose slots hold their own numbers."""

    def __init__(self, seed: int, device: str) -> None:
        rng = np.random.default_rng(seed)
        self.device, self.vocab, self.num_trees = device, 6, 3
        self.trees = random_trees(rng, self.num_trees, self.vocab, most=10)
        self.prefixes = rng.integers(2, 9, self.num_trees).tolist()
        self.starts = [
            RowStart(row, tuple(rng.integers(0, self.vocab, 2).tolist()), 1, random_processing(rng, self.vocab))
            for row in range(self.num_trees + 1)
        ]
        self.buffers = StepBuffers(self.num_trees + 1, 256, 64, 4, "cpu")
        pages = (rng.permutation((self.num_trees + 1) * 6) + 1).tolist()
        self.buffers.write_pages(tuple((place // 6, place % 6, page) for place, page in enumerate(pages)))
        sizes = np.diff(self.trees.row_starts[: self.num_trees + 1]).tolist()
        slots = tuple(TreeSlot(row, self.prefixes[row], size) for row, size in enumerate(sizes))
        plan = StepPlan(trees=slots, chunks=(Chunk(self.num_trees, 2, (1, 1, 1), True),))
        self.step = self.buffers.pack(plan, self.trees)
        self.walks = Walks.make(self.trees, self.step, [self.num_trees])
        self.logits = (rng.normal(size=(self.trees.num_nodes + 1, self.vocab)) * 3).astype(np.float32)
        if seed % 3 == 0:
            self.logits[int(rng.integers(0, self.trees.num_nodes)), 0] = np.nan

    def slot_of(self, row: int, place: int) -> int:
        table, size = self.buffers.page_table, self.buffers.page_size
        return int(table[row, place // size]) * size + place % size

    def run(self, is_host: bool) -> tuple[WalkPath, KVPool, SamplingRows]:
        from verifier.cuda.accept import judge_lists, path_of
        from verifier.cuda.inputs import StepInputs
        from verifier.cuda.sampling import choose_device

        state = SamplingRows(self.num_trees + 1, self.vocab)
        for start in self.starts:
            state.start(start)
        geometry = LayerGeometry("layer", 1, 1, 16, 16, 1.0, None, None, False)
        pool = KVPool([geometry] * 2, 32, 4, torch.float32, self.device)
        for index in range(2):
            for tensor in pool.layer(index):
                own = torch.arange(128, dtype=torch.float32, device=self.device)
                tensor.copy_(own[:, None, None].expand_as(tensor))
        if is_host:
            path = accept_host(self.logits, self.walks, state, None)
            self.move(pool, path, path.num_accepted)
        else:
            logits = torch.from_numpy(self.logits).to(self.device)
            inputs = StepInputs(torch.device(self.device)).take(dataclasses.replace(self.step), self.walks, state)
            judged = judge_lists(logits, inputs, self.walks, state, pool)
            path = path_of(judged.won.cpu().numpy(), self.walks)
            counted = state.records["has_penalties"][self.walks.rows]
            walk_levels(logits, self.walks, state, (choose_device, path, np.flatnonzero(counted).tolist()))
            self.move(pool, path, np.where(counted, path.num_accepted, 0))
        return path, pool, state

    def move(self, pool: KVPool, path: WalkPath, num_to_move: np.ndarray) -> None:
        for tree, prefix in enumerate(self.prefixes):
            nodes = path.nodes[tree, : max(int(num_to_move[tree]), 0)].tolist()
            sources = [self.slot_of(tree, prefix + node) for node in nodes]
            targets = [self.slot_of(tree, prefix + 1 + level) for level in range(len(nodes))]
            slots = torch.tensor([sources, targets], dtype=torch.int64, device=self.device)
            pool.move(slots[0], slots[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(8))
def test_the_walk_by_kernels_equals_the_host(seed: int, device: str) -> None:
    """Also with penalties, bias and minimum length in some rows, a broken row, and one whose prompt has just ended."""
    scene = Scene(seed, device)
    host, host_pool, host_state = scene.run(is_host=True)
    kernels, pool, state = scene.run(is_host=False)
    assert kernels.num_accepted.tolist() == host.num_accepted.tolist()
    for tree, accepted in enumerate(host.num_accepted.tolist()):
        assert kernels.tokens[tree, : accepted + 1].tolist() == host.tokens[tree, : accepted + 1].tolist()
        assert kernels.nodes[tree, : max(accepted, 0)].tolist() == host.nodes[tree, : max(accepted, 0)].tolist()
        slots = [scene.slot_of(tree, scene.prefixes[tree] + place) for place in range(accepted + 1)] if accepted else []
        for index in range(2):
            for mine, theirs in zip(pool.layer(index), host_pool.layer(index), strict=True):
                assert torch.equal(mine[slots], theirs[slots])
    sound = [row for row, start in enumerate(scene.starts) if start.sampling.has_penalties]
    sound = [row for row in sound if host.num_accepted[row] >= 0]
    assert np.array_equal(state.counts[sound], host_state.counts[sound])


def random_processing(rng: np.random.Generator, vocab: int) -> SamplingParams:
    plain = random_sampling(rng, vocab)
    return dataclasses.replace(
        plain,
        presence_penalty=float(rng.uniform(-2, 2)) if rng.random() < 0.3 else 0.0,
        logit_bias=((int(rng.integers(0, vocab)), float(rng.uniform(-9, 9))),) if rng.random() < 0.3 else (),
        min_tokens=int(rng.integers(0, 12)) if rng.random() < 0.3 else 0,
        stop_ids=(1,),
    )
