"""On-line layers: what followed short contexts in live traffic, bounded, decayed, one layer per request and per tenant.

A layer is a 4-way set-associative cache of slots. One slot is one 64-byte cache line and belongs to one context of 1 to
MAX_ORDER tokens: 64 bits of the context's hash, the decayed number of observations, the time of the last one, and the
six heaviest successors with their decayed weights. A new context takes the slot of its set that was idle longest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.compiled import Index, compiled, inlined
from drafters.ngram.table import mix

Uint32 = NDArray[np.uint32]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

MAX_ORDER = 4
"""Most context tokens that are looked at."""
WAYS = 4
SUCCESSORS = 6
WORDS = 16
KEY_LOW, KEY_HIGH, TOTAL, STAMP, TOKENS, WEIGHTS = 0, 1, 2, 3, 4, 4 + SUCCESSORS
STAMP_LIMIT = 2**31
"""Time stamps stay below it: they are kept as uint32, and one that wrapped around would look like the oldest."""


class Layers:
    """Equal layers side by side. Owns their slots.

    `words` and `floats` are two views, [num_layers * slots, 16], of one memory that starts at a cache line; pages that
    were never written take no memory.
    """

    def __init__(self, num_layers: int, slots: int):
        assert slots >= WAYS, f"{slots} slots"
        assert slots & (slots - 1) == 0, f"{slots} slots"
        self.num_layers = num_layers
        self.slots = slots
        self._allocate(num_layers)

    def _allocate(self, num_layers: int) -> None:
        rows = num_layers * self.slots
        memory = np.zeros(rows * WORDS + WORDS, np.uint32)
        skip = -(memory.ctypes.data // 4) % WORDS
        self.words: Uint32 = memory[skip : skip + rows * WORDS].reshape(rows, WORDS)
        self.floats: Float32 = self.words.view(np.float32)

    def grow(self, num_layers: int) -> None:
        """Make room for more layers; what the others hold stays."""
        held, rows = self.words, self.num_layers * self.slots
        self.num_layers = num_layers
        self._allocate(num_layers)
        self.words[:rows] = held

    @property
    def layer_bytes(self) -> int:
        """Size of one layer."""
        return self.slots * WORDS * self.words.itemsize

    def span(self, layer: int) -> slice:
        """Rows of one layer."""
        return slice(layer * self.slots, (layer + 1) * self.slots)

    def clear(self, layer: int) -> None:
        """Forget all of one layer."""
        self.words[self.span(layer)] = 0

    def halve_stamps(self) -> None:
        """Make room for later time stamps; who was idle for longer than whom stays as it was, but for ties."""
        stamped = np.flatnonzero(self.words[:, STAMP])  # pages that were never written stay so
        self.words[stamped, STAMP] >>= 1

    def num_used(self, layer: int) -> int:
        """Contexts that one layer holds."""
        span = self.words[self.span(layer)]
        return int(np.count_nonzero(span[:, KEY_LOW] | span[:, KEY_HIGH]))


@inlined
def extend_key(key: Any, token: Index) -> Index:
    """Key of a context one token further back; start from 0."""
    return mix((key ^ np.uint64(token + 1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1))


@compiled
def find_slot(words: Uint32, base: Index, slots: Index, key: Any) -> Index:
    """Where the layer that starts at row `base` holds `key`, or -1."""
    low, high = np.uint32(key & np.uint64(0xFFFFFFFF)), np.uint32(key >> np.uint64(32))
    first = base + np.int64(key & np.uint64(slots // WAYS - 1)) * WAYS
    for slot in range(first, first + WAYS):
        if words[slot, KEY_LOW] == low and words[slot, KEY_HIGH] == high:
            return slot
    return -1


@compiled
def claim_slot(words: Uint32, base: Index, slots: Index, key: Any) -> Index:
    """The slot of `key`; when there is none, the one of its set that was idle longest, emptied."""
    low, high = np.uint32(key & np.uint64(0xFFFFFFFF)), np.uint32(key >> np.uint64(32))
    first = base + np.int64(key & np.uint64(slots // WAYS - 1)) * WAYS
    oldest: Any = first
    for slot in range(first, first + WAYS):
        if words[slot, KEY_LOW] == low and words[slot, KEY_HIGH] == high:
            return slot
        if words[slot, STAMP] < words[oldest, STAMP]:
            oldest = slot
    for word in range(WORDS):
        words[oldest, word] = 0
    words[oldest, KEY_LOW] = low
    words[oldest, KEY_HIGH] = high
    return oldest


@compiled
def observe(
    words: Uint32, floats: Float32, slot: np.int64, tokens: Int64, weights: Float32, strength: float, decay: float
) -> None:
    """Tell a slot that `tokens` [K] followed its context with probabilities `weights` [K].

    What the slot knew is first multiplied by `decay` ** `strength`, to first order: an observation counts `strength`.
    """
    keep = np.float32(1.0 - (1.0 - decay) * strength)
    floats[slot, TOTAL] = floats[slot, TOTAL] * keep + np.float32(strength)
    for place in range(WEIGHTS, WEIGHTS + SUCCESSORS):
        floats[slot, place] *= keep
    for index in range(tokens.size):
        weight = weights[index] * np.float32(strength)
        if weight <= np.float32(0.0):
            continue
        token = np.uint32(tokens[index])
        lightest = 0
        for place in range(SUCCESSORS):
            if floats[slot, WEIGHTS + place] > np.float32(0.0) and words[slot, TOKENS + place] == token:
                floats[slot, WEIGHTS + place] += weight
                lightest = -1
                break
            if floats[slot, WEIGHTS + place] < floats[slot, WEIGHTS + lightest]:
                lightest = place
        if lightest >= 0 and weight > floats[slot, WEIGHTS + lightest]:
            words[slot, TOKENS + lightest] = token
            floats[slot, WEIGHTS + lightest] = weight
