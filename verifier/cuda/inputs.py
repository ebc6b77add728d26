"""What a step's forward pass and walk read, on the device, at addresses that never change, in one small copy per step.

Sorted into size classes like the arrays of the attention (see attention.device_step). All of it is known before the
forward pass: nothing has to be brought to the device between the pass and the walk. What a class holds behind a step's
own numbers is padding that a graph may run over: it writes to the trash page, draws without noise, walks empty trees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.accept import Walks
from verifier.cuda.kernels.sample import write_draws
from verifier.cuda.segments import own_class
from verifier.rows import SamplingRows
from verifier.step import PackedStep

_NUM_FIELDS = 3


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """The arrays of one size class, C positions and S segments, or views of their beginnings."""

    input_ids: torch.Tensor  # [C] int64
    position_ids: torch.Tensor  # [C] int64
    write_slots: torch.Tensor  # [C] int64; padding is written to slot 0, which is trash
    logits_index: torch.Tensor  # [2 C + S] int64
    tokens: torch.Tensor  # [C] int64 of the nodes to walk
    parents: torch.Tensor  # [C] int64, within the tree
    starts: torch.Tensor  # [S + 1] int64, of the trees among the nodes
    reals: torch.Tensor  # [C, 3] float64, see DrawRecords
    counts: torch.Tensor  # [C, 3] int64, see DrawRecords


class InputClass:
    """Owns the arrays of one size class, on the host and on the device; on a CPU they are one."""

    def __init__(self, most_positions: int, most_segments: int, device: torch.device) -> None:
        most, trees = most_positions, most_segments
        sizes = [most, most, most, 2 * most + trees, most, most, trees + 1, _NUM_FIELDS * most, _NUM_FIELDS * most]
        sizes = [size + size % 2 for size in sizes]  # every part begins at a multiple of 16 bytes
        is_shared = device.type == "cpu"
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=not is_shared)
        self._device = self._host if is_shared else torch.zeros_like(self._host, device=device)
        self._copied = None if is_shared else torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._places = _split(self._host, sizes, most)
        self.arrays = _split(self._device, sizes, most)
        self._parents: NDArray[np.int64] = self._places.parents.numpy()
        self._tokens: NDArray[np.int64] = self._places.tokens.numpy()
        self._starts: NDArray[np.int64] = self._places.starts.numpy()
        self._draws = self._places.reals.numpy(), self._places.counts.numpy()

    def fill(self, step: PackedStep, walks: Walks, state: SamplingRows) -> DeviceInputs:
        """Take over a step that fits the class; the copy runs on the current stream."""
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copy, which is long past
        host, num_nodes = self._places, walks.tokens.shape[0]
        _lay(host.input_ids, step.input_ids[0])
        _lay(host.position_ids, step.position_ids[0])
        _lay(host.write_slots, step.write_slots)
        if step.logits_index is None:
            torch.arange(num_nodes, out=host.logits_index[:num_nodes])
            host.logits_index[num_nodes:].zero_()
        else:
            _lay(host.logits_index, step.logits_index)
        self._tokens[:num_nodes], self._tokens[num_nodes:] = walks.tokens, -1
        self._parents[:num_nodes], self._parents[num_nodes:] = walks.parents, -1
        self._starts[: walks.starts.shape[0]] = walks.starts
        self._starts[walks.starts.shape[0] :] = num_nodes
        reals, counts = self._draws
        if num_nodes:
            records = state.records[np.repeat(walks.rows, np.diff(walks.starts))]
            write_draws(records, walks.positions, (reals[:num_nodes], counts[:num_nodes]))
        reals[num_nodes:], counts[num_nodes:] = 0.0, 0
        self._send()
        return self.arrays

    def clear(self) -> None:
        """Hold a step of nothing but padding."""
        if self._copied is not None:
            self._copied.synchronize()  # a step that was not waited for may still be reading
        self._host.zero_()
        self._send()

    def _send(self) -> None:
        if self._copied is not None:
            self._device.copy_(self._host, non_blocking=True)
            self._copied.record()


class StepInputs:
    """Brings steps to the device. Owns the size classes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._classes: dict[tuple[int, int], InputClass] = {}

    def take(
        self, step: PackedStep, walks: Walks, state: SamplingRows, size: tuple[int, int] | None = None
    ) -> DeviceInputs:
        """The step's inputs at the addresses of a class: its own, or the larger `size`.

        `step` holds them on the host; afterwards its tensors are the ones on the device.
        """
        num_positions = step.num_positions
        arrays = self.of(size or own_class(step)).fill(step, walks, state)
        step.input_ids = arrays.input_ids[None, :num_positions]
        step.position_ids = arrays.position_ids[None, :num_positions]
        step.write_slots = arrays.write_slots[:num_positions]
        if step.logits_index is not None:
            step.logits_index = arrays.logits_index[: step.logits_index.shape[0]]
        return arrays

    def of(self, size: tuple[int, int]) -> InputClass:
        """The class for at most `size` = positions, segments."""
        if size not in self._classes:
            self._classes[size] = InputClass(*size, self._device)
        return self._classes[size]


def _split(memory: torch.Tensor, sizes: list[int], most: int) -> DeviceInputs:
    ids, positions, slots, index, tokens, parents, starts, reals, counts = torch.split(memory, sizes)
    reals, counts = reals[: _NUM_FIELDS * most], counts[: _NUM_FIELDS * most]
    return DeviceInputs(
        input_ids=ids,
        position_ids=positions,
        write_slots=slots,
        logits_index=index,
        tokens=tokens,
        parents=parents,
        starts=starts,
        reals=reals.view(torch.float64).view(most, _NUM_FIELDS),
        counts=counts.view(most, _NUM_FIELDS),
    )


def _lay(place: torch.Tensor, numbers: torch.Tensor) -> None:
    """Numbers at the beginning of a part, zeros behind them."""
    count = numbers.shape[0]
    place[:count].copy_(numbers)
    place[count:].zero_()
