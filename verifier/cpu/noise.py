"""The shared noise on the host, one number at a time: the words of verifier/noise.py, in Numba."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from verifier.jit import jit

MAX_GUMBEL = 23.0
"""No noise is above this (u >= 2**-33 gives 22.88): a token this far behind the leader cannot win."""


@jit(inline="always")
def _philox(seed: np.uint64, position: np.int64, block: np.int64) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    k0 = np.uint64(seed) & mask
    k1 = np.uint64(seed) >> half
    c0 = np.uint64(block) & mask
    c1 = np.uint64(position) & mask
    c2 = np.uint64(position) >> half
    c3 = np.uint64(0)
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & mask, (p0 >> half) ^ c3 ^ k1, p0 & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3


@jit(inline="always")
def word(seed: np.uint64, position: np.int64, token: np.int64) -> np.uint32:
    """The 32 random bits of one (seed, position, token)."""
    c0, c1, c2, c3 = _philox(seed, position, token >> 2)
    lane = token & 3
    if lane == 0:
        return np.uint32(c0)
    if lane == 1:
        return np.uint32(c1)
    if lane == 2:
        return np.uint32(c2)
    return np.uint32(c3)


@jit(inline="always")
def gumbel(seed: np.uint64, position: np.int64, token: np.int64) -> float:
    """Gumbel noise of one (seed, position, token), in float64 on the host.

    The word becomes u in (0, 1) and -log(-log1p(-u)): the fine end of u, near 0, is where winners live.
    """
    bits = np.float64(word(seed, position, token))
    return -math.log(-math.log1p(-(bits + 0.5) * 2.0**-32))


@jit()
def words_host(seed: np.uint64, position: np.int64, num_tokens: int) -> NDArray[np.uint32]:
    """The words of tokens 0 .. num_tokens - 1: [num_tokens] uint32."""
    out = np.empty(num_tokens, np.uint32)
    for token in range(num_tokens):
        out[token] = word(seed, position, token)
    return out
