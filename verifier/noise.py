"""The shared noise: Gumbel numbers keyed by (seed, position, token), the same on every device.

Counter-based Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
SC 2011). Key = the 64-bit seed; counter = (token // 4, low and high half of the position, 0); word token % 4
belongs to the token. In tensors here; for the host's samplers and for drafters in verifier/cpu/noise.py. Both give the
same 32-bit words.
"""

from __future__ import annotations

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10


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
