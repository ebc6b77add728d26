"""Sections of the GPU check: the kernels' results against their oracles, and their time against the bytes they read."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from tests.attention_cases import Case, random_case, random_step, random_tensors, run
from tests.bench.gpu_room import Room, copy_bandwidth, first_line, kernel_seconds
from tests.random_sampling import random_logits, random_sampling
from tests.random_trees import pick
from tests.reference import ReferenceAttention
from verifier.accept import Choice
from verifier.attention import LayerKV
from verifier.kv import move_slots
from verifier.model import KV_ATTRIBUTE, AttentionInputs
from verifier.plan import RowStart, StepPlan, TreeSlot
from verifier.probe import LayerGeometry
from verifier.rows import SamplingRows
from verifier.step import PackedStep, StepBuffers
from verifier.torch.sampling import choose
from verifier.tree import DraftTrees

LLAMA = LayerGeometry("layer", 32, 8, 128, 128, 128**-0.5, None, None, False)
REAL = {
    "llama-8b": LLAMA,
    "qwen-0.5b": LayerGeometry("layer", 14, 2, 64, 64, 0.125, None, None, False),
    "gemma-2": LayerGeometry("layer", 16, 8, 256, 256, 0.0625, 100, 50.0, False),
    "gpt-oss": LayerGeometry("layer", 64, 8, 64, 64, 0.125, 128, None, True),
    "deepseek": LayerGeometry("layer", 16, 16, 192, 128, 0.07, None, None, False),
}
"""Layers of well-known models; the window of gemma is shorter than its own, so that short steps feel it."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FLOAT32_ERROR = 1e-5


def check_kernels(room: Room) -> None:
    """Every kernel against its oracle, attention in float64, on the device: 150 cases or as many as time allows."""
    counts: dict[str, dict[str, int]] = room.found.setdefault("checks", {})
    room.found["failures"] = []
    checks = _in_turns(
        _by_seed("sampling", compare_sampling, room), _by_seed("move", compare_move, room), _attention_cases(room)
    )
    for number, (name, check) in enumerate(checks):
        if room.is_over or number >= (12 if room.is_tiny else 150):
            break
        count = counts.setdefault(name, {"passed": 0, "failed": 0})
        try:
            problem = check()
        except Exception as error:  # a kernel that does not compile or faults is a finding too
            problem = first_line(error)
        count["failed" if problem else "passed"] += 1
        if problem and len(room.list("failures")) < 50:
            room.add("failures", f"{name}: {problem}")
    kinds = {"sampling", "move", *(f"attention {str(dtype).removeprefix('torch.')}" for dtype in DTYPES)}
    room.found["passed"] = kinds <= set(counts) and not room.found["failures"]
    room.save()


Check = tuple[str, Callable[[], str]]
"""A name to count under, and what tells a problem, or nothing."""


def _in_turns(*sources: Iterator[Check]) -> Iterator[Check]:
    while True:
        for source in sources:
            yield next(source)


def _attention_cases(room: Room) -> Iterator[Check]:
    """First layers of real models in every type, tuned as the device is, then any layers and tunings at all."""
    seed = 0
    while True:
        if room.is_tiny or seed > 3 * len(REAL):
            name, case = "any layer", random_case(seed, DTYPES[seed % 3], room.device)
        elif seed == 2 * len(REAL):
            name, case = "long", _long_case(room)
        else:
            name, case = _real_case(seed, room)
        kind = str(case.tensors["query"].dtype).removeprefix("torch.")
        yield f"attention {kind}", lambda case=case, name=name: _told(name, compare_attention(case))
        seed += 1


def _told(name: str, problem: str) -> str:
    return f"{name}: {problem}" if problem else ""


def _real_case(seed: int, room: Room) -> tuple[str, Case]:
    name, geometry = list(REAL.items())[seed % len(REAL)]
    dtype = DTYPES[seed % 3]  # each of them among the first three cases: compiling may take all of the time
    step = random_step(np.random.default_rng(seed), 16, room.device)
    return name, Case(step, geometry, None, random_tensors(step, geometry, dtype, room.device, seed))


def _long_case(room: Room) -> Case:
    """Rows of very different lengths, one of 32,768 tokens, with full trees."""
    step = tree_step([32768, 700, 4095], 64, room.device)
    return Case(step, LLAMA, None, random_tensors(step, LLAMA, torch.bfloat16, room.device, 3))


