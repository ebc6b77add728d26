"""Counting the n-grams of a corpus that is larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Uint64 = NDArray[np.uint64]
Ngrams = tuple[Uint64, Uint64, Uint64]
"""Context, token and count of n-grams, [n] each: contexts ascending, and all that is known of each."""

TOKEN_BITS = np.uint64(20)
"""A key is `context << 20 | token`: a vocabulary of a million, and 44 bits for the context."""
_TOKEN_MASK = (np.uint64(1) << TOKEN_BITS) - np.uint64(1)
_NUM_PARTS = 256
"""Files that spilled counts are spread over. Each is sorted in memory by itself: with 256 of them, 4 billion distinct
n-grams need about 250 MB at a time."""
_HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the high bits of a product with it are well mixed


class NgramCounter:
    """Counts keys in bounded memory.

    Owns up to `buffer_keys` keys and the files that it spills counts into, in `folder`. Feed it with `add`, then read
    `counted` once. Raises OSError when the disk is full.
    """

    def __init__(self, folder: Path, name: str, buffer_keys: int) -> None:
        self._folder, self._name, self._buffer_keys = folder, name, buffer_keys
        self._held: list[Uint64] = []
        self._num_held = 0
        self.num_spills = 0

    def add(self, keys: Uint64) -> None:
        """Count `keys` [n] uint64."""
        while keys.size:
            taken = keys[: self._buffer_keys - self._num_held]
            self._held.append(taken)
            self._num_held += taken.size
            keys = keys[taken.size :]
            if self._num_held == self._buffer_keys:
                self._spill()

    def counted(self) -> Iterator[Ngrams]:
        """All n-grams, block after block; a context is in one block only."""
        if not self.num_spills:
            if self._num_held:
                yield _split(*self._take())
            return
        self._spill()
        for part in range(_NUM_PARTS):
            path = self._path(part)
            if path.exists():
                keys, counts = np.fromfile(path, np.uint64).reshape(-1, 2).T
                path.unlink()
                order = np.argsort(keys)
                keys, counts = keys[order], counts[order]
                starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
                yield _split(keys[starts], np.add.reduceat(counts, starts))

    def _take(self) -> tuple[Uint64, Uint64]:
        """Distinct keys in hand, and how often each was seen; nothing is in hand afterwards."""
        keys, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *self._held]), return_counts=True)
        self._held, self._num_held = [], 0
        return keys, counts.astype(np.uint64)

    def _spill(self) -> None:
        """Append what is in hand to the files. A context belongs to one file, so that no file needs another one."""
        pairs = np.stack(self._take(), axis=1)  # [n, 2]
        part = ((pairs[:, 0] >> TOKEN_BITS) * _HASH) >> np.uint64(56)
        order = np.argsort(part, kind="stable")
        pairs, ends = pairs[order], np.cumsum(np.bincount(part.astype(np.int64), minlength=_NUM_PARTS))
        for index in np.flatnonzero(np.diff(ends, prepend=0)).tolist():
            with self._path(index).open("ab") as file:
                file.write(pairs[ends[index - 1] if index else 0 : ends[index]].data)
        self.num_spills += 1

    def _path(self, part: int) -> Path:
        return self._folder / f"{self._name}-{part}"


def _split(keys: Uint64, counts: Uint64) -> Ngrams:
    return keys >> TOKEN_BITS, keys & _TOKEN_MASK, counts
