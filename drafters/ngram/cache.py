"""On-line caches: what followed short contexts in live traffic, bounded, decayed, one per request and per tenant.

A cache is 4-way set-associative. One slot is one 64-byte cache line and belongs to one context of 1 to MAX_ORDER
tokens: 64 bits of the context's hash, the decayed number of observations, the time of the last one, and the six
heaviest successors with their decayed weights. A new context takes the slot of its set that was idle longest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.compiled import Index, Records, compiled, inlined
from drafters.ngram.table import mix

Uint32 = NDArray[np.uint32]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

MAX_ORDER = 4
"""Most context tokens that are looked at."""
WAYS = 4
SUCCESSORS = 6
WORDS = 16
SLOT = np.dtype(
    [
        ("key", np.uint64),  # 0: empty
        ("total", np.float32),
        ("stamp", np.uint32),
        ("tokens", np.uint32, (SUCCESSORS,)),
        ("weights", np.float32, (SUCCESSORS,)),
    ]
)
STAMP_LIMIT = 2**31
"""Time stamps stay below it: they are kept as uint32, and one that wrapped around would look like the oldest."""

Slots = Records
"""[num_caches * slots] records of type SLOT."""


class Caches:
    """Equal caches side by side. Owns their slots, in memory that starts at a cache line.

    Pages that were never written take no memory.
    """

    def __init__(self, num_caches: int, num_slots: int):
        """`num_slots` of one cache: a power of two, or 0 for caches that hold nothing."""
        assert num_slots == 0 or (num_slots >= WAYS and num_slots & (num_slots - 1) == 0), f"{num_slots} slots"
        self.num_caches, self.num_slots = num_caches, num_slots
        size = num_caches * num_slots
        memory: Uint32 = np.zeros((size + 1) * WORDS, np.uint32)
        skip = -(memory.ctypes.data // 4) % WORDS
        self.slots: Slots = memory[skip : skip + size * WORDS].view(SLOT)

    @property
    def num_bytes(self) -> int:
        """Size of one cache."""
        return self.num_slots * SLOT.itemsize

    def of(self, cache: int) -> Slots:
        """The slots of one cache."""
        return self.slots[cache * self.num_slots : (cache + 1) * self.num_slots]

    def clear(self, cache: int) -> None:
        """Forget all of one cache."""
        self.of(cache).view(np.uint32)[:] = 0

    def halve_stamps(self) -> None:
        """Make room for later time stamps; who was idle for longer than whom stays as it was, but for ties."""
        stamped = np.flatnonzero(self.slots["stamp"])  # pages that were never written stay so
        self.slots["stamp"][stamped] >>= 1


@inlined
def extend_key(key: Any, token: Index) -> Index:
    """Key of a context one token further back; start from 0."""
    return mix((key ^ np.uint64(token + 1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1))


@compiled
def find_slot(slots: Slots, base: Index, num_slots: Index, key: Any) -> Index:
    """Where the cache that starts at slot `base` holds `key`, or -1."""
    first = base + np.int64(key & np.uint64(num_slots // WAYS - 1)) * WAYS
    for slot in range(first, first + WAYS):
        if slots[slot].key == key:
            return slot
    return -1


@compiled
def claim_slot(slots: Slots, base: Index, num_slots: Index, key: Any) -> Index:
    """The slot of `key`; when there is none, the one of its set that was idle longest, emptied."""
    first = base + np.int64(key & np.uint64(num_slots // WAYS - 1)) * WAYS
    oldest: Any = first
    for slot in range(first, first + WAYS):
        if slots[slot].key == key:
            return slot
        if slots[slot].stamp < slots[oldest].stamp:
            oldest = slot
    held = slots[oldest]
    held.key, held.total = key, np.float32(0.0)
    for place in range(SUCCESSORS):
        held.tokens[place], held.weights[place] = np.uint32(0), np.float32(0.0)
    return oldest


@compiled
def observe(slot: Any, tokens: Int64, weights: Float32, strength: float, decay: float) -> None:
    """Tell a slot that `tokens` [K] followed its context with probabilities `weights` [K].

    What the slot knew is first multiplied by `decay` ** `strength`, to first order: an observation counts `strength`.
    """
    keep = np.float32(1.0 - (1.0 - decay) * strength)
    slot.total = slot.total * keep + np.float32(strength)
    for place in range(SUCCESSORS):
        slot.weights[place] *= keep
    for index in range(tokens.size):
        weight = weights[index] * np.float32(strength)
        if weight <= np.float32(0.0):
            continue
        token = np.uint32(tokens[index])
        lightest = 0
        for place in range(SUCCESSORS):
            if slot.weights[place] > np.float32(0.0) and slot.tokens[place] == token:
                slot.weights[place] += weight
                lightest = -1
                break
            if slot.weights[place] < slot.weights[lightest]:
                lightest = place
        if lightest >= 0 and weight > slot.weights[lightest]:
            slot.tokens[lightest] = token
            slot.weights[lightest] = weight
