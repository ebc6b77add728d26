"""Recorded steps: which sizes there are, which are recorded when, and which one serves a step.

A recording is good for every step that fits its bucket: the step is padded, and everything that differs from step to
step is read from memory. Those of plain decoding and of few rows are made before the server is ready, the others in the
background: what was missed first, then the rest from small to large.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

from verifier.cuda.launch import power_of_two
from verifier.cuda.recorder import Replay
from verifier.plan import MAX_TREE_NODES

MAX_POSITIONS = 512
"""Larger steps are not recorded: their time is in the operations, not in launching them."""
POSITIONS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, MAX_POSITIONS)
_FIRST_POSITIONS, _FIRST_SEGMENTS = 64, (1, 8)
_BUSY_SHARE = 0.05
"""Part of the time that recording may take while requests wait for their tokens."""
_MOST_FAILURES = 3
"""Buckets that could not be recorded, after which no more are tried: the next would most likely fail as well."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """How large a step may be to be served by a recording; also how large the padded step is."""

    num_positions: int  # N
    num_segments: int  # R, a power of two: trees and chunks
    num_logits: int  # K: places with logits

    @property
    def size_class(self) -> tuple[int, int]:
        """Most positions and segments of the arrays that the recording reads."""
        return power_of_two(self.num_positions), self.num_segments

    @property
    def depth(self) -> int:
        """Most draft tokens that a row can win."""
        return min(self.num_logits, MAX_TREE_NODES) - 1

    def holds(self, other: Bucket) -> bool:
        """Whether a step of the other bucket fits into this one."""
        return (
            self.num_positions >= other.num_positions
            and self.num_segments >= other.num_segments
            and self.num_logits >= other.num_logits
        )


def bucket_of(num_positions: int, num_segments: int, num_logits: int, most: int = MAX_POSITIONS) -> Bucket | None:
    """The smallest bucket for a step, or None if it is larger than all of them, of which `most` is a bound.

    There are two sizes of logits: one for each segment, as prompts and plain decoding have, and one for each position.
    """
    positions = next((size for size in POSITIONS if size >= num_positions), MAX_POSITIONS + 1)
    if positions > most:
        return None
    segments = power_of_two(num_segments)
    fewest = min(segments, positions)
    return Bucket(positions, segments, fewest if num_logits <= fewest else positions)


def ladder(max_rows: int, most: int) -> Iterator[Bucket]:
    """The buckets of steps of trees, in the order in which they are recorded: those of the smallest steps first."""
    sizes = [
        Bucket(positions, segments, positions)
        for positions in POSITIONS
        for segments in (2**power for power in range(power_of_two(max_rows).bit_length()))
        if segments <= power_of_two(positions) and positions <= min(most, segments * MAX_TREE_NODES)
    ]
    yield from sorted(sizes, key=lambda bucket: (not is_first(bucket), bucket))


def is_first(bucket: Bucket) -> bool:
    """Whether readiness waits for the bucket: plain decoding, and few rows with few nodes, where costs are measured."""
    is_plain = bucket.num_segments == power_of_two(bucket.num_positions)
    return is_plain or (bucket.num_positions <= _FIRST_POSITIONS and bucket.num_segments in _FIRST_SEGMENTS)


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded step in two parts, so that a step whose tokens the host must choose can use the first alone."""

    bucket: Bucket
    forward: Replay
    """From the static inputs to logits, states and K/V."""
    judge_greedy: Replay
    """From the logits to tokens, and accepted K/V to their places, where nobody draws with noise."""
    judge_drawn: Replay
    """The same for all steps without penalties, bias and minimum length."""


class Graphs:
    """Owns the recordings, never drops one, and decides which one is made next."""

    def __init__(
        self, make: Callable[[Bucket], Recording], has_room: Callable[[], bool], shape: tuple[int, int]
    ) -> None:
        """`make` records a bucket; `has_room` tells whether there is memory; `shape` = most rows, most positions."""
        self._make = make
        self._has_room = has_room
        self._most = min(MAX_POSITIONS, next((size for size in POSITIONS if size >= shape[1]), MAX_POSITIONS))
        self._recordings: dict[Bucket, Recording] = {}
        self._missed: dict[Bucket, None] = {}  # in the order in which steps missed them
        self._waiting = dict.fromkeys(ladder(shape[0], self._most))
        self._not_before = 0.0
        self._failed: set[Bucket] = set()
        self._is_stopped = False

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """What is recorded."""
        return tuple(self._recordings)

    def find(self, num_positions: int, num_segments: int, num_logits: int) -> Recording | None:
        """The recording for a step: of its own bucket, else of one at most twice as large; else None."""
        bucket = bucket_of(num_positions, num_segments, num_logits, self._most)
        if bucket is None:
            return None
        found = self._recordings.get(bucket)
        if found is not None:
            return found
        if not self._is_stopped and bucket not in self._failed:
            self._missed[bucket] = None
        fitting = [
            other
            for other in self._recordings
            if other.holds(bucket) and other.num_positions <= 2 * bucket.num_positions
        ]
        return self._recordings[min(fitting)] if fitting else None

    def prepare_first(self) -> None:
        """Record the buckets that readiness waits for."""
        for bucket in [bucket for bucket in self._waiting if is_first(bucket)]:
            self._record(bucket)

    def prepare_more(self, *, is_idle: bool) -> bool:
        """Record one more bucket. Returns: whether an idle caller shall call again.

        While requests run (`is_idle` false), only what their steps missed is recorded, and not for long.
        """
        if not is_idle and (not self._missed or perf_counter() < self._not_before):
            return self._has_more
        bucket = next(iter(self._missed or self._waiting), None)
        if bucket is None:
            return False
        began = perf_counter()
        self._record(bucket)
        ended = perf_counter()
        self._not_before = ended + (ended - began) / _BUSY_SHARE
        return self._has_more

    @property
    def _has_more(self) -> bool:
        return bool(self._missed or self._waiting)

    def _record(self, bucket: Bucket) -> None:
        self._waiting.pop(bucket, None)
        self._missed.pop(bucket, None)
        if self._is_stopped:
            return
        if not self._has_room():
            logger.info("%d step sizes are recorded; there is no memory for more", len(self._recordings))
            self._stop()
            return
        try:
            self._recordings[bucket] = self._make(bucket)
        except Exception as error:  # of the device, of a library, of the model's code: steps run as they are
            reason = str(error).strip().partition("\n")[0]
            logger.error("steps of %d positions could not be recorded: %s", bucket.num_positions, reason)
            self._failed.add(bucket)
            if len(self._failed) == _MOST_FAILURES:
                self._stop()

    def _stop(self) -> None:
        self._is_stopped = True
        self._missed.clear()
        self._waiting.clear()
