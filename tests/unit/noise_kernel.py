"""Kernels that show the noise itself, for tests of it."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from verifier.cuda.kernels.noise import gumbel32, gumbel64, words_of


@triton.jit
def _noise_kernel(key, position, first, drawn, near, exact, block: tl.constexpr):
    words = words_of(tl.load(key), tl.load(position), first, block)
    place = tl.arange(0, block)
    tl.store(drawn + place, words.to(tl.int64))
    tl.store(near + place, gumbel32(words))
    tl.store(exact + place, gumbel64(words))


@triton.jit
def _noise_of_kernel(drawn, near, exact, block: tl.constexpr):
    place = tl.arange(0, block)
    words = tl.load(drawn + place).to(tl.uint32)
    tl.store(near + place, gumbel32(words))
    tl.store(exact + place, gumbel64(words))


def noise(key: int, position: int, first: int, count: int, device: str) -> tuple[torch.Tensor, ...]:
    """Words (int64), noise in float32 and in float64 of `count` tokens, a power of two: [count] each."""
    at = [torch.tensor([number], dtype=torch.int64, device=device) for number in (key, position)]
    out = [torch.empty(count, dtype=kind, device=device) for kind in (torch.int64, torch.float32, torch.float64)]
    _noise_kernel[(1,)](*at, first, *out, count)
    return tuple(out)


def noise_of(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of words [count] int64 in float32 and in float64."""
    near, exact = torch.empty_like(drawn, dtype=torch.float32), torch.empty_like(drawn, dtype=torch.float64)
    _noise_of_kernel[(1,)](drawn, near, exact, drawn.shape[0])
    return near, exact
