"""The host's sampler: the same rule as sampling.py, one row at a time in Numba, without touching what it need not.

Float64 throughout, so that it agrees with the oracle but for the last bits of log and exp.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from verifier.noise import MAX_GUMBEL, _philox

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

_BLOCK = 32


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def top_candidates(logits: Float32, bits: Int32, tokens: Int32, values: Float32) -> None:
    """The K best tokens of each row, best first, ties to the lowest token.

    `bits` [N, V] int32 is `logits` [N, V] reinterpreted; `tokens` and `values` [N, K] are filled. A row with NaN or
    plus infinity gets tokens -1. Floats are compared through their bits, folded so that integer order is float order:
    block maxima then run in vector registers, and only blocks that beat the K-th best are looked into.
    """
    num_nodes, vocab = bits.shape
    num_best = tokens.shape[1]
    fold = np.int32(0x7FFFFFFF)
    infinity = np.int32(0x7F800000)
    lowest = np.int32(-(2**31))
    keys = np.empty(num_best, np.int32)
    for node in range(num_nodes):
        keys[:] = lowest
        tokens[node] = 0
        smallest, greatest = np.int32(2**31 - 1), lowest
        for start in range(0, vocab, _BLOCK):
            stop = min(start + _BLOCK, vocab)
            block_max, block_min = lowest, np.int32(2**31 - 1)
            for token in range(start, stop):
                raw = bits[node, token]
                key = raw ^ ((raw >> 31) & fold)
                block_max = max(block_max, key)
                block_min = min(block_min, key)
            greatest, smallest = max(greatest, block_max), min(smallest, block_min)
            if block_max <= keys[num_best - 1]:
                continue
            for token in range(start, stop):
                raw = bits[node, token]
                key = raw ^ ((raw >> 31) & fold)
                if key > keys[num_best - 1]:
                    place = num_best - 1
                    while place > 0 and keys[place - 1] < key:
                        keys[place] = keys[place - 1]
                        tokens[node, place] = tokens[node, place - 1]
                        place -= 1
                    keys[place] = key
                    tokens[node, place] = token
        # Folded, minus infinity is -2139095041; what lies below it is a NaN with its sign bit set.
        if greatest >= infinity or smallest < np.int32(-2139095041) or greatest <= np.int32(-2139095041):
            tokens[node] = -1
        for place in range(num_best):
            values[node, place] = logits[node, max(tokens[node, place], 0)]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def argmax_finite(logits: Float32) -> Any:
    """Argmax of a row [V], ties to the lowest token; -1 if it holds NaN or plus infinity, or nothing finite."""
    best, token = -np.inf, -1
    for index in range(logits.shape[0]):
        value = logits[index]
        if not value < np.inf:
            return -1
        if value > best:
            best, token = value, index
    return token


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def choose_host(
    logits: Float32,
    position: int,
    record: Any,
    lists: tuple[Int32, Int32, Float64],
    seen: tuple[Int32, Bool],
    z: Float64,
) -> Any:
    """The target's token for one place.

    Args: logits [V]; record a ROW_RECORD; lists = stop ids, bias tokens, bias values of the row; seen = answer counts
    [V] and prompt membership [V]; z [V] float64 scratch.
    Returns: the token, or -1 if the logits are not finite.
    """
    stops, bias_tokens, bias_values = lists
    counts, in_prompt = seen
    vocab = logits.shape[0]
    for token in range(vocab):
        value = logits[token]
        if not value < np.inf:
            return -1
        z[token] = value
    if record.has_penalties:
        for token in range(vocab):
            count = counts[token]
            if count > 0 or in_prompt[token]:
                z[token] = z[token] / record.repetition if z[token] > 0 else z[token] * record.repetition
            if count > 0:
                z[token] -= count * record.frequency + record.presence
    for index in range(record.num_biases):
        z[bias_tokens[index]] += bias_values[index]
    if position < record.first_free:
        for index in range(record.num_stops):
            z[stops[index]] = -np.inf
    best = 0
    for token in range(1, vocab):
        if z[token] > z[best]:
            best = token
    if z[best] == -np.inf:
        return -1
    if record.temperature == 0.0:
        return best
    for token in range(vocab):
        z[token] /= record.temperature
    _truncate(z, record, best)
    return _noisy_argmax(z, record.seed, position, best)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _truncate(z: Float64, record: Any, best: int) -> None:
    """top-k, top-p and min-p, as minus infinity in z [V] (already divided by the temperature)."""
    vocab = z.shape[0]
    if 0 < record.top_k < vocab:
        threshold = np.partition(z, vocab - record.top_k)[vocab - record.top_k]
        for token in range(vocab):
            if z[token] < threshold:
                z[token] = -np.inf
    if record.top_p < 1.0:
        _keep_nucleus(z, record.top_p, best)
    if record.min_p > 0.0:
        for token in range(vocab):
            if math.exp(z[token] - z[best]) < record.min_p:
                z[token] = -np.inf


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _keep_nucleus(z: Float64, top_p: float, best: int) -> None:
    """Keep the smallest set of best tokens whose mass reaches top_p.

    Tokens lighter than (1 - top_p) / V of the whole cannot be in it, as all of them together weigh less than
    1 - top_p: only the others are sorted.
    """
    vocab = z.shape[0]
    weights = np.empty(vocab)
    total = 0.0
    for token in range(vocab):
        weights[token] = math.exp(z[token] - z[best])
        total += weights[token]
    floor = (1.0 - top_p) * total / vocab * (1.0 - 1e-9)
    heavy = np.flatnonzero(weights >= floor)
    order = heavy[np.argsort(-weights[heavy], kind="mergesort")]
    z_kept = np.empty(order.shape[0])
    before = 0.0
    kept = 0
    for token in order:
        if kept > 0 and before >= top_p * total:
            break
        z_kept[kept] = z[token]
        before += weights[token]
        kept += 1
    z[:] = -np.inf
    for place in range(kept):
        z[order[place]] = z_kept[place]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _noisy_argmax(z: Float64, seed: np.uint64, position: int, best: int) -> Any:
    """argmax of z [V] plus the shared noise, four tokens per Philox block; hopeless blocks are never drawn."""
    vocab = z.shape[0]
    winner, top = -1, -np.inf
    first = best >> 2
    for turn in range((vocab + 3) // 4 + 1):
        # The block of the most likely token first: it raises the bar for all others.
        block = first if turn == 0 else turn - 1
        if turn > 0 and block == first:
            continue
        start = block * 4
        stop = min(start + 4, vocab)
        highest = -np.inf
        for token in range(start, stop):
            highest = max(highest, z[token])
        if highest == -np.inf or highest + MAX_GUMBEL < top:
            continue
        words = _philox(seed, position, block)
        for token in range(start, stop):
            if z[token] == -np.inf:
                continue
            lane = token - start
            word = words[0] if lane == 0 else words[1] if lane == 1 else words[2] if lane == 2 else words[3]
            uniform = (np.float64(word) + 0.5) * 2.0**-32
            # P(z + g > top) = 1 - exp(-exp(z - top)) <= exp(z - top): most tokens fail here, without a logarithm.
            gap = top - z[token]
            if gap > 0.0 and uniform > math.exp(-gap):
                continue
            value = z[token] - math.log(-math.log1p(-uniform))
            if value > top or (value == top and token < winner):
                winner, top = token, value
    return winner
