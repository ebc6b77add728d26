"""The shared noise: Gumbel numbers keyed by (seed, position, token), the same on every device.

Counter-based Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
SC 2011). Key = the 64-bit seed; counter = (token // 4, low and high half of the position, 0); word token % 4
belongs to the token. The scalar implementation (Numba) serves host samplers and drafters, the tensor one the
device; both give the same 32-bit words.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.jit import jit

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10

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


def _multiply(constant: int, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of constant * value, in int64 arithmetic that never overflows."""
    low = (value & 0xFFFF) * constant
    high = (value >> 16) * constant
    product_low = ((high & 0xFFFF) << 16) + (low & _MASK)
    carry = (product_low >> 32) + (high >> 16) + (low >> 32)
    return carry & _MASK, product_low & _MASK


def words(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Random words on the device.

    Args: seeds and positions [S] int64 (the seed's 64 bits), tokens [C] or [S, C] int64.
    Returns: [S, C] int64 in 0 .. 2**32 - 1.
    """
    tokens = tokens.expand(seeds.shape[0], -1) if tokens.dim() == 1 else tokens
    k0, k1 = (seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]
    c0 = tokens >> 2
    c1 = (positions & _MASK)[:, None].expand_as(tokens)
    c2 = ((positions >> 32) & _MASK)[:, None].expand_as(tokens)
    c3 = torch.zeros_like(tokens)
    for _ in range(_ROUNDS):
        hi0, lo0 = _multiply(_M0, c0)
        hi1, lo1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    lane = tokens & 3
    return torch.where(lane < 2, torch.where(lane == 0, c0, c1), torch.where(lane == 2, c2, c3))


def gumbel_device(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise on the device, shapes as `words`. Returns: [S, C] float64."""
    uniform = (words(seeds, positions, tokens).double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))
