"""What a step costs: scale x shape.

The shape says how the cost of steps depends on their size, in seconds of a machine that nobody disturbs: it is taken
from the fastest of several trials at the start. The scale is one number that follows every step of any size: a busy
neighbour slows all steps down, so it moves the scale, and a choice between sizes or efforts does not depend on it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_RECENT = 9
"""Steps whose median is the scale: five slow ones in a row move it, a single one does not."""
_STALE = 64
"""Steps after which what drafting took is not recent any more: then it is taken to cost what it cost at the start."""
_NOISE = 0.1
"""Steps of one size differ by about this share on a quiet machine: so much less or more than expected is no news."""
_SPREADS = 3.0
"""The same, in terms of how much the last steps differed: on a restless machine little is learned of sizes."""
_RISE = 0.05
"""How much of a cost above the expected one a point of the shape believes: what slows a step down mostly passes."""
_FALL = 0.5
"""The same for a cost below it: nothing makes a step faster than it is."""
_MOST_RISE = 0.25
"""Most of a rise that is believed of one step, in nats: an outlier says little."""
_LEAST_PART = 0.15
"""How far a size must be from a point for what it took to say anything of the next one."""
_FRESH = 3
"""Steps near a size after which its cost is known well."""
_RELIEF = 0.25
"""The scale, or what a size takes, has fallen by so much (in nats): what looked too dear may not be, so look again."""
_SIZE_SHARE, _LEAST_LOSS = 0.0025, 0.3
"""Part of the time that may go into looking at each other size, and what a step of a smaller one loses at least."""
_UNKNOWN_PERIOD, _MOST_PERIOD = 6, 1024
"""Steps from one look at a size to the next, before it is known well and at most."""
_MORE_PERIOD = 32
"""Steps after which a size a little above the usual one is run, however dear it looks: its best nodes mostly come true,
so it costs next to nothing, and it finds out that larger sizes have become cheap."""
_UNKNOWN_DRAFT = (1e-6, 1e-6)
"""What drafting costs that was not measured: hardly anything, so that it is tried."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """One kind of step, and the least that it took."""

    num_positions: int
    num_rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DraftSample:
    """One kind of drafting, reading what came of it included, and the least that it took."""

    effort: int
    num_rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured at the start."""

    steps: tuple[StepSample, ...]
    drafts: tuple[DraftSample, ...] = ()


