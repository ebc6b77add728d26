"""What T frames say about strings: exact CTC prefix probabilities, in log space. The oracle of drafters.head.frames.

A frame is a distribution over the vocabulary and a blank. One symbol per frame makes an alignment; adjacent repeats
merged, then blanks dropped, leaves its string (Graves et al., 2006). Frames are independent given the alignment, so the
probability of a string, and of everything that begins with it, is a sum over alignments that a forward pass over the
frames computes exactly. A token that truly repeats ("00") needs a blank between its frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prefix:
    """A string y, with the log-probability of spelling exactly y in the first 0 .. T frames."""

    tokens: tuple[int, ...]
    ended: Float64  # [T + 1] alignments whose last symbol is a blank (or that are empty)
    spelt: Float64  # [T + 1] alignments whose last symbol is the last token of y


def empty(log_frames: Float64) -> Prefix:
    """The empty string. `log_frames` [T, V + 1] are log-probabilities, the blank last."""
    blanks = np.concatenate([[0.0], np.cumsum(log_frames[:, -1])])
    return Prefix((), blanks, np.full(blanks.size, -np.inf))


def extend(prefix: Prefix, token: int, log_frames: Float64) -> Prefix:
    """The string y v."""
    entry = _entry(prefix, token)
    ended = np.full(entry.size, -np.inf)
    spelt = np.full(entry.size, -np.inf)
    for frame, row in enumerate(log_frames):
        ended[frame + 1] = row[-1] + np.logaddexp(ended[frame], spelt[frame])
        spelt[frame + 1] = row[token] + np.logaddexp(spelt[frame], entry[frame])
    return Prefix((*prefix.tokens, token), ended, spelt)


def log_end(prefix: Prefix) -> float:
    """log e(y): all frames together spell exactly y."""
    return float(np.logaddexp(prefix.ended[-1], prefix.spelt[-1]))


def log_next(prefix: Prefix, log_frames: Float64) -> Float64:
    """log psi(y v) [V]: all frames together spell something that begins with y v, for every token v."""
    either = np.logaddexp(prefix.ended, prefix.spelt)[:-1, None]
    weights: Float64 = np.logaddexp.reduce(either + log_frames[:, :-1], axis=0)
    if prefix.tokens:
        last = prefix.tokens[-1]
        weights[last] = np.logaddexp.reduce(prefix.ended[:-1] + log_frames[:, last])
    return weights


def log_psi(prefix: Prefix, log_frames: Float64) -> float:
    """log psi(y): all frames together spell something that begins with y."""
    return float(np.logaddexp(log_end(prefix), np.logaddexp.reduce(log_next(prefix, log_frames))))


def log_q(prefix: Prefix, log_frames: Float64, bias: Float64 | None = None) -> Float64:
    """log q(v | y) [V]: the next token after y, given that there is one; all -inf when there can be none.

    `bias` [V] is added to log psi(y v) before normalising: the previous-token term of a head, with q a distribution.
    """
    weights = log_next(prefix, log_frames)
    if bias is not None:
        weights = weights + bias
    total = np.logaddexp.reduce(weights)
    normal: Float64 = weights - total if total > -np.inf else weights
    return normal


def best_first(
    log_frames: Float64, max_nodes: int, *, root: int = -1, bias: Float64 | None = None
) -> list[tuple[tuple[int, ...], float]]:
    """The `max_nodes` - 1 likeliest strings with their log-probabilities, each after its own prefix.

    A string is worth the product of q over its tokens, which is psi freed of the chance that the frames end early: the
    text goes on, whatever the frames say. `bias` [V, V] holds the term of each previous token (that of `root` first).
    """

    def scored(prefix: Prefix) -> Float64:
        previous = prefix.tokens[-1] if prefix.tokens else root
        return log_q(prefix, log_frames, None if bias is None else bias[previous])

    found: list[tuple[tuple[int, ...], float]] = []
    frontier: list[tuple[float, tuple[int, ...], Prefix]] = []

    def offer(prefix: Prefix, score: float) -> None:
        if len(prefix.tokens) < log_frames.shape[0]:
            for token, value in enumerate(scored(prefix).tolist()):
                if value > -np.inf:
                    heappush(frontier, (-(score + value), (*prefix.tokens, token), prefix))

    offer(empty(log_frames), 0.0)
    while frontier and len(found) < max_nodes - 1:
        negative, tokens, parent = heappop(frontier)
        found.append((tokens, -negative))
        offer(extend(parent, tokens[-1], log_frames), -negative)
    return found


def _entry(prefix: Prefix, token: int) -> Float64:
    """Alignments from which the next frame may begin `token`: after a repeat of it, only those that end in a blank."""
    if prefix.tokens and prefix.tokens[-1] == token:
        return prefix.ended
    return np.logaddexp(prefix.ended, prefix.spelt)
