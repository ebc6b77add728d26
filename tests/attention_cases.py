"""Random steps over random layers, for whoever compares one attention with another; needs no test framework."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from tests.random_trees import pick
from verifier.attention import LayerKV, TreeAttention
from verifier.cuda.launch import Tuning
from verifier.model import KV_ATTRIBUTE, AttentionInputs
from verifier.plan import Chunk, StepPlan, TreeSlot
from verifier.probe import LayerGeometry
from verifier.step import PackedStep, StepBuffers
from verifier.tree import DraftTrees


@dataclasses.dataclass
class Case:
    """One random step over one random layer."""

    step: PackedStep
    geometry: LayerGeometry
    tuning: Tuning | None
    """None for the device's own."""
    tensors: dict[str, torch.Tensor]


def random_segment(rng: np.random.Generator, row: int, trees: DraftTrees) -> tuple[int, int, TreeSlot | Chunk]:
    """Prefix length, positions, and the segment; its tree is appended if it is one."""
    prefix = 0 if rng.random() < 0.1 else int(rng.integers(0, 200))
    if rng.random() < 0.6:
        size = pick(rng, 1, 64, int(rng.integers(2, 12)), int(rng.integers(2, 30)))
        parents = [-1] + [int(rng.integers(max(0, node - 4), node)) for node in range(1, size)]
        trees.append(list(range(size)), parents, [1.0] * size, [0] * size)
        return prefix, size, TreeSlot(row, prefix, size)
    size = int(rng.integers(1, 50))
    return prefix, size, Chunk(row, prefix, tuple(range(size)), True)


def random_step(rng: np.random.Generator, page_size: int, device: str) -> PackedStep:
    num_rows = pick(rng, 1, 2, 2, 3)
    trees = DraftTrees.allocate(num_rows)
    segments = [random_segment(rng, row, trees) for row in range(num_rows)]
    num_pages = sum(-(-(prefix + size) // page_size) for prefix, size, _ in segments) + 3
    buffers = StepBuffers(num_rows, 256, 264, page_size, device)
    free = (rng.permutation(num_pages - 1) + 1).tolist()
    for row, (prefix, size, _) in enumerate(segments):
        count = -(-(prefix + size) // page_size)
        buffers.write_pages(tuple((row, index, free.pop()) for index in range(count)))
    slots = tuple(segment for *_, segment in segments if isinstance(segment, TreeSlot))
    chunks = tuple(segment for *_, segment in segments if isinstance(segment, Chunk))
    return buffers.pack(StepPlan(trees=slots, chunks=chunks), trees)


def random_geometry(rng: np.random.Generator) -> LayerGeometry:
    kv_heads, fold = pick(rng, (1, 1), (1, 2), (2, 2), (1, 3), (2, 4), (1, 5), (1, 6), (1, 7), (1, 8), (3, 1))
    k_dim = pick(rng, 16, 24, 40, 64, 80, 96, 128)
    return LayerGeometry(
        name="layer",
        num_heads=kv_heads * fold,
        num_kv_heads=kv_heads,
        k_dim=k_dim,
        v_dim=k_dim if rng.random() < 0.6 else pick(rng, 16, 48, 64, 128),
        scaling=k_dim**-0.5,
        window=None if rng.random() < 0.5 else int(rng.integers(1, 100)),
        softcap=None if rng.random() < 0.6 else pick(rng, 2.0, 50.0),
        has_sinks=bool(rng.random() < 0.3),
    )


def random_tuning(rng: np.random.Generator) -> Tuning:
    return Tuning(
        num_multiprocessors=pick(rng, 1, 3),
        max_lines=pick(rng, 64, 128),
        tile_keys=pick(rng, 32, 128),
        grid_per_multiprocessor=8,
        min_keys=pick(rng, 16, 64),
        max_splits=pick(rng, 1, 2, 8),
        combine_lines=16,
    )


def random_tensors(
    step: PackedStep, geometry: LayerGeometry, dtype: torch.dtype, device: str, seed: int
) -> dict[str, torch.Tensor]:
    """The inputs of a layer, and a pool just large enough for the step's pages."""
    generator = torch.Generator().manual_seed(seed)
    num_slots = (int(step.page_table.max()) + 1) * step.page_size
    kv_heads = geometry.num_kv_heads

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tensors = {
        # As a network's projections leave them: heads behind positions in memory.
        "query": rand(1, step.num_positions, geometry.num_heads, geometry.k_dim).transpose(1, 2),
        "key": rand(1, step.num_positions, kv_heads, geometry.k_dim).transpose(1, 2),
        "value": rand(1, step.num_positions, kv_heads, geometry.v_dim).transpose(1, 2),
        "k": rand(num_slots, kv_heads, geometry.k_dim),
        "v": rand(num_slots, kv_heads, geometry.v_dim),
    }
    if geometry.has_sinks:
        tensors["sinks"] = rand(geometry.num_heads)
    return tensors


def random_case(seed: int, dtype: torch.dtype, device: str) -> Case:
    rng = np.random.default_rng(seed)
    step = random_step(rng, pick(rng, 1, 4, 7, 16, 32), device)
    geometry, tuning = random_geometry(rng), random_tuning(rng)
    return Case(step, geometry, tuning, random_tensors(step, geometry, dtype, device, seed))


def run(backend: TreeAttention, case: Case) -> dict[str, torch.Tensor]:
    """The output, and the pool after the step."""
    tensors = case.tensors
    k, v = tensors["k"].clone(), tensors["v"].clone()
    layer = torch.nn.Module()
    setattr(layer, KV_ATTRIBUTE, LayerKV(k, v, case.geometry))
    geometry = case.geometry
    inputs = AttentionInputs(
        layer,
        tensors["query"],
        tensors["key"],
        tensors["value"],
        geometry.scaling,
        geometry.window,
        geometry.softcap,
        tensors.get("sinks"),
    )
    return {"out": backend.plan(case.step).attend(inputs), "k": k, "v": v}
