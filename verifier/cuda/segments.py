"""A step's arrays on the device, at addresses that never change, written by one small copy per step.

Steps are sorted into size classes (powers of two of positions and of segments); each class has buffers of its own, made
on first use. A graph that was recorded for a class reads the same addresses in every later step of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.cuda.launch import power_of_two
from verifier.jit import jit
from verifier.step import PackedStep

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

_HEADER = 4  # int64 numbers
_NUM_CHANGES = 4096
_BEHIND = 2**30
"""Where the stretch of padding behind the last segment ends: beyond any step."""


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What the kernels read of a step. The first num_segments segments are real, trees before chunks."""

    header: torch.Tensor  # [4] int64: segments, trees, keys of all segments, keys times queries
    ancestors: torch.Tensor  # [positions of the class] int64
    depths: torch.Tensor  # [positions of the class] int32
    starts: torch.Tensor  # [segments_pad + 4] int32; behind the last segment, one stretch of padding
    rows: torch.Tensor  # [segments_pad] int32
    prefix_lens: torch.Tensor  # [segments_pad] int32
    page_table: torch.Tensor  # [M, pages per row] int32
    most_positions: int
    most_segments: int


class StepClass:
    """The arrays of one size class. Owns a host and a device buffer; on a CPU they are one."""

    def __init__(self, most_positions: int, most_segments: int, page_table: torch.Tensor) -> None:
        device = page_table.device
        table = power_of_two(power_of_two(page_table.shape[0]) + 2)  # alike in all classes: kernels are compiled for it
        room = -(-most_positions // 4) * 4  # every part begins at a multiple of 16 bytes
        sizes = (2 * _HEADER, 2 * room, room, table + 4, table, table)
        is_shared = device.type == "cpu"
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=not is_shared)
        self._device = self._host if is_shared else torch.zeros_like(self._host, device=device)
        self._copied = None if is_shared else torch.cuda.Event()  # type: ignore[no-untyped-call]
        edges = np.cumsum((0, *sizes))
        parts = [slice(int(edges[place]), int(edges[place + 1])) for place in range(len(sizes))]
        array = self._host.numpy()
        self._header: Int64 = array[parts[0]].view(np.int64)
        self._ancestors: Int64 = array[parts[1]].view(np.int64)
        self._depths, self._starts, self._rows, self._prefix_lens = (array[part] for part in parts[2:])
        tensors = [self._device[part] for part in parts]
        self.arrays = DeviceStep(
            header=tensors[0].view(torch.int64),
            ancestors=tensors[1].view(torch.int64),
            depths=tensors[2],
            starts=tensors[3],
            rows=tensors[4],
            prefix_lens=tensors[5],
            page_table=page_table,
            most_positions=most_positions,
            most_segments=most_segments,
        )

    def fill(self, step: PackedStep) -> DeviceStep:
        """Take over a step that fits the class; the copy runs on the current stream."""
        num_segments, num_positions = step.rows.shape[0], step.num_positions
        if self._copied is not None:
            self._copied.synchronize()  # the buffer may still be on its way from the last step, which is long past
        sizes = np.diff(step.starts).astype(np.int64)
        lengths = step.prefix_lens + sizes
        self._header[:] = num_segments, step.num_trees, lengths.sum(), (lengths * sizes).sum()
        self._ancestors[:num_positions] = step.ancestors
        self._depths[:num_positions] = step.depths
        self._starts[: num_segments + 1] = step.starts
        self._starts[num_segments + 1 :] = _BEHIND
        self._rows[:num_segments] = step.rows
        self._prefix_lens[:num_segments] = step.prefix_lens
        self._send()
        return self.arrays

    def clear(self) -> None:
        """Hold a step without segments: every position is padding."""
        if self._copied is not None:
            self._copied.synchronize()  # a step that was not waited for may still be reading
        self._header[:] = 0
        self._starts[0], self._starts[1:] = 0, _BEHIND
        self._send()

    def _send(self) -> None:
        if self._copied is not None:
            self._device.copy_(self._host, non_blocking=True)
            self._copied.record()


class DevicePages:
    """The page table on the device. Owns it and a host copy that tells what has changed since the last step."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        is_shared = device.type == "cpu"
        self._host = torch.zeros(shape, dtype=torch.int32, pin_memory=not is_shared)
        self.table = self._host if is_shared else torch.zeros_like(self._host, device=device)
        self._changes = torch.zeros((_NUM_CHANGES, 2), dtype=torch.int64, pin_memory=not is_shared)
        self._known: Int32 = self._host.numpy()
        self._changed: Int64 = self._changes.numpy()
        self._copied = None if is_shared else torch.cuda.Event()  # type: ignore[no-untyped-call]

    def update(self, step: PackedStep) -> None:
        """Bring the pages that the step reads up to date: the changed ones alone, or all if they are very many."""
        if self._copied is not None:
            self._copied.synchronize()
        lengths = step.prefix_lens + np.diff(step.starts)
        num_pages = -(-lengths // step.page_size)
        count = _changed_pages(step.rows, num_pages, step.page_table, self._known, self._changed)
        if self._copied is None or not count:
            return
        if count > _NUM_CHANGES:
            self.table.copy_(self._host, non_blocking=True)
        else:
            moved = self._changes[:count].to(self.table.device, non_blocking=True)
            self.table.view(-1).index_copy_(0, moved[:, 0], moved[:, 1].int())
        self._copied.record()


@jit()
def _changed_pages(rows: Int32, num_pages: Int32, table: Int32, known: Int32, changes: Int64) -> int:
    """Copy the pages in use from `table` to `known`.

    Args: `changes` [C, 2] gets flat index and page of the first C that differ. Returns: how many differ, maybe over C.
    """
    count = 0
    for segment in range(rows.shape[0]):
        row = rows[segment]
        for place in range(num_pages[segment]):
            page = table[row, place]
            if known[row, place] != page:
                known[row, place] = page
                if count < changes.shape[0]:
                    changes[count, 0] = np.int64(row) * table.shape[1] + place
                    changes[count, 1] = page
                count += 1
    return count


class StepUploads:
    """Brings steps to the device. Owns the size classes and the page table."""

    def __init__(self) -> None:
        self._pages: DevicePages | None = None
        self._classes: dict[tuple[int, int], StepClass] = {}

    def take(self, step: PackedStep, size: tuple[int, int] | None = None) -> DeviceStep:
        """The step's arrays, at the addresses of a class: its own, or the larger `size`."""
        table = step.page_table.shape
        arrays = self.of(size or own_class(step), (table[0], table[1]), step.write_slots.device)
        assert self._pages is not None
        self._pages.update(step)
        return arrays.fill(step)

    def of(self, size: tuple[int, int], table: tuple[int, int], device: torch.device) -> StepClass:
        """The class for at most `size` = positions, segments; `table` is the shape of the page table."""
        if self._pages is None:
            self._pages = DevicePages(table, device)
        if size not in self._classes:
            self._classes[size] = StepClass(*size, self._pages.table)
        return self._classes[size]


def own_class(step: PackedStep) -> tuple[int, int]:
    """Most positions and segments of the smallest class that a step fits."""
    return power_of_two(step.num_positions), power_of_two(step.rows.shape[0])
