"""Every kernel beside attention equals its oracle in torch, NumPy or plain Python, on random shapes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.devices import DEVICES, require_kernels
from tests.random_trees import pick, random_trees
from tests.test_imports import MODULES, imports_of
from verifier.attention import LayerKV, write_kv
from verifier.kv import move_slots
from verifier.load import choose_attention
from verifier.model import AttentionInputs, ModelError
from verifier.noise import gumbel_device, words
from verifier.plan import StepPlan, TreeSlot
from verifier.probe import LayerGeometry
from verifier.step import StepBuffers
from verifier.tree import DraftTrees, walk

ROOT = Path(__file__).resolve().parent.parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest) -> None:
    device = request.node.callspec.params.get("device") if hasattr(request.node, "callspec") else None
    if device is not None:
        require_kernels(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(50))
def test_scatter_writes_what_torch_writes(seed: int, device: str) -> None:
    from verifier.cuda.kernels.scatter import scatter

    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    kv_heads, k_dim, v_dim = pick(rng, 1, 2, 3, 8), pick(rng, 16, 40, 128), pick(rng, 16, 24, 128)
    num_positions, num_slots, dtype = int(rng.integers(1, 40)), 64, pick(rng, *DTYPES)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    key, value = rand(1, kv_heads, num_positions, k_dim), rand(1, num_positions, kv_heads, v_dim).transpose(1, 2)
    slots = torch.from_numpy(rng.permutation(num_slots)[:num_positions]).to(device)
    pools = rand(num_slots, kv_heads, k_dim), rand(num_slots, kv_heads, v_dim)
    expected = pools[0].clone(), pools[1].clone()
    geometry = LayerGeometry("layer", kv_heads, kv_heads, k_dim, v_dim, 1.0, None, None, False)
    inputs = AttentionInputs(torch.nn.Module(), key, key, value, None, None, None, None)
    write_kv(inputs, LayerKV(*expected, geometry), dataclasses.replace(packed_roots(1), write_slots=slots))
    scatter(key[0], value[0], slots, *pools)
    assert torch.equal(pools[0], expected[0])
    assert torch.equal(pools[1], expected[1])


def packed_roots(num_rows: int) -> Any:
    trees = DraftTrees.allocate(num_rows)
    for _ in range(num_rows):
        trees.append_root(0)
    plan = StepPlan(trees=tuple(TreeSlot(row, 0, 1) for row in range(num_rows)))
    return StepBuffers(num_rows, 64, 64, 4, "cpu").pack(plan, trees)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(50))
def test_move_equals_torch_on_paths_of_trees(seed: int, device: str) -> None:
    """Groups of one row's accepted nodes: sources ascend, targets lie before them, and they overlap."""
    from verifier.cuda.kernels.move import move

    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    num_rows, depth, room = int(rng.integers(1, 5)), int(rng.integers(1, 7)), 20
    slot_of = torch.from_numpy(rng.permutation(num_rows * room).reshape(num_rows, room))
    sources, targets = [], []
    for row in range(num_rows):
        nodes = np.sort(rng.permutation(np.arange(1, pick(rng, depth + 2, room)))[:depth]).tolist()
        sources.append(slot_of[row, nodes + [0] * (depth - len(nodes))])
        targets.append(slot_of[row, list(range(1, len(nodes) + 1)) + [0] * (depth - len(nodes))])
    layers, heads, dim = int(rng.integers(1, 4)), pick(rng, 1, 3, 8), pick(rng, 16, 40, 256)
    pool = torch.randn(layers, num_rows * room, heads, dim, device=device).to(pick(rng, *DTYPES))
    expected = pool.clone()
    flat = torch.cat(sources).to(device), torch.cat(targets).to(device)
    is_real = flat[0] != flat[1]
    move_slots(expected, flat[0][is_real], flat[1][is_real], 1)
    move(pool, *flat, pick(rng, 1, num_rows))
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(12))
def test_noise_is_the_same_noise(seed: int, device: str) -> None:
    """Words bit for bit; float64 to the last bits; float32 within the bound that sampling counts on."""
    from tests.unit.noise_kernel import noise

    rng = np.random.default_rng(seed)
    key, position = int(rng.integers(-(2**63), 2**63 - 1)), int(rng.integers(0, 2 ** pick(rng, 8, 31, 40)))
    first, count = 4 * int(rng.integers(0, 50_000)), pick(rng, 16, 256)
    tokens = torch.arange(first, first + count)
    at = torch.tensor([key]), torch.tensor([position])
    drawn, near, exact = (tensor.cpu() for tensor in noise(key, position, first, count, device))
    assert torch.equal(drawn, words(*at, tokens)[0])
    expected = gumbel_device(*at, tokens)[0]
    torch.testing.assert_close(exact, expected, atol=4e-15, rtol=4e-15)
    assert (near.double() - expected).abs().max() < 2e-5