def compare_attention(case: Case) -> str:
    """The kernel against float64 over the same numbers; nothing, or how far it is off.

    In half types weights and results are each rounded once, to half a unit: together one unit of what the values weigh
    in at, the same attention over their magnitudes.
    """
    from verifier.cuda.attention import TritonAttention

    dtype = case.tensors["query"].dtype
    oracle = ReferenceAttention(torch.float64)
    exact = dataclasses.replace(case, tensors={name: tensor.double() for name, tensor in case.tensors.items()})
    expected, actual = run(oracle, exact), run(TritonAttention(case.tuning), case)
    if dtype == torch.float32:
        allowed = _FLOAT32_ERROR * (1 + expected["out"].abs())
    else:
        sizes = dict(exact.tensors, value=exact.tensors["value"].abs(), v=exact.tensors["v"].abs())
        weighed = run(oracle, dataclasses.replace(exact, tensors=sizes))["out"]
        allowed = torch.finfo(dtype).eps * weighed + 1e-6
    off = (actual["out"].double() - expected["out"]).abs()
    if not bool((off <= allowed).all()):  # also where it is not a number
        worst = float((off / allowed).nan_to_num(torch.inf).max())
        return f"{worst:.2f} times the error allowed, {float(off.max()):.2e} off"
    for name in ("k", "v"):
        if not torch.equal(actual[name].double(), expected[name]):
            return f"the pool's {name} is not what was written"
    return ""


def _by_seed(name: str, compare: Callable[[int, Room], str], room: Room) -> Iterator[Check]:
    """Random cases without end."""
    for seed in itertools.count():
        yield name, partial(compare, seed, room)


def compare_sampling(seed: int, room: Room) -> str:
    """The sampler against torch in float64, on random parameters and logits with ties, infinities and worse."""
    from verifier.cuda.kernels.sample import DrawRecords, sample

    rng = np.random.default_rng(seed)
    num_rows, vocab = pick(rng, 1, 2, 3), pick(rng, 5, 64, 333, 333 if room.is_tiny else 128256)
    state = SamplingRows(num_rows, vocab)
    for row in range(num_rows):
        state.start(RowStart(row, (0,), 1, random_sampling(rng, vocab)))
    logits = torch.from_numpy(random_logits(rng, (num_rows, vocab))).to(room.device, torch.float32)
    positions = rng.integers(0, 2**33, num_rows)
    expected = choose(logits, state, Choice(list(range(num_rows)), positions.tolist())).tolist()
    found = sample(logits, DrawRecords.make(state.records, positions, logits.device)).tolist()
    return "" if found == expected else f"seed {seed}: chose {found}, not {expected}"


def compare_move(seed: int, room: Room) -> str:
    """Accepted K/V of several rows, ascending and overlapping, against torch."""
    from verifier.cuda.kernels.move import move

    rng = np.random.default_rng(seed)
    num_rows, depth, room_of_row = int(rng.integers(1, 5)), int(rng.integers(1, 7)), 20
    slot_of = rng.permutation(num_rows * room_of_row).reshape(num_rows, room_of_row)
    sources, targets = [], []
    for row in range(num_rows):
        nodes = np.sort(rng.permutation(np.arange(1, room_of_row))[:depth])
        sources.append(slot_of[row, nodes])
        targets.append(slot_of[row, 1 : depth + 1])
    heads, dim = pick(rng, 1, 3, 8), pick(rng, 16, 128)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn((2, num_rows * room_of_row, heads, dim), generator=generator).to(room.device, pick(rng, *DTYPES))
    expected = pool.clone()
    slots = torch.from_numpy(np.stack([np.concatenate(sources), np.concatenate(targets)])).to(room.device)
    move_slots(expected, slots[0], slots[1], 1)
    move(pool, slots[0], slots[1], num_rows)
    return "" if torch.equal(pool, expected) else f"seed {seed}: {num_rows} rows, {depth} deep"


