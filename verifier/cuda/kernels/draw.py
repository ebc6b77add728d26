"""Sampling by shared noise under top-k, top-p and min-p, without a sort: draw first, then ask whether it was allowed.

What the truncations keep is always a head of the order (logit descending, token ascending). So the winner of a larger
head is the answer if it lies in the nucleus; if not, nothing behind it does either, and the search goes on among the
tokens ahead of it. A winner is in the nucleus if the mass ahead of it is below top_p of the whole. Each round is one
pass over the row; a round is needed again about as often as a nucleus rejects a draw.

Sums and noise are first taken in float32 with known bounds of error. Winners within the bound are compared in
float64, by the oracle's formula, and a mass within the bound of its limit is summed again in float64: the token is the
oracle's but for the last bits of float64.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from verifier.cuda.kernels.noise import gumbel32, gumbel64, words_of
from verifier.cuda.kernels.survey import row_top

_NO_TOKEN = tl.constexpr(2147483647)
_HOPELESS = tl.constexpr(-30.0)
"""The row's best token is at 0 and gets at least -3.2 of noise, any other at most 22.9."""
_SLACK = tl.constexpr(2.0**-11)
"""More than twice the error of a noisy score above _HOPELESS in float32: 2e-5 of noise, 30 units in the last place of
the score (8e-6 in all) and the rounding of their sum."""
_MASS_SLACK = tl.constexpr(2.0**-15)
"""More than the relative error of a mass in float32: an exponent above _HOPELESS is off by 8e-6 at most, exp by 1e-6;
all weights below it together are less than 1e-7 for a vocabulary of a million."""


@triton.jit
def _measure(logits, vocab, first, record, pivot, is_exact, block: tl.constexpr):
    """One block of a row.

    Args: `record` = greatest logit, temperature, top-k threshold, min-p (float64), seed, position (int64); `pivot` =
    logit and token that the tokens must be ahead of.
    Returns: mass of the top-k set, mass ahead of the pivot, best noisy score ahead of the pivot (float64), its token.
    """
    top, temperature, threshold, min_p, seed, position = record
    pivot_z, pivot_token = pivot
    token = first + tl.arange(0, block)
    z = tl.load(logits + token, mask=token < vocab, other=-float("inf"))
    is_kept = (token < vocab) & (z >= threshold.to(z.dtype))
    is_ahead = is_kept & ((z > pivot_z) | ((z == pivot_z) & (token < pivot_token)))
    inverse = tl.maximum(tl.minimum(1.0 / temperature, 1e38), 1e-38).to(tl.float32)
    score = tl.maximum((z - top.to(z.dtype)).to(tl.float32) * inverse, -1e30)
    weight = tl.exp(score)
    if is_exact:  # noqa: SIM108 - a branch: float64 is not to be computed in vain
        mass = tl.exp((z.to(tl.float64) - top) / temperature)
    else:
        mass = weight.to(tl.float64)
    whole = tl.sum(tl.where(is_kept, mass, 0.0), axis=0)
    ahead = tl.sum(tl.where(is_ahead, mass, 0.0), axis=0)

    words = words_of(seed, position, first, block)
    noisy = score + gumbel32(words)
    bound = min_p.to(tl.float32)
    is_possible = is_ahead & (score > _HOPELESS) & (weight >= bound * (1.0 - 1e-4))
    is_sure = is_possible & (weight > bound * (1.0 + 1e-4))
    bar = tl.max(tl.where(is_sure, noisy, -float("inf")), axis=0) - _SLACK
    left = is_possible & (noisy >= bar)
    best, winner = tl.full([], -float("inf"), tl.float64), tl.full([], _NO_TOKEN, tl.int32)
    num_left = tl.sum(left.to(tl.int32), axis=0)
    while num_left > 0:  # nearly always once
        chosen = tl.min(tl.where(left, token, _NO_TOKEN), axis=0)
        is_chosen = token == chosen
        exact = (tl.load(logits + chosen).to(tl.float64) - top) / temperature
        value = exact + gumbel64(tl.max(tl.where(is_chosen, words.to(tl.int64), 0), axis=0))
        is_better = (tl.exp(exact) >= min_p) & (value > best)
        best, winner = tl.where(is_better, value, best), tl.where(is_better, chosen, winner)
        left = left & (is_chosen == 0)
        num_left -= 1
    return whole, ahead, best, winner


@triton.jit
def _settle(measured, top_p, pivot, is_exact):
    """What a round says: the next pivot, whether to measure it again in float64, whether it is the answer."""
    whole, ahead, winner = measured
    wanted = top_p * whole
    is_close = (tl.abs(ahead - wanted) <= _MASS_SLACK * whole) & (is_exact == 0) & (ahead > 0)
    is_in = (ahead < wanted) | (ahead == 0)
    is_done = is_in & (is_close == 0)
    next_pivot = tl.where(is_close | is_in, pivot, winner)
    return next_pivot, is_close.to(tl.int32), is_done.to(tl.int32)


