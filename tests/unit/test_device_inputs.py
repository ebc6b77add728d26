"""A step's inputs on the device: where they lie, and what a smaller step finds behind its own numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.devices import DEVICES, require_kernels
from verifier.accept import Walks
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.rows import SamplingRows
from verifier.step import PackedStep, StepBuffers
from verifier.tree import DraftTrees


def packed(sizes: list[int], chunk: int = 0) -> tuple[PackedStep, Walks]:
    """Trees that are chains, in rows 0, 1, ..., and a last chunk in row 3."""
    trees = DraftTrees.allocate(4)
    for size in sizes:
        trees.append([9] * size, [-1, *range(size - 1)], [1.0] * size, [0] * size)
    buffers = StepBuffers(4, 64, 64, 4, "cpu")
    buffers.write_pages(tuple((row, index, 1 + row * 16 + index) for row in range(4) for index in range(16)))
    slots = tuple(TreeSlot(row, 5 + row, size) for row, size in enumerate(sizes))
    chunks = (Chunk(3, 2, (8,) * chunk, True),) if chunk else ()
    step = buffers.pack(StepPlan(trees=slots, chunks=chunks), trees)
    return step, Walks.make(trees, step, [3] if chunk else [])


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_larger_step_left_is_padding(device: str) -> None:
    require_kernels(device)
    from verifier.cuda.inputs import StepInputs

    state = SamplingRows(4, 20)
    for row in range(4):
        sampling = SamplingParams(max_tokens=9, seed=100 + row, temperature=0.5, top_k=row, top_p=0.9, min_p=0.1)
        state.start(RowStart(row, (1, 2), 2, sampling))
    inputs = StepInputs(torch.device(device))
    large = inputs.take(*packed([5, 5, 5]), state, (16, 4))
    addresses = [value.data_ptr() for value in (getattr(large, entry.name) for entry in dataclasses.fields(large))]
    assert all(address % 16 == 0 for address in addresses)
    step, walks = packed([2], chunk=4)
    index = step.logits_index
    assert index is not None
    expected = (step.input_ids[0].tolist(), step.position_ids[0].tolist(), step.write_slots.tolist(), index.tolist())
    small = inputs.take(step, walks, state, (16, 4))
    assert [getattr(small, entry.name).data_ptr() for entry in dataclasses.fields(small)] == addresses
    found = (small.input_ids, small.position_ids, small.write_slots, small.logits_index)
    for part, numbers in zip(found, expected, strict=True):
        assert part.tolist() == numbers + [0] * (part.shape[0] - len(numbers)), "padding goes to slot 0, which is trash"
    assert step.input_ids.data_ptr() == small.input_ids.data_ptr(), "the step reads what was brought there"
    assert expected[3] == [0, 1, 5]
    assert small.starts[:5].tolist() == [0, 2, 3, 3, 3], "trees without nodes"
    assert small.tokens.tolist() == [9, 9, 0] + [-1] * 13
    assert small.parents.tolist()[:3] == [-1, 0, -1]
    assert not small.reals[3:].any(), "nobody draws there"
    assert not small.counts[3:].any()
    assert small.reals[2].tolist() == [0.5, 0.9, 0.1]
    assert small.counts[:3].tolist() == [[0, 100, 6], [0, 100, 7], [3, 103, 6]]
    inputs.of((16, 4)).clear()
    assert not any(np.any(getattr(small, entry.name).cpu().numpy()) for entry in dataclasses.fields(small))


@pytest.mark.parametrize("device", DEVICES)
def test_trees_name_the_places_of_their_logits_too(device: str) -> None:
    """A recording takes logits by index whether the step has chunks or not."""
    require_kernels(device)
    from verifier.cuda.inputs import StepInputs

    step, walks = packed([2, 3])
    arrays = StepInputs(torch.device(device)).take(step, walks, SamplingRows(4, 20))
    assert step.logits_index is None
    assert arrays.logits_index.tolist() == [0, 1, 2, 3, 4] + [0] * 13


def test_draws_lie_alike_for_any_number_of_places() -> None:
    """Kernels are compiled once more for what does not begin at a multiple of 16 bytes."""
    require_kernels("cpu")
    from verifier.cuda.kernels.sample import DrawRecords

    for count in range(1, 5):
        records = DrawRecords.make(SamplingRows(count, 20).records, np.arange(count), torch.device("cpu"))
        assert records.counts[:, 2].tolist() == list(range(count))
        assert records.reals.shape == records.counts.shape == (count, 3)
        assert records.reals.data_ptr() % 16 == records.counts.data_ptr() % 16 == 0
