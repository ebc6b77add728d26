"""On-line caches: what followed short contexts in live traffic, bounded, decayed, one per request and per tenant.

A cache is 4-way set-associative. One slot is one 64-byte cache line and belongs to one context of 1 to MAX_ORDER
tokens: 64 bits of the context's hash, the decayed number of observations, the time of the last one, and the six
heaviest successors with their decayed weights. A new context takes the slot of its set that was idle longest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drafters.base import Float32, Int64, Uint32
from drafters.compiled import Index, Records, compiled, inlined
from drafters.ngram.table import mix

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

Caches = Records
"""[caches, slots] records of type SLOT: equal caches side by side, each of a power of two of slots."""


def make_caches(num_caches: int, num_slots: int) -> Caches:
    """Empty caches, in memory that starts at a cache line. Pages that were never written take no memory."""
    assert num_slots in [WAYS << power for power in range(32)], f"{num_slots} slots"
    size = num_caches * num_slots
    memory: Uint32 = np.zeros((size + 1) * WORDS, np.uint32)
    skip = -(memory.ctypes.data // 4) % WORDS
    return memory[skip : skip + size * WORDS].view(SLOT).reshape(num_caches, num_slots)


def clear(cache: Records) -> None:
    """Forget all of one cache."""
    cache.view(np.uint32)[:] = 0


def halve_stamps(caches: Caches) -> None:
    """Make room for later time stamps; who was idle for longer than whom stays as it was, but for ties."""
    stamped = caches["stamp"].nonzero()  # pages that were never written stay so
    caches["stamp"][stamped] >>= 1


@inlined
def extend_key(key: Any, token: Index) -> Index:
    """Key of a context one token further back; start from 0."""
    return mix((key ^ np.uint64(token + 1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1))


@compiled
def find_slot(cache: Records, key: Any) -> Index:
    """Where the cache holds `key`, or -1."""
    first = np.int64(key & np.uint64(cache.size // WAYS - 1)) * WAYS
    for slot in range(first, first + WAYS):
        if cache[slot].key == key:
            return slot
    return -1


@compiled
def claim_slot(cache: Records, key: Any) -> Index:
    """The slot of `key`; when there is none, the one of its set that was idle longest, emptied."""
    first = np.int64(key & np.uint64(cache.size // WAYS - 1)) * WAYS
    oldest: Any = first
    for slot in range(first, first + WAYS):
        if cache[slot].key == key:
            return slot
        if cache[slot].stamp < cache[oldest].stamp:
            oldest = slot
    held = cache[oldest]
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
