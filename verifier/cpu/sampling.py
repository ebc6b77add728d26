"""The host's sampler: the same rule as sampling.py, one row at a time in Numba, without touching what it need not.

Float64 throughout, so that it agrees with the oracle but for the last bits of log and exp.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verifier.cpu.noise import MAX_GUMBEL, _philox
from verifier.jit import jit

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

_BLOCK = 64
_PER_LN2 = 1.0 / math.log(2.0)
_LN2_HIGH = 6.93147180369123816490e-01  # ln 2 in two parts, so that k * ln 2 is exact
_LN2_LOW = 1.90821492927058770002e-10
_NUM_BUCKETS = 256
_LOWEST = np.int32(-(2**31))
_FOLD = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_MINUS_INFINITY = np.int32(-2139095041)  # folded; what lies below is a NaN with its sign bit set


@jit(inline="always")
def _key(raw: np.int32) -> Any:
    """The bits of a float32, folded so that integer order is float order: maxima then run in vector registers."""
    return np.int32(raw ^ ((raw >> np.int32(31)) & _FOLD))


@jit()
def top_candidates(logits: Float32, bits: Int32, tokens: Int32, values: Float32) -> None:
    """The K best tokens of each row, best first, ties to the lowest token.

    `bits` [N, V] int32 is `logits` [N, V] reinterpreted; `tokens` and `values` [N, K] are filled. A row with NaN or
    plus infinity gets tokens -1. The K best lie in blocks whose maximum reaches the K-th best block maximum: only
    those are looked into.
    """
    num_nodes, vocab = bits.shape
    num_best = tokens.shape[1]
    num_blocks = (vocab + _BLOCK - 1) // _BLOCK
    maxima = np.empty(num_blocks, np.int32)
    keys = np.empty(num_best, np.int32)
    for node in range(num_nodes):
        row = bits[node]
        smallest = _block_maxima(row, maxima)
        bar = _kth_best(maxima, keys)
        keys[:] = _LOWEST
        tokens[node] = 0
        for block in range(num_blocks):
            if maxima[block] < bar:
                continue
            for token in range(block * _BLOCK, min((block + 1) * _BLOCK, vocab)):
                key = _key(row[token])
                if key > keys[num_best - 1]:
                    place = num_best - 1
                    while place > 0 and keys[place - 1] < key:
                        keys[place] = keys[place - 1]
                        tokens[node, place] = tokens[node, place - 1]
                        place -= 1
                    keys[place] = key
                    tokens[node, place] = token
        for place in range(num_best):
            values[node, place] = logits[node, tokens[node, place]]
        if keys[0] >= _INFINITY or smallest < _MINUS_INFINITY or keys[0] <= _MINUS_INFINITY:
            tokens[node] = -1


@jit()
def _block_maxima(row: Int32, maxima: Int32) -> Any:
    """Fill the greatest key of every block of the row [V]; returns the smallest key of all."""
    vocab = row.shape[0]
    num_whole = vocab // _BLOCK
    smallest = _FOLD
    for block in range(num_whole):
        part = row[block * _BLOCK : (block + 1) * _BLOCK]
        greatest = _LOWEST
        for place in range(_BLOCK):
            key = _key(part[place])
            greatest = max(greatest, key)
            smallest = min(smallest, key)
        maxima[block] = greatest
    if num_whole < maxima.shape[0]:
        greatest = _LOWEST
        for token in range(num_whole * _BLOCK, vocab):
            key = _key(row[token])
            greatest = max(greatest, key)
            smallest = min(smallest, key)
        maxima[num_whole] = greatest
    return smallest


@jit()
def _kth_best(maxima: Int32, best: Int32) -> Any:
    """The K-th greatest of `maxima`, or the lowest number if there are fewer; `best` [K] is scratch."""
    last = best.shape[0] - 1
    best[:] = _LOWEST
    for index in range(maxima.shape[0]):
        if maxima[index] > best[last]:
            place = last
            while place > 0 and best[place - 1] < maxima[index]:
                best[place] = best[place - 1]
                place -= 1
            best[place] = maxima[index]
    return best[last]


@jit()
def argmax_finite(bits: Int32) -> Any:
    """Argmax of a row of logits given by their bits [V], ties to the lowest token.

    Returns: -1 if the row holds NaN or plus infinity, or nothing finite.
    """
    greatest, smallest = _LOWEST, _FOLD
    for token in range(bits.shape[0]):
        key = _key(bits[token])
        greatest = max(greatest, key)
        smallest = min(smallest, key)
    if greatest >= _INFINITY or smallest < _MINUS_INFINITY or greatest <= _MINUS_INFINITY:
        return -1
    for token in range(bits.shape[0]):
        if _key(bits[token]) == greatest:
            return token
    return -1


@jit()
def choose_host(
    logits: Float32,
    bits: Int32,
    position: int,
    record: Any,
    lists: tuple[Int32, Int32, Float64],
    seen: tuple[Int32, Bool],
    z: Float64,
) -> Any:
    """The target's token for one place.

    Args: logits [V] and their bits [V]; record a ROW_RECORD; lists = stop ids, bias tokens, bias values of the row;
    seen = answer counts [V] and prompt membership [V]; z [V] float64 scratch.
    Returns: the token, or -1 if the logits are not finite.
    """
    stops, bias_tokens, bias_values = lists
    counts, in_prompt = seen
    vocab = logits.shape[0]
    best = argmax_finite(bits)
    if best < 0:
        return -1
    for token in range(vocab):
        z[token] = logits[token]
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
    if record.has_penalties or record.num_biases > 0 or position < record.first_free:
        best = 0
        for token in range(1, vocab):
            if z[token] > z[best]:
                best = token
        if not math.isfinite(z[best]):
            return -1
    if record.temperature == 0.0:
        return best
    # The best one becomes 0: a tiny temperature then drives the others to minus infinity, and none to plus infinity.
    top = z[best]
    for token in range(vocab):
        z[token] = (z[token] - top) / record.temperature
    _truncate(z, record, best)
    return _noisy_argmax(z, record.seed, position, best)


@jit()
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


@jit()
def _keep_nucleus(z: Float64, top_p: float, best: int) -> None:
    """Keep the smallest set of best tokens whose mass reaches top_p; ties go to the lowest token.

    Tokens fall into buckets a quarter of a nat wide below the best one. Whole buckets are kept until the mass is
    nearly there; only the bucket in which it is reached gets sorted.
    """
    vocab = z.shape[0]
    weights = _exp_below(z, z[best])
    wanted = top_p * weights.sum()
    masses = np.zeros(_NUM_BUCKETS)
    for token in range(vocab):
        masses[_bucket(z[best] - z[token])] += weights[token]
    last, before = 0, 0.0
    while last < _NUM_BUCKETS - 1 and before + masses[last] < wanted:
        before += masses[last]
        last += 1
    members = np.empty(vocab, np.int64)
    count = 0
    for token in range(vocab):
        bucket = _bucket(z[best] - z[token])
        if bucket == last:
            members[count] = token
            count += 1
        elif bucket > last:
            z[token] = -np.inf
    order = members[:count][np.argsort(-weights[members[:count]], kind="mergesort")]
    for token in order:
        if before >= wanted and token != best:
            z[token] = -np.inf
        before += weights[token]


@jit(inline="always")
def _bucket(gap: float) -> Any:
    """Bucket of a token `gap` nats below the best; the last one holds all that weigh nothing."""
    return int(min(max(gap * 4.0, 0.0), _NUM_BUCKETS - 1.0)) if gap == gap else _NUM_BUCKETS - 1  # NaN goes last


@jit()
def _exp_below(z: Float64, top: float) -> Any:
    """exp(z - top) of z <= top, [V], to the last bits of float64, in vector registers.

    x = k ln 2 + r with |r| <= ln 2 / 2; exp(r) by its Taylor series, 2 ** k by writing the exponent's bits.
    """
    size = z.shape[0]
    out, bits = np.empty(size), np.empty(size, np.int64)
    for index in range(size):
        x = max(z[index] - top, -700.0)
        k = math.floor(x * _PER_LN2 + 0.5)
        r = (x - k * _LN2_HIGH) - k * _LN2_LOW
        series = 1.0 / 6227020800.0
        series = series * r + 1.0 / 479001600.0
        series = series * r + 1.0 / 39916800.0
        series = series * r + 1.0 / 3628800.0
        series = series * r + 1.0 / 362880.0
        series = series * r + 1.0 / 40320.0
        series = series * r + 1.0 / 5040.0
        series = series * r + 1.0 / 720.0
        series = series * r + 1.0 / 120.0
        series = series * r + 1.0 / 24.0
        series = series * r + 1.0 / 6.0
        series = series * r + 0.5
        series = series * r + 1.0
        out[index] = series * r + 1.0
        bits[index] = (np.int64(k) + 1023) << 52
    scale = bits.view(np.float64)
    for index in range(size):
        out[index] *= scale[index]
    return out


@jit()
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
            lane = token - start
            word = words[0] if lane == 0 else words[1] if lane == 1 else words[2] if lane == 2 else words[3]
            # z + g > top needs u < 1 - exp(-exp(z - top)) < 2 ** -floor((top - z) / ln 2): most fail here, unlogged.
            gap = (top - z[token]) * _PER_LN2
            if gap >= 33.0 or (gap > 1.0 and word >> (np.uint64(32) - np.uint64(gap)) != 0):
                continue
            value = z[token] - math.log(-math.log1p(-(np.float64(word) + 0.5) * 2.0**-32))
            if value > top or (value == top and token < winner):
                winner, top = token, value
    return winner