class StepCost:
    """Seconds of steps by positions and rows, and of drafting by effort and rows.

    Owns the shape, a point for each power of two positions, and the scale. A step of N positions and R rows costs
    scale * (shape(N) + row_s * (R - 1)); between two points the shape is straight, and it never falls. Where steps are
    padded, one costs as much as the size that it is padded to, so nodes that fill it are free.
    """

    def __init__(self, profile: Profile, max_positions: int, step_sizes: Sequence[int] = ()) -> None:
        """At least one step of a single row must have been measured.

        Args: `max_positions` of a step; `step_sizes` that steps are padded to, see verifier.backend.
        """
        self.row_s, sizes, seconds = _fit(profile.steps)
        self._sizes = [1 << power for power in range(max(1, (max_positions - 1).bit_length() + 1))]
        self._shape = [_extended(size, sizes, seconds) for size in self._sizes]
        self._num_measured = max(1, sum(size <= sizes[-1] for size in self._sizes))
        self._least_s = self._shape[0]
        self._seen = [0] * len(self._sizes)  # steps near each point since the machine was last slow, up to _FRESH
        self._tried = [0] * len(self._sizes)  # number of the last step that was near, or was to be
        self._num_steps = self._last_more = 0
        self._ratios = deque([1.0] * _RECENT, maxlen=_RECENT)  # of the last steps, what they took over their shape
        self._points = deque([-1] * _RECENT, maxlen=_RECENT)  # and the points that they were near
        self._highest = self.scale = 1.0
        self._drafts = _draft_lines(profile.drafts)
        self._draft_ratios: dict[int, deque[tuple[int, float]]] = {}
        padded = np.arange(max_positions + 1)
        places = np.searchsorted(np.asarray(step_sizes, np.int64), padded)
        self._padded = np.where(places < len(step_sizes), np.array([*step_sizes, 0])[places], padded)
        self.table: Float64 = np.empty(max_positions + 1)
        """[max_positions + 1] the shape by positions, kept in place."""
        self._tabulate()

    def shape_s(self, num_positions: int, num_rows: int) -> float:
        """Seconds of a step on a quiet machine."""
        return float(self.table[min(num_positions, self.table.size - 1)]) + self.row_s * (num_rows - 1)

    def step_s(self, num_positions: int, num_rows: int) -> float:
        """Seconds of a step as things stand now."""
        return self.scale * self.shape_s(num_positions, num_rows)

    def bound_s(self, num_positions: int, num_rows: int) -> float:
        """Seconds that a step should not exceed: the least that a point promises if costs grow in proportion.

        The shape may promise too little: small steps mostly wait for memory, so a line through two of them is flat.
        """
        points = zip(self._sizes[: self._num_measured], self._shape, strict=False)
        least = min(cost * max(1.0, num_positions / size) for size, cost in points)
        return max(1.0, self.scale) * (least + self.row_s * (num_rows - 1))

    def draft_s(self, effort: int, num_rows: int) -> float:
        """Seconds of drafting for so many rows, at scale 1: comparable with `shape_s`."""
        found = self._draft_ratios.get(effort, ())
        recent = [ratio for step, ratio in found if self._num_steps - step < _STALE]
        return self._draft_shape_s(effort, num_rows) * (median(recent) if recent else 1.0)

    def observe_step(self, num_positions: int, num_rows: int, seconds: float) -> None:
        """A step without prompt chunks took so long."""
        self._num_steps += 1
        shape_s = self.shape_s(num_positions, num_rows)
        seconds = max(seconds, 1e-9)
        self._ratios.append(seconds / shape_s)
        self.scale = median(self._ratios)
        self._highest = max(self._highest, self.scale)
        if math.log(self._highest / self.scale) > _RELIEF:
            self._highest = self.scale
            self._seen = [0] * len(self._seen)
        self._correct(
            int(self._padded[min(num_positions, self.table.size - 1)]), math.log(seconds / (self.scale * shape_s))
        )

    def observe_draft(self, effort: int, num_rows: int, seconds: float) -> None:
        """Drafting for so many rows took so long, reading what came of it included."""
        ratios = self._draft_ratios.setdefault(effort, deque(maxlen=_RECENT))
        ratios.append((self._num_steps, seconds / (self.scale * self._draft_shape_s(effort, num_rows))))

    def size_to_try(self, num_trees: int, num_drafting: int, usual: int) -> int:
        """A size to run because what it costs is not known well, or has not been looked at for long; 0 for none.

        Only sizes around the `usual` positions of a step are looked at: a little more, at least every 32 steps whatever
        it seems to cost; and, the rarer the dearer they are, twice and half of the usual, plain decoding, and 8 nodes a
        drafting row, near which most choices lie. `num_trees` roots run anyway, those of rows that cannot draft too.
        """
        usual = max(usual, num_trees)
        if self._num_steps - self._last_more >= _MORE_PERIOD:
            self._last_more = self._num_steps
            return min(usual + max(1, usual // 4), self.table.size - 1)
        usual_s = self.shape_s(usual, num_trees)
        for size in (num_trees + 7 * num_drafting, 2 * usual, usual // 2, num_trees):
            if not num_trees <= size < self.table.size:
                continue
            point = self._near(size)
            lost = max(_LEAST_LOSS, self.shape_s(size, num_trees) / usual_s - 1.0)
            period = min(_MOST_PERIOD, lost / _SIZE_SHARE) if self._seen[point] >= _FRESH else _UNKNOWN_PERIOD
            if self._num_steps - self._tried[point] >= period:
                self._tried[point] = self._num_steps
                return size
        return 0

    def _draft_shape_s(self, effort: int, num_rows: int) -> float:
        fixed_s, row_s = self._drafts.get(effort, _UNKNOWN_DRAFT)
        return fixed_s + row_s * num_rows

    def _near(self, size: int) -> int:
        """The point nearest to a size, on a scale of powers of two."""
        return min(len(self._sizes) - 1, max(0, round(math.log2(size))))

    def _correct(self, size: int, surprise: float) -> None:
        """Move the points beside a size that was run by what it took above what was expected, in nats.

        But for a point that most steps are near now: what these take is the scale, and moves all sizes alike.
        """
        point = self._near(size)
        self._points.append(point)
        self._tried[point] = self._num_steps
        is_known = self._seen[point] >= _FRESH
        self._seen[point] = min(_FRESH, self._seen[point] + 1)
        if abs(surprise) < _NOISE or abs(surprise) < _SPREADS * self._spread():  # it says nothing
            return
        if surprise < -_RELIEF:  # what was too dear is not, so others may not be either
            self._seen = [0] * len(self._seen)
        if surprise < 0.0:
            gain = _FALL if is_known else 1.0
        else:
            gain, surprise = _RISE, min(surprise, _MOST_RISE)
        high = min(len(self._sizes) - 1, bisect_left(self._sizes, size))
        low = max(0, high - 1) if self._sizes[high] > size else high
        share = 1.0 if low == high else (size - self._sizes[low]) / (self._sizes[high] - self._sizes[low])
        moved_s = self.shape_s(size, 1) * math.exp(gain * surprise)
        usual = self._points[-2] if 2 * self._points.count(self._points[-2]) > _RECENT else -1
        if low == high or usual not in (low, high):
            for moved in {low, high} - {usual}:
                self._shape[moved] *= moved_s / self.shape_s(size, 1)
        else:
            # One of them is the usual one and stays: the other goes where the line through both meets what was seen.
            fixed, other, part = (low, high, share) if usual == low else (high, low, 1.0 - share)
            if part > _LEAST_PART:
                line_s = (moved_s - (1.0 - part) * self._shape[fixed]) / part
                bound = self._shape[fixed]
                self._shape[other] = max(bound, line_s) if other > fixed else min(bound, max(line_s, 0.1 * bound))
        if surprise < 0.0:
            for smaller in range(low):
                self._shape[smaller] = min(self._shape[smaller], self._shape[low])
        # Only ratios of the shape are known: the least size keeps its seconds, so that drafting stays comparable.
        common = self._least_s / self._shape[0]
        self._shape = [common * seconds for seconds in self._shape]
        self._ratios = deque((ratio / common for ratio in self._ratios), maxlen=_RECENT)
        self.scale, self._highest = self.scale / common, self._highest / common
        self._tabulate()

    def _spread(self) -> float:
        """By how much steps of one size differ lately: the median, in nats."""
        logs: dict[int, list[float]] = {}
        for point, ratio in zip(self._points, self._ratios, strict=True):
            logs.setdefault(point, []).append(math.log(ratio))
        apart = [abs(log - median(same)) for same in logs.values() if len(same) > 1 for log in same]
        return median(apart) if apart else 0.0

    def _tabulate(self) -> None:
        self.table[:] = np.interp(self._padded, self._sizes, np.maximum.accumulate(self._shape))


def _fit(samples: Sequence[StepSample]) -> tuple[float, list[int], list[float]]:
    """Seconds of a further row, then sizes and seconds of a single row.

    What a row costs is the median over the samples with several rows, each compared with a single row of as many
    positions. Where a small step took longer than a larger one it was disturbed: it costs as much as that one.
    """
    points = {sample.num_positions: sample.seconds for sample in samples if sample.num_rows == 1}
    assert points, "no step of a single row was measured"
    alone, most = sorted(points), max(points)
    seconds = [points[size] for size in alone]
    several = [sample for sample in samples if sample.num_rows > 1]
    extra = [
        (sample.seconds - float(np.interp(sample.num_positions, alone, seconds))) / (sample.num_rows - 1)
        for sample in several
        if sample.num_positions <= most
    ]
    row_s = max(0.0, median(extra)) if extra else 0.0
    for sample in several:
        if sample.num_positions > most:
            points[sample.num_positions] = sample.seconds - row_s * (sample.num_rows - 1)
    sizes = sorted(points)
    least = np.minimum.accumulate([max(points[size], 1e-9) for size in reversed(sizes)])[::-1]
    return row_s, sizes, least.tolist()


def _extended(size: int, sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds at a size: beyond the largest measured one as between the last two."""
    if size <= sizes[-1] or len(sizes) == 1:
        return float(np.interp(size, sizes, seconds))
    slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    return seconds[-1] + slope * (size - sizes[-1])


def _draft_lines(samples: Sequence[DraftSample]) -> dict[int, tuple[float, float]]:
    """Fixed seconds and seconds a row of each effort, through its samples of fewest and most rows."""
    lines = {}
    for effort in {sample.effort for sample in samples}:
        points = sorted((sample.num_rows, sample.seconds) for sample in samples if sample.effort == effort)
        (few, low), (many, high) = points[0], points[-1]
        row_s = max(0.0, (high - low) / (many - few)) if many > few else 0.0
        lines[effort] = (max(0.0, low - row_s * few), row_s)
    return lines
