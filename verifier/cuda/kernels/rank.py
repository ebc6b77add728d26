"""The k-th greatest logit of a row without sorting: digit by digit, counting how many logits share each digit.

Radix selection: a logit's bits, folded so that their order is the order of numbers, are looked at eight at a time from
the top; among the logits that agree with the digits found so far, the counts of the next digit tell where rank k
falls. Counts are integers, so the order in which blocks add them does not matter.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

NUM_DIGITS = 256


@triton.jit
def _fold(z):
    """Bits of z as uint64 in the order of the numbers; those of float32 fill the upper half."""
    if z.dtype == tl.float32:
        raw = z.to(tl.int32, bitcast=True)
        key = (raw ^ ((raw >> 31) | -2147483648)).to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    else:
        wide = z.to(tl.int64, bitcast=True)
        key = (wide ^ ((wide >> 63) | -9223372036854775808)).to(tl.uint64, bitcast=True)
    return key


@triton.jit
def _unfold(key, is_double: tl.constexpr):
    """The number of a key, as float64."""
    if is_double:
        wide = key.to(tl.int64, bitcast=True)
        z = (wide ^ ((~wide >> 63) | -9223372036854775808)).to(tl.float64, bitcast=True)
    else:
        raw = (key >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
        z = (raw ^ ((~raw >> 31) | -2147483648)).to(tl.float32, bitcast=True).to(tl.float64)
    return z


@triton.jit
def _find_digits(counts, row, num_rows, rank, num_found: tl.constexpr):
    """The first digits of the key of rank `rank` (1 is the greatest), from the counts of those passes."""
    digit = tl.arange(0, 256)
    key = tl.full([], 0, tl.uint64)
    left = rank
    for level in tl.static_range(num_found):
        count = tl.load(counts + (level * num_rows + row) * 256 + digit).to(tl.int64)
        reached = tl.sum(count, axis=0) - tl.cumsum(count, axis=0) + count  # that have this digit or a greater one
        found = tl.sum((reached >= left).to(tl.int64), axis=0) - 1
        left -= tl.sum(tl.where(digit > found, count, 0), axis=0)
        key = (key << 8) | found.to(tl.uint64)
    return key


@triton.jit(do_not_specialize=["num_rows"])
def count_kernel(
    logits,  # [S, V] float32 or float64
    records,  # [S, 3] int64: top_k first
    counts,  # [passes, S, 256] int32, zero in the beginning
    row_stride,
    vocab,
    num_rows,
    level: tl.constexpr,
    block: tl.constexpr,
):
    """Count digit `level` of the logits that agree with the digits before. Grid: (blocks, S)."""
    row = tl.program_id(1).to(tl.int64)
    rank = tl.load(records + 3 * row)
    if (rank <= 0) | (rank >= vocab):
        return
    found = _find_digits(counts, row, num_rows, rank, level)
    token = tl.program_id(0) * block + tl.arange(0, block)
    is_real = token < vocab
    key = _fold(tl.load(logits + row * row_stride + token, mask=is_real, other=0.0))
    if level > 0:
        is_real = is_real & ((key >> (64 - 8 * level)) == found)
    digit = ((key >> (56 - 8 * level)) & 255).to(tl.int32)
    count = tl.histogram(digit, 256, mask=is_real)
    place = tl.arange(0, 256)
    tl.atomic_add(counts + (level * num_rows + row) * 256 + place, count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def rank_kernel(
    records,  # [S, 3] int64: top_k first
    counts,  # [passes, S, 256] int32
    thresholds,  # [S] float64
    vocab,
    num_rows,
    num_passes: tl.constexpr,
):
    """The logit of rank top_k, or minus infinity where top-k is off. Grid: (S,)."""
    row = tl.program_id(0).to(tl.int64)
    rank = tl.load(records + 3 * row)
    if (rank <= 0) | (rank >= vocab):
        tl.store(thresholds + row, -float("inf"))
    else:
        key = _find_digits(counts, row, num_rows, rank, num_passes)
        tl.store(thresholds + row, _unfold(key << (64 - 8 * num_passes), num_passes == 8))