def tree_step(lengths: list[int], num_nodes: int, device: str) -> PackedStep:
    """A tree of random form behind each length, over pages in random order."""
    rng = np.random.default_rng(0)
    num_rows, size = len(lengths), 16
    most = max(lengths) + num_nodes
    # Rows of a page table are a multiple of 16 pages: where its stride is not, another kernel is compiled.
    buffers = StepBuffers(num_rows, num_rows * num_nodes, -(-most // 256) * 256, size, device)
    counts = [-(-(length + num_nodes) // size) for length in lengths]
    free = rng.permutation(sum(counts)) + 1
    for row, (count, end) in enumerate(zip(counts, np.cumsum(counts).tolist(), strict=True)):
        buffers.page_table[row, :count] = free[end - count : end]
    trees = DraftTrees.allocate(num_rows)
    for _ in lengths:
        parents = [-1] + [int(rng.integers(max(0, node - 4), node)) for node in range(1, num_nodes)]
        trees.append(list(range(num_nodes)), parents, [1.0] * num_nodes, [0] * num_nodes)
    slots = tuple(TreeSlot(row, length, num_nodes) for row, length in enumerate(lengths))
    return buffers.pack(StepPlan(trees=slots), trees)


def time_kernels(room: Room) -> None:
    """Attention of a Llama-3.1-8B layer (new K/V written, attended, splits combined) against reading its K/V once.

    The longest contexts come first. So many layers with K/V of their own take turns that nothing stays in the cache.
    """
    bandwidth = copy_bandwidth(room)
    room.found["copy_gb_per_s"] = round(bandwidth / 1e9, 1)
    contexts, nodes, rows = (
        ((48, 16), (1, 4), (1,)) if room.is_tiny else ((32768, 4096, 512), (1, 8, 64, 32), (1, 8, 32))
    )
    for context in contexts:
        for num_rows in rows:
            for num_nodes in nodes:
                cell: dict[str, Any] = {"context": context, "rows": num_rows, "nodes": num_nodes}
                if room.is_over:
                    room.add("left_out", cell)
                    continue
                try:
                    cell |= _time_cell(room, (context, num_rows, num_nodes), bandwidth)
                except Exception as error:
                    cell["error"] = first_line(error)
                room.add("cells", cell)


def _time_cell(room: Room, size: tuple[int, int, int], bandwidth: float) -> dict[str, float]:
    from verifier.cuda.attention import TritonAttention

    context, num_rows, num_nodes = size
    geometry = dataclasses.replace(LLAMA, num_heads=4, num_kv_heads=2) if room.is_tiny else LLAMA
    dtype = torch.float32 if room.is_tiny else torch.bfloat16
    step = tree_step([context] * num_rows, num_nodes, room.device)
    per_token = geometry.num_kv_heads * (geometry.k_dim + geometry.v_dim) * dtype.itemsize
    layer_bytes = num_rows * (context + num_nodes) * per_token
    num_layers = 1 if room.is_tiny else max(1, min(64, -(-(2**28) // layer_bytes)))
    turns = 1 if room.is_tiny else max(8, num_layers)  # what it takes to start a graph counts for little
    inputs = [_layer_inputs(step, geometry, dtype, room.device) for _ in range(num_layers)]
    planned = TritonAttention().plan(step)

    def work() -> None:
        for turn in range(turns):
            planned.attend(inputs[turn % num_layers])

    seconds = statistics.median(kernel_seconds(work, room, 1 if room.is_tiny else 15)) / turns
    floor = layer_bytes / bandwidth
    return {"us": round(seconds * 1e6, 2), "floor_us": round(floor * 1e6, 2), "of_copy": round(floor / seconds, 3)}


def _layer_inputs(step: PackedStep, geometry: LayerGeometry, dtype: torch.dtype, device: str) -> AttentionInputs:
    """One layer with a pool of its own."""
    num_slots = (int(step.page_table.max()) + 1) * step.page_size

    def rand(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_()

    module = torch.nn.Module()
    k, v = (rand(num_slots, geometry.num_kv_heads, dim) for dim in (geometry.k_dim, geometry.v_dim))
    setattr(module, KV_ATTRIBUTE, LayerKV(k, v, geometry))
    heads = (geometry.num_heads, geometry.k_dim), (geometry.num_kv_heads, geometry.k_dim)
    query, key = (rand(1, step.num_positions, *shape).transpose(1, 2) for shape in heads)
    value = rand(1, step.num_positions, geometry.num_kv_heads, geometry.v_dim).transpose(1, 2)
    return AttentionInputs(module, query, key, value, geometry.scaling, None, None, None)
