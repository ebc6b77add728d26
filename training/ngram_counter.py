"""Counting n-grams of a corpus larger than memory: sorted runs, spilled, then merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Uint64 = NDArray[np.uint64]
Counted = tuple[Uint64, Uint64]
"""Distinct keys in ascending order, and how often each was seen."""


class RunCounter:
    """Counts 64-bit keys with bounded memory.

    Owns one buffer of `buffer_keys` keys and the run files it spills into `folder`. Feed with `add`, then read
    `merged` once. Raises OSError when the disk is full.
    """

    def __init__(self, folder: Path, name: str, buffer_keys: int):
        self._folder = folder
        self._name = name
        self._buffer = np.empty(buffer_keys, np.uint64)
        self._filled = 0
        self._runs: list[tuple[Path, Path, int]] = []

    @property
    def num_runs(self) -> int:
        """Runs spilled so far."""
        return len(self._runs)

    def add(self, keys: Uint64) -> None:
        """Count `keys` [n]."""
        while keys.size:
            room = self._buffer.size - self._filled
            taken = keys[:room]
            self._buffer[self._filled : self._filled + taken.size] = taken
            self._filled += taken.size
            keys = keys[room:]
            if self._filled == self._buffer.size:
                self._spill()

    def _counted(self) -> Counted:
        keys, counts = np.unique(self._buffer[: self._filled], return_counts=True)
        return keys, counts.astype(np.uint64)

    def _spill(self) -> None:
        keys, counts = self._counted()
        stem = f"{self._name}-{len(self._runs)}"
        paths = self._folder / f"{stem}.keys", self._folder / f"{stem}.counts"
        for path, array in zip(paths, (keys, counts), strict=True):
            with path.open("wb") as file:
                file.write(array.data)
        self._runs.append((*paths, int(keys.size)))
        self._filled = 0

    def merged(self, block_keys: int) -> Iterator[Counted]:
        """All keys in ascending order, block after block; a key is in one block only.

        Holds about `block_keys` keys at a time, shared by the runs.
        """
        if not self._runs:
            yield self._counted()
            return
        if self._filled:
            self._spill()
        self._buffer = np.empty(0, np.uint64)
        # Plain reads, not maps: a map would keep touched pages of all runs in memory.
        share = max(1024, block_keys // len(self._runs))
        readers = [_RunReader(*run, share) for run in self._runs]
        while True:
            heads = [reader.fill() for reader in readers]
            live = [head for head in heads if head is not None]
            if not live:
                return
            cut = min(live)
            parts = [reader.take(cut) for reader in readers]
            yield combine([part for part in parts if part[0].size])


class _RunReader:
    """Reads one run in pieces. Owns the piece in hand."""

    def __init__(self, keys: Path, counts: Path, size: int, share: int):
        self._paths = keys, counts
        self._size = size
        self._share = share
        self._next = 0
        self._keys = np.empty(0, np.uint64)
        self._counts = np.empty(0, np.uint64)

    def fill(self) -> np.uint64 | None:
        """Make sure a piece is in hand. Returns its last key, which bounds what can be merged; None at the end."""
        if not self._keys.size and self._next < self._size:
            count = min(self._share, self._size - self._next)
            self._keys, self._counts = (
                np.fromfile(path, np.uint64, count=count, offset=8 * self._next) for path in self._paths
            )
            self._next += count
        return self._keys[-1] if self._keys.size else None

    def take(self, cut: np.uint64) -> Counted:
        """Hand out all keys up to `cut`."""
        stop = int(np.searchsorted(self._keys, cut, side="right"))
        part = self._keys[:stop], self._counts[:stop]
        self._keys, self._counts = self._keys[stop:], self._counts[stop:]
        return part


def combine(parts: list[Counted]) -> Counted:
    """One ascending list from several, counts of equal keys added."""
    keys = np.concatenate([part[0] for part in parts])
    counts = np.concatenate([part[1] for part in parts])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return keys[starts], np.add.reduceat(counts, starts)