@triton.jit
def _replay(masses, winners, row, shape, top_p, num_rounds: tl.constexpr, blocks_pad: tl.constexpr):
    """Where the rounds that ran so far have led: pivot, is_exact, is_done. Every program of a row finds the same."""
    num_rows, num_blocks = shape
    part = tl.arange(0, blocks_pad)
    is_real = part < num_blocks
    pivot, is_exact = tl.full([], _NO_TOKEN, tl.int32), tl.full([], 0, tl.int32)
    is_done = tl.full([], 0, tl.int32)
    for turn in tl.static_range(num_rounds):
        if is_done == 0:  # blocks of a settled row have written nothing more
            base = (turn * num_rows + row) * num_blocks
            whole = tl.sum(tl.load(masses + base * 3 + part, mask=is_real, other=0.0), axis=0)
            ahead = tl.sum(tl.load(masses + base * 3 + num_blocks + part, mask=is_real, other=0.0), axis=0)
            value = tl.load(masses + base * 3 + 2 * num_blocks + part, mask=is_real, other=-float("inf"))
            token = tl.load(winners + base + part, mask=is_real, other=_NO_TOKEN)
            winner = tl.min(tl.where(value == tl.max(value, axis=0), token, _NO_TOKEN), axis=0)
            if turn == 0:
                pivot = winner
                is_done = (top_p >= 1.0).to(tl.int32)
            else:
                pivot, is_exact, is_done = _settle((whole, ahead, winner), top_p, pivot, is_exact)
    return pivot, is_exact, is_done


@triton.jit
def _pivot_of(logits, pivot):
    """Logit and token of a pivot; no pivot is behind everything."""
    is_none = pivot == _NO_TOKEN
    z = tl.load(logits + tl.where(is_none, 0, pivot))
    return tl.where(is_none, -float("inf"), z), pivot


@triton.jit
def _record_of(known, thresholds, reals, counts, row):
    """What `_measure` must know of a row: `known` (best logit, temperature), threshold, min_p, seed, position."""
    return (
        known[0],
        known[1],
        tl.load(thresholds + row),
        tl.load(reals + 3 * row + 2),
        tl.load(counts + 3 * row + 1),
        tl.load(counts + 3 * row + 2),
    )


@triton.jit(do_not_specialize=["num_rows"])
def draw_kernel(
    logits,  # [S, V] float32 or float64
    reals,  # [S, 3] float64: temperature, top_p, min_p
    counts,  # [S, 3] int64: top_k, seed, position
    tops,  # [S, num_blocks] float64
    top_tokens,  # [S, num_blocks] int32
    thresholds,  # [S] float64
    masses,  # [rounds, S, 3, num_blocks] float64: whole, ahead, best noisy score
    winners,  # [rounds, S, num_blocks] int32
    row_stride,
    vocab,
    num_rows,
    num_blocks,
    turn: tl.constexpr,
    block: tl.constexpr,
    blocks_pad: tl.constexpr,
):
    """Round `turn` for one block of one row. Grid: (num_blocks, S)."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    top, _, is_sound = row_top(tops, top_tokens, row, num_blocks, blocks_pad)
    temperature = tl.load(reals + 3 * row)
    if (is_sound == 0) | (temperature <= 0.0):
        return
    top_p = tl.load(reals + 3 * row + 1)
    pivot, is_exact, is_done = _replay(masses, winners, row, (num_rows, num_blocks), top_p, turn, blocks_pad)
    if is_done != 0:
        return
    record = _record_of((top, temperature), thresholds, reals, counts, row)
    logits += row * row_stride
    pivot_here = _pivot_of(logits, pivot)
    whole, ahead, best, winner = _measure(logits, vocab, part * block, record, pivot_here, is_exact, block)
    base = (turn * num_rows + row) * num_blocks
    tl.store(masses + base * 3 + part, whole)
    tl.store(masses + base * 3 + num_blocks + part, ahead)
    tl.store(masses + base * 3 + 2 * num_blocks + part, best)
    tl.store(winners + base + part, winner)


@triton.jit(do_not_specialize=["num_rows"])
def finish_kernel(
    logits,  # [S, V] float32 or float64
    reals,  # [S, 3] float64: temperature, top_p, min_p
    counts,  # [S, 3] int64: top_k, seed, position
    tops,  # [S, num_blocks] float64
    top_tokens,  # [S, num_blocks] int32
    thresholds,  # [S] float64
    masses,  # [rounds, S, 3, num_blocks] float64
    winners,  # [rounds, S, num_blocks] int32
    chosen,  # [S] int64
    row_stride,
    vocab,
    num_rows,
    num_blocks,
    num_rounds: tl.constexpr,
    block: tl.constexpr,
    blocks_pad: tl.constexpr,
):
    """The row's token, or -1 if the row is broken. Grid: (S,). A row that the rounds left open is finished here."""
    row = tl.program_id(0).to(tl.int64)
    top, best_token, is_sound = row_top(tops, top_tokens, row, num_blocks, blocks_pad)
    temperature = tl.load(reals + 3 * row)
    if (is_sound == 0) | (temperature <= 0.0):
        tl.store(chosen + row, tl.where(is_sound, best_token, -1).to(tl.int64))
        return
    top_p = tl.load(reals + 3 * row + 1)
    pivot, is_exact, is_done = _replay(masses, winners, row, (num_rows, num_blocks), top_p, num_rounds, blocks_pad)
    record = _record_of((top, temperature), thresholds, reals, counts, row)
    logits += row * row_stride
    while is_done == 0:
        pivot_here = _pivot_of(logits, pivot)
        whole, ahead = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
        best, winner = tl.full([], -float("inf"), tl.float64), tl.full([], _NO_TOKEN, tl.int32)
        for part in range(0, num_blocks):
            measured = _measure(logits, vocab, part * block, record, pivot_here, is_exact, block)
            whole += measured[0]
            ahead += measured[1]
            winner = tl.where(measured[2] > best, measured[3], winner)
            best = tl.maximum(best, measured[2])
        pivot, is_exact, is_done = _settle((whole, ahead, winner), top_p, pivot, is_exact)
    tl.store(chosen + row, pivot.to(tl.int64))
