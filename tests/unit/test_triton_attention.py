"""The paged attention kernel equals the reference on random steps, in every type, and does not move its inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.attention_cases import random_case, run
from tests.devices import DEVICES, HAS_GPU, require_kernels
from tests.reference import ReferenceAttention
from verifier.attention import TreeAttention
from verifier.cuda.launch import Tuning, make_launch
from verifier.cuda.segments import StepUploads
from verifier.plan import StepPlan, TreeSlot
from verifier.probe import LayerGeometry
from verifier.step import PackedStep, StepBuffers
from verifier.tree import DraftTrees

NUM_EXACT, NUM_ROUNDED = (6, 12) if HAS_GPU else (24, 20)
"""On a GPU every shape is compiled first, which takes seconds."""
LLAMA = LayerGeometry("layer", 32, 8, 128, 128, 0.088, None, None, False)


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest) -> None:
    device = request.node.callspec.params.get("device", "cpu") if hasattr(request.node, "callspec") else "cpu"
    require_kernels(device)


def kernel(tuning: Tuning) -> TreeAttention:
    from verifier.cuda.attention import TritonAttention

    return TritonAttention(tuning)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(NUM_EXACT))
def test_float32_equals_reference(seed: int, device: str) -> None:
    case = random_case(seed, torch.float32, device)
    expected, actual = run(ReferenceAttention(), case), run(kernel(case.tuning), case)
    torch.testing.assert_close(actual["out"], expected["out"], atol=1e-5, rtol=1e-5)
    assert torch.equal(actual["k"], expected["k"])
    assert torch.equal(actual["v"], expected["v"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(NUM_ROUNDED))
def test_half_types_are_within_one_rounding(seed: int, device: str) -> None:
    """Against float32 over the same numbers.

    Weights and results are each rounded once, to half a unit of the type: together one unit of what the values weigh
    in at, the same attention over their magnitudes.
    """
    dtype = torch.bfloat16 if seed % 3 else torch.float16
    case = random_case(1000 + seed, dtype, device)
    exact = dataclasses.replace(case, tensors={name: tensor.float() for name, tensor in case.tensors.items()})
    sizes = dict(exact.tensors, value=exact.tensors["value"].abs(), v=exact.tensors["v"].abs())
    weighed = run(ReferenceAttention(), dataclasses.replace(exact, tensors=sizes))["out"]
    expected, actual = run(ReferenceAttention(), exact), run(kernel(case.tuning), case)
    assert actual["out"].dtype == dtype
    excess = (actual["out"].float() - expected["out"]).abs() - (torch.finfo(dtype).eps * weighed + 1e-6)
    assert excess.max() <= 0, f"{excess.max()} over one rounding"
    assert torch.equal(actual["k"].float(), expected["k"])


@pytest.mark.parametrize("device", DEVICES)
def test_padding_gets_zeros(device: str) -> None:
    """Positions that no segment owns, as a step has when it is padded to a bucket."""
    case = random_case(5, torch.float32, device)
    num_padding = 11
    expected = run(ReferenceAttention(), case)["out"]

    def pad(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_full((1, tensor.shape[1], num_padding, tensor.shape[3]), 9.0)], dim=2)

    padded = {name: pad(case.tensors[name]) for name in ("query", "key", "value")}
    trash = torch.zeros(num_padding, dtype=torch.int64, device=device)
    step = dataclasses.replace(case.step, write_slots=torch.cat([case.step.write_slots, trash]))
    out = run(kernel(case.tuning), dataclasses.replace(case, step=step, tensors=case.tensors | padded))["out"]
    torch.testing.assert_close(out[:, :-num_padding], expected, atol=1e-5, rtol=1e-5)
    assert not out[:, -num_padding:].any()


def plain_step(buffers: StepBuffers, lengths: list[int], num_nodes: int) -> PackedStep:
    trees = DraftTrees.allocate(len(lengths))
    for _ in lengths:
        trees.append(list(range(num_nodes)), [-1, *range(num_nodes - 1)], [1.0] * num_nodes, [0] * num_nodes)
    slots = tuple(TreeSlot(row, length, num_nodes) for row, length in enumerate(lengths))
    return buffers.pack(StepPlan(trees=slots), trees)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_a_class_share_their_addresses(device: str) -> None:
    """What a recorded launch reads stays where it is, and holds the newest step and pages."""
    buffers = StepBuffers(4, 64, 256, 16, device)
    uploads = StepUploads()
    buffers.write_pages(tuple((row, index, 1 + row * 16 + index) for row in range(4) for index in range(16)))
    first = uploads.take(plain_step(buffers, [100, 7, 30, 5], 3))
    addresses = [place.data_ptr() for place in vars_of(first) if isinstance(place, torch.Tensor)]
    assert all(address % 16 == 0 for address in addresses)
    buffers.write_pages(((1, 0, 99), (2, 1, 77)))
    step = plain_step(buffers, [3, 12, 200], 4)
    second = uploads.take(step)
    assert [place.data_ptr() for place in vars_of(second) if isinstance(place, torch.Tensor)] == addresses
    assert second.header.tolist() == [3, 3, 215 + 12, 4 * (215 + 12)]
    assert second.starts[:4].tolist() == [0, 4, 8, 12]
    assert second.prefix_lens[:3].tolist() == [3, 12, 200]
    assert second.depths[:12].tolist() == [0, 1, 2, 3] * 3
    assert second.page_table[1, 0] == 99
    assert second.page_table[2, :13].tolist() == buffers.page_table[2, :13].tolist()


def vars_of(value: Any) -> list[Any]:
    return [getattr(value, entry.name) for entry in dataclasses.fields(value)]


def test_launches_fit_the_step() -> None:
    """Decoding takes small tiles and many splits; a step that fills the device by itself is not split."""
    decode = make_launch(LLAMA, (1, 1, 1), 2, Tuning())
    assert (decode.block_m, decode.block_q, decode.num_items) == (16, 4, 1)
    assert decode.num_splits == 64
    tree = make_launch(LLAMA, (64, 64, 1), 2, Tuning())
    assert (tree.block_m, tree.block_q) == (128, 32)
    prefill = make_launch(LLAMA, (2048, 2048, 1), 2, Tuning())
    assert prefill.num_splits == 1
    assert make_launch(LLAMA, (64, 64, 64), 2, Tuning()).num_splits == 4
    for launch in (decode, tree, prefill):
        lines = launch.num_items * 8 * launch.num_splits * launch.block_m
        assert lines * 128 * 4 <= Tuning().scratch_bytes
