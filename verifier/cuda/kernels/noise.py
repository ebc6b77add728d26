"""The shared noise inside a kernel: verifier.noise's words bit for bit, and two readings of a word.

The float32 reading finds who can win; the float64 one, of a few tokens, decides (see draw.py).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

_M0, _M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_W0, _W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def philox(seed, position, blocks):
    """Philox 4x32-10: the four words of each block of four tokens.

    Args: seed and position, int64 scalars; blocks, a tensor of token // 4. Returns: four tensors of uint32.
    """
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    word0 = blocks.to(tl.uint32)
    word1 = tl.zeros_like(word0) + position.to(tl.uint32)
    word2 = tl.zeros_like(word0) + (position >> 32).to(tl.uint32)
    word3 = tl.zeros_like(word0)
    first, second = tl.full([], _M0, tl.uint32), tl.full([], _M1, tl.uint32)
    step0, step1 = tl.full([], _W0, tl.uint32), tl.full([], _W1, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(word0, first), tl.mul(word0, first, sanitize_overflow=False)
        high1, low1 = tl.umulhi(word2, second), tl.mul(word2, second, sanitize_overflow=False)
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0 = tl.add(key0, step0, sanitize_overflow=False)
        key1 = tl.add(key1, step1, sanitize_overflow=False)
    return word0, word1, word2, word3


@triton.jit
def words_of(seed, position, first, block: tl.constexpr):
    """Words of the tokens first .. first + block - 1, `first` a multiple of 4: [block] uint32."""
    word0, word1, word2, word3 = philox(seed, position, first // 4 + tl.arange(0, block // 4))
    pairs = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # [block / 4, 2, 2]: lane 2 i + j at [i, j]
    return tl.reshape(pairs, [block])


@triton.jit
def gumbel32(words):
    """Gumbel noise of uint32 words in float32; off from the float64 noise by less than 2e-5.

    With u = (word + 0.5) / 2 ** 32 it is -log(e), e = -log(1 - u). Below 1/16 a series gives e to a few units in the
    last place. Above, 1 - u comes from the word's complement, so that it has its full precision near 0 too.
    """
    near = (words.to(tl.float32) + 0.5) * (2.0**-32)
    series = near * (1.0 + near * (0.5 + near * (1.0 / 3 + near * (0.25 + near * (0.2 + near * (1.0 / 6))))))
    rest = ((words ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (2.0**-32)
    return -tl.log(tl.where(near < 0.0625, series, -tl.log(rest)))


@triton.jit
def gumbel64(words):
    """Gumbel noise of words in float64, to the last bits of log: the oracle's formula."""
    u = (words.to(tl.float64) + 0.5) * (2.0**-32)
    return -tl.log(-tl.log(1.0 - u))  # 1 - u has 33 bits, so it is exact, and log1p would give nothing more
