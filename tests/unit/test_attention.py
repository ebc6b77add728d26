"""Every attention back end equals the reference on random steps: mixed chunks and trees, any geometry."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from tests.devices import require_kernels
from tests.reference import ReferenceAttention
from verifier.attention import LayerKV
from verifier.kv import KVPool
from verifier.load import ATTENTIONS
from verifier.model import KV_ATTRIBUTE, AttentionInputs
from verifier.plan import Chunk, StepPlan, TreeSlot
from verifier.probe import LayerGeometry
from verifier.step import PackedStep, StepBuffers
from verifier.torch.attention import SdpaAttention
from verifier.tree import DraftTrees

BACKENDS = list(ATTENTIONS)
NUM_CASES = {"triton": 30}
"""Of 60: its interpreter is slow, and test_triton_attention.py has more."""


def random_tree(rng: np.random.Generator, size: int) -> tuple[list[int], list[int]]:
    parents = [-1] + [int(rng.integers(0, node)) for node in range(1, size)]
    return [int(token) for token in rng.permutation(1000)[:size]], parents


def random_step(rng: np.random.Generator, page_size: int, num_pages: int) -> tuple[PackedStep, int]:
    num_rows = int(rng.integers(1, 6))
    max_len = 3100
    buffers = StepBuffers(num_rows, 512, max_len, page_size, "cpu")
    in_order = list(range(num_pages - 1, 0, -1))
    free = rng.permutation(in_order).tolist() if rng.random() < 0.8 else in_order
    trees = DraftTrees.allocate(num_rows)
    slots, chunks = [], []
    for row in range(num_rows):
        prefix = int(rng.integers(0, 40)) if rng.random() < 0.8 else 3000
        size = int(rng.integers(1, 20))
        pages = -(-(prefix + size) // page_size)
        buffers.write_pages(tuple((row, index, free.pop()) for index in range(pages)))
        if rng.random() < 0.6:
            tokens, parents = random_tree(rng, size)
            trees.append(tokens, parents, [1.0] * size, [0] * size)
            slots.append(TreeSlot(row, prefix, size))
        else:
            chunks.append(Chunk(row, prefix, tuple(range(size)), bool(rng.random() < 0.5)))
    plan = StepPlan(trees=tuple(slots), chunks=tuple(chunks))
    return buffers.pack(plan, trees), num_rows


def random_geometry(rng: np.random.Generator) -> LayerGeometry:
    kv_heads = int(rng.choice([1, 2, 3]))
    k_dim = int(rng.choice([4, 8]))
    return LayerGeometry(
        name="layer",
        num_heads=kv_heads * int(rng.choice([1, 2, 4])),
        num_kv_heads=kv_heads,
        k_dim=k_dim,
        v_dim=int(rng.choice([k_dim, 6])),
        scaling=float(rng.choice([0.3, 1.0])),
        window=None if rng.random() < 0.5 else int(rng.integers(1, 30)),
        softcap=None if rng.random() < 0.6 else 2.0,
        has_sinks=bool(rng.random() < 0.3),
    )


@pytest.mark.parametrize(
    ("backend", "seed"), [(name, seed) for name in BACKENDS for seed in range(NUM_CASES.get(name, 60))]
)
def test_backend_equals_reference(backend: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    page_size = int(rng.choice([4, 16]))
    num_pages = 4 * 3100 // page_size
    step, _ = random_step(rng, page_size, num_pages)
    geometry = random_geometry(rng)
    if backend == "triton":
        require_kernels("cpu")
    module, path = ATTENTIONS[backend].split(":")
    attention = getattr(importlib.import_module(module), path)()

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query = rand(1, geometry.num_heads, step.num_positions, geometry.k_dim)
    key = rand(1, geometry.num_kv_heads, step.num_positions, geometry.k_dim)
    value = rand(1, geometry.num_kv_heads, step.num_positions, geometry.v_dim)
    sinks = rand(geometry.num_heads) if geometry.has_sinks else None
    past_k = rand(num_pages * page_size, geometry.num_kv_heads, geometry.k_dim)
    past_v = rand(num_pages * page_size, geometry.num_kv_heads, geometry.v_dim)
    results = []
    for candidate in (ReferenceAttention(), attention):
        pool = KVPool([geometry], num_pages, page_size, torch.float32, "cpu")
        k, v = pool.layer(0)
        k.copy_(past_k)
        v.copy_(past_v)
        layer = torch.nn.Module()
        setattr(layer, KV_ATTRIBUTE, LayerKV(k, v, geometry))
        inputs = AttentionInputs(layer, query, key, value, geometry.scaling, geometry.window, geometry.softcap, sinks)
        results.append((candidate.plan(step).attend(inputs), k.clone(), v.clone()))
    (expected, k_expected, v_expected), (actual, k_actual, v_actual) = results
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(k_actual, k_expected)
    assert torch.equal(v_actual, v_expected)


def test_reference_sees_prefix_and_ancestors_only() -> None:
    """A hand-made tree: node 2 is a child of the root, not of node 1, so node 1 stays invisible to it."""
    buffers = StepBuffers(1, 16, 16, 4, "cpu")
    buffers.write_pages(((0, 0, 3), (0, 1, 1)))
    trees = DraftTrees.allocate(1)
    trees.append([5, 6, 7], [-1, 0, 0], [1.0, 0.5, 0.5], [0, 1, 1])
    step = buffers.pack(StepPlan(trees=(TreeSlot(0, 2, 3),)), trees)
    geometry = LayerGeometry("layer", 1, 1, 1, 1, 1.0, None, None, False)
    pool = KVPool([geometry], 4, 4, torch.float32, "cpu")
    k, v = pool.layer(0)
    v[12], v[13] = 1.0, 10.0  # page 3 holds positions 0 and 1
    layer = torch.nn.Module()
    setattr(layer, KV_ATTRIBUTE, LayerKV(k, v, geometry))
    zeros = torch.zeros(1, 1, 3, 1)
    value = torch.tensor([100.0, 1000.0, 10000.0]).view(1, 1, 3, 1)
    inputs = AttentionInputs(layer, zeros, zeros, value, 1.0, None, None, None)
    out = ReferenceAttention().plan(step).attend(inputs).flatten()
    torch.testing.assert_close(out, torch.tensor([111 / 3, 1111 / 4, 10111 / 4]))
    assert step.position_ids.tolist() == [[2, 3, 3]]
    assert step.write_slots.tolist() == [14, 15, 4]


def test_one_long_row_does_not_widen_the_short_ones() -> None:
    """31 rows of 200 tokens and one of 8,000: what is gathered stays within about twice of what is there."""
    lengths = [200] * 31 + [8000]
    buffers = StepBuffers(32, 512, 8192, 16, "cpu")
    trees = DraftTrees.allocate(32)
    slots = []
    for row, length in enumerate(lengths):
        trees.append([1, 2, 3], [-1, 0, 1], [1.0] * 3, [0] * 3)
        slots.append(TreeSlot(row, length - 3, 3))
    groups = SdpaAttention().plan(buffers.pack(StepPlan(trees=tuple(slots)), trees)).groups
    gathered = sum(group.starts.shape[0] * group.num_keys for group in groups)
    assert gathered < 2 * sum(lengths) + 8192
    assert sorted(int(start) for group in groups for start in group.starts) == [3 * row for row in range(32)]


def test_rows_alike_are_one_group() -> None:
    buffers = StepBuffers(8, 512, 512, 16, "cpu")
    trees = DraftTrees.allocate(8)
    slots = []
    for row in range(8):
        trees.append([1, 2], [-1, 0], [1.0] * 2, [0] * 2)
        slots.append(TreeSlot(row, 100 + 20 * row, 2))
    assert len(SdpaAttention().plan(buffers.pack(StepPlan(trees=tuple(slots)), trees)).groups) == 1