@pytest.mark.parametrize("device", DEVICES)
def test_float32_noise_is_good_at_both_ends(device: str) -> None:
    from tests.unit.noise_kernel import noise_of

    edge = torch.tensor([0, 1, 2, 2**28 - 1, 2**28, 2**28 + 1, 2**31, 2**32 - 2, 2**32 - 1], dtype=torch.int64)
    drawn = torch.cat([edge, torch.linspace(0, 2**32 - 1, 1015, dtype=torch.float64).long()])
    near, exact = (tensor.cpu() for tensor in noise_of(drawn.to(device)))
    expected = -torch.log(-torch.log1p(-(drawn.double() + 0.5) * 2.0**-32))
    assert (near.double() - expected).abs().max() < 2e-5
    torch.testing.assert_close(exact, expected, atol=4e-15, rtol=4e-15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(50))
def test_walk_equals_the_plain_walk(seed: int, device: str) -> None:
    from verifier.cuda.kernels.walk import walk as walk_device

    rng = np.random.default_rng(seed)
    num_trees, vocab = int(rng.integers(1, 5)), 4
    trees = random_trees(rng, num_trees, vocab, most=pick(rng, 2, 30, 64))
    num_nodes = trees.num_nodes
    chosen = rng.integers(-1 if rng.random() < 0.2 else 0, vocab, num_nodes)
    slots = rng.permutation(500)[:num_nodes]
    depth = int(trees.depths[:num_nodes].max())
    packed = (trees.tokens[:num_nodes].copy(), trees.parents[:num_nodes].astype(np.int64))
    starts = torch.from_numpy(trees.row_starts[: num_trees + 1].astype(np.int64))
    result = walk_device(
        torch.from_numpy(chosen).to(device),
        (torch.from_numpy(packed[0]).to(device), torch.from_numpy(packed[1]).to(device)),
        starts.to(device),
        torch.from_numpy(slots).to(device),
        torch.empty((num_trees, 2 * depth + 2), dtype=torch.int64, device=device),
    )
    won, moves = result.won.cpu().numpy(), result.moves.cpu().numpy()
    for tree in range(num_trees):
        begin = int(trees.row_starts[tree])
        tokens, nodes = walk(trees, tree, lambda node, _: int(chosen[begin + node]))  # noqa: B023
        if tokens[-1] < 0:
            assert won[tree, 0] == -1
            continue
        assert won[tree, 0] == len(nodes)
        assert won[tree, 1 : len(tokens) + 1].tolist() == tokens
        assert won[tree, depth + 2 : depth + 2 + len(nodes)].tolist() == nodes
        assert moves[0, tree, : len(nodes)].tolist() == [slots[begin + node] for node in nodes]
        assert moves[1, tree, : len(nodes)].tolist() == [slots[begin + 1 + level] for level in range(len(nodes))]
        assert (moves[0, tree, len(nodes) :] == moves[1, tree, len(nodes) :]).all()


def test_auto_takes_triton_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_attention("auto", "cpu") in ("native", "sdpa")
    require_kernels("cpu")
    assert choose_attention("auto", "cuda") == "triton"
    assert choose_attention("triton", "cpu") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ModelError, match=r"^attention triton needs a CUDA device; [^\n]*$"):
        choose_attention("triton", "cpu")


def test_triton_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_attention("auto", "cuda") == "sdpa"
    with pytest.raises(ModelError, match="the package triton is not installed"):
        choose_attention("triton", "cuda")


def test_only_what_is_chosen_imports_the_kernels() -> None:
    users = {
        module
        for module, path in MODULES.items()
        if any(name.split(".")[0] == "triton" or name.startswith("verifier.cuda.kernels") for name in imports_of(path))
    }
    parts = {f"verifier.cuda.{name}" for name in ("accept", "inputs", "report", "sampling")}
    allowed = {"verifier.cuda.attention", *parts}
    assert {name for name in users if not name.startswith("verifier.cuda.kernels")} == allowed
    loaded = {module for module, path in MODULES.items() if allowed & set(imports_of(path))}
    assert loaded == {"verifier.cuda.accept", "verifier.cuda.backend"}, "imported by name, not by import, when chosen"
    assert not any("verifier.cuda.backend" in imports_of(path) for path in MODULES.values())


@pytest.mark.slow
def test_kernels_compile_for_hopper_without_a_gpu() -> None:
    """What the interpreter accepts, the compiler may not: shared memory, types of branches, what tl.dot can take."""
    require_kernels("cpu")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.compile_kernels", "--few"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
