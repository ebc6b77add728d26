"""What things cost, in seconds against their size: measured at some sizes, straight between, never falling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.compiled import compiled

Float64 = NDArray[np.float64]

_GAIN = 0.08
"""How much of a surprise a point believes once it is settled."""
_SETTLED = 1.0 / _GAIN
"""Observations behind a point that is settled; with fewer it believes more of each."""
_MOST, _LEAST = 0.25, -1.0
"""Bounds of one surprise, in nats: anything may slow a step down, and nothing makes it faster than it is."""

Points = tuple[Float64, Float64, Float64]
"""[P] rising sizes, seconds there, observations behind them."""


@compiled
def _at(size: float, points: Points) -> Any:
    """Seconds at a size: straight between the points, never falling, and beyond the last as before it."""
    sizes, seconds, _ = points
    low = high = seconds[0]
    slope = 0.0
    if size <= sizes[0]:
        return low
    for place in range(1, sizes.size):
        low, high = high, max(high, seconds[place])
        slope = (high - low) / (sizes[place] - sizes[place - 1])
        if size <= sizes[place]:
            return min(high, low + slope * (size - sizes[place - 1]))
    return high + slope * (size - sizes[-1])


@compiled
def _tabulate(points: Points, table: Float64) -> None:
    """The same at 0, 1, 2, ..."""
    for size in range(table.size):
        table[size] = _at(np.float64(size), points)


@compiled
def _move(size: float, seconds: float, points: Points) -> None:
    """Pull the points to what was observed at `size`, less the farther they are."""
    sizes, costs, weights = points
    nearest, best = 0, -1.0
    for place in range(sizes.size):
        nearness = 0.5 ** abs(math.log2(sizes[place] / size))
        if nearness > best:
            nearest, best = place, nearness
    most = max(_MOST, 1.0 / (1.0 + weights[nearest]))  # a point that is not settled believes more
    surprise = min(max(math.log(seconds / _at(size, points)), _LEAST), most)
    for place in range(sizes.size):
        nearness = 0.5 ** abs(math.log2(sizes[place] / size))
        costs[place] *= math.exp(max(_GAIN, 1.0 / (1.0 + weights[place])) * nearness * surprise)
        weights[place] = min(weights[place] + nearness, _SETTLED)


class CostCurve:
    """Seconds against a size that counts from 1, corrected by what things really take.

    Owns its points. Between two points it is straight, beyond the last one it goes on as between the last two.
    """

    def __init__(self, sizes: Sequence[float], seconds: Sequence[float], table_size: int = 0) -> None:
        """`seconds[p]` was measured at `sizes[p]`, which rise. `table_size`: the largest size in the table."""
        assert len(sizes) == len(seconds) > 0, f"{len(seconds)} costs of {len(sizes)} sizes"
        assert all(small < large for small, large in pairwise(sizes)), f"sizes {sizes}"
        monotone = np.maximum.accumulate(np.maximum(np.array(seconds, np.float64), 1e-9))
        self._points: Points = np.array(sizes, np.float64), monotone, np.full(len(sizes), _SETTLED)
        self.table: Float64 = np.empty(table_size + 1)  # [table_size + 1] seconds by size, kept in place
        _tabulate(self._points, self.table)

    @classmethod
    def unknown(cls, max_size: int) -> CostCurve:
        """A curve that nothing was measured for: as good as free, and quick to learn."""
        sizes = [1.0]
        while sizes[-1] < max_size:
            sizes.append(min(2.0 * sizes[-1], float(max_size)))
        curve = cls(sizes, [0.0] * len(sizes))
        curve._points[2][:] = 0.0
        return curve

    def at(self, size: float) -> float:
        """Seconds at `size`."""
        return float(_at(float(size), self._points))

    def bound(self, size: float) -> float:
        """Seconds that `size` should not exceed: the least that a point promises if all costs grow in proportion."""
        sizes, costs, _ = self._points
        return float((costs * np.maximum(1.0, size / sizes)).min())

    def observe(self, size: int, seconds: float) -> None:
        """Something of this size took so long.

        The points around it move, less the farther they are: what slows one size down mostly slows all of them. A
        single outlier moves none of them far.
        """
        sizes, costs, weights = self._points
        size = max(size, 1)
        if weights.any():
            _move(float(size), max(seconds, 1e-9), self._points)
        else:
            # Nobody knows yet how much of it is for being asked at all: one half, say.
            costs[:] = seconds * (0.5 + 0.5 * sizes / size)
            weights[:] = 1.0
        if self.table.size > 1:
            _tabulate(self._points, self.table)


@dataclass(frozen=True, slots=True)
class Sample:
    """One kind of step, and how long it took."""

    num_positions: int
    num_rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step against its packed positions N and its rows R: positions.at(N) + row_s * (R - 1)."""

    positions: CostCurve
    row_s: float

    @classmethod
    def fit(cls, samples: Sequence[Sample], max_positions: int) -> StepCost:
        """From measured steps, some of them with the same positions and several rows.

        What a row costs is the median over the samples with several rows, each compared with a single row of as many
        positions. The points of the curve are the samples with a single row and, of more positions than these have, all
        others, less what their rows cost. Where a small step took longer than a larger one it was disturbed: it counts
        as much as that one.
        """
        points = {sample.num_positions: sample.seconds for sample in samples if sample.num_rows == 1}
        assert points, "no step of a single row was measured"
        several = [sample for sample in samples if sample.num_rows > 1]
        alone, seconds, most = sorted(points), [points[size] for size in sorted(points)], max(points)
        extra = [
            (sample.seconds - float(np.interp(sample.num_positions, alone, seconds))) / (sample.num_rows - 1)
            for sample in several
            if sample.num_positions <= most
        ]
        row_s = max(0.0, float(np.median(extra))) if extra else 0.0
        for sample in several:
            if sample.num_positions > most:
                points[sample.num_positions] = sample.seconds - row_s * (sample.num_rows - 1)
        sizes = sorted(points)
        least = np.minimum.accumulate([points[size] for size in reversed(sizes)])[::-1]
        return cls(CostCurve(sizes, least.tolist(), table_size=max_positions), row_s)

    def bound_s(self, num_positions: int, num_rows: int) -> float:
        """Seconds that a step of this size should not exceed.

        Unlike the curve, which goes on as between its last two points: small steps mostly wait for memory, so a line
        through two of them would promise too little, and one that was disturbed would promise hours.
        """
        return self.positions.bound(num_positions) + self.row_s * (num_rows - 1)

    def observe(self, num_positions: int, num_rows: int, seconds: float) -> None:
        """A step took so long."""
        self.positions.observe(num_positions, seconds - self.row_s * (num_rows - 1))
