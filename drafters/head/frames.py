"""From frames to trees, compiled: exact best-first search over prefix probabilities, a whole batch in one call.

The same numbers as tests.collapse, on the candidates that matter. Forward variables are plain probabilities in
float64: a handful of frames is multiplied, far from underflow.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.base import Float32, Int32, Int64, Source
from drafters.compiled import Index, compiled, inlined
from drafters.ngram.search import best_candidate, couple
from verifier.plan import MAX_TREE_NODES

Float64 = NDArray[np.float64]

Guess = tuple[Int64, Float32]
"""What the head says of R rows: the tokens it was asked about [R, C], or [1, C] for all rows alike, a token possibly
more than once, and their probabilities by frame with those of the blank last [R, T, C + 1]."""
Frames = tuple[Int64, Float32, Float32, Int64]
"""One row's guess: candidate tokens [C], their probabilities by frame [T, C], those of the blank [T], and [1] how many
candidates there are."""
Paths = tuple[Float64, Float64, Float64, Int64]
"""By node, probability of the paths that spell its prefix and end in a blank [nodes, T + 1], or in its last token
[nodes, T + 1], before each frame; weights [C] of the candidates; the candidate that is each node's last token [nodes],
-1 for one that no frame knows."""
Bias = tuple[Float32, Float32]
"""Previous-token bias: [V, rank] by the token before and by the token itself; rank 0 for none."""
Offers = tuple[Int64, Float64, Int64, Float64, Int64]
"""By node: candidates that it keeps [nodes, WIDTH], their chances [nodes, WIDTH] and number [nodes]; score of the best
one that is not in the tree yet [nodes], -1 for none, and which it is [nodes]."""
Scratch = tuple[Frames, Paths, Offers, Int64, Int64]
"""Working memory of one tree; then marks [V + 1], all -1, and names [WIDTH]."""
Batch = tuple[Int64, Int64, NDArray[np.uint64], Float64, NDArray[np.bool_], Float64]
"""By row: last token, number of tokens, seed and temperature [rows]; whether a token ends the answer [rows, V]; power
and reach of each slot's estimate where it is coupled [rows, T, 2]."""
Model = tuple[Bias, Float64]
"""Bias, and the limits."""
Packed = tuple[Int64, Int32, Int32, Int64, Float32, NDArray[np.int8], Int32]
"""tokens, parents, depths, ancestors, scores, sources, row_starts of DraftTrees."""

MAX_CANDIDATES = 256
WIDTH = 48
"""Most candidates that one node keeps."""
MAX_DEPTH, MIN_SCORE, CUT, SHARE, MAX_HEAT, IS_INDEPENDENT = range(6)
"""Columns of the limits: deepest node, lowest score of a node, CUT: scores below CUT / max_nodes are not worth a look,
the share of a frame that makes a token a candidate, the temperature above which frames know of none, and whether frame
k simply guesses token k (a head that was trained so)."""

NO_GUESS: Guess = (np.zeros((1, 0), np.int64), np.zeros((0, 1, 1), np.float32))
"""What is said of no rows."""
_SOURCE = int(Source.CTC)
_NOISE_REACH = 0.05
"""At temperature > 0 noise lifts what is unlikely: so much less is worth a look."""


def make_scratch(num_slots: int, vocab_size: int) -> Scratch:
    """Working memory of one tree, allocated once."""
    frames = (
        np.zeros(MAX_CANDIDATES, np.int64),
        np.zeros((num_slots, MAX_CANDIDATES), np.float32),
        np.zeros(num_slots, np.float32),
        np.zeros(1, np.int64),
    )
    paths = (
        np.zeros((MAX_TREE_NODES, num_slots + 1)),
        np.zeros((MAX_TREE_NODES, num_slots + 1)),
        np.zeros(MAX_CANDIDATES),
        np.full(MAX_TREE_NODES, -1, np.int64),
    )
    offers = (
        np.zeros((MAX_TREE_NODES, WIDTH), np.int64),
        np.zeros((MAX_TREE_NODES, WIDTH)),
        np.zeros(MAX_TREE_NODES, np.int64),
        np.zeros(MAX_TREE_NODES),
        np.zeros(MAX_TREE_NODES, np.int64),
    )
    return frames, paths, offers, np.full(vocab_size + 1, -1, np.int64), np.zeros(WIDTH, np.int64)


@compiled
def choose(index: Index, guess: Guess, share: float, marks: Int64, frames: Frames) -> None:
    """Put the candidates of row `index` into `frames`: what has more than `share` of what some frame gives to tokens.

    Args: `marks` [V + 1], all -1 before and after. The share is raised until the candidates fit.
    """
    names, probabilities = guess[0][min(index, guess[0].shape[0] - 1)], guess[1][index]
    tokens, chances, blanks, count = frames
    num_frames, blank = probabilities.shape[0], probabilities.shape[1] - 1
    size = MAX_CANDIDATES + 1
    while size > MAX_CANDIDATES:
        size = 0
        for step in range(num_frames):
            floor = np.float32(share * max(0.0, 1.0 - np.float64(probabilities[step, blank])))
            for place in range(blank):
                if probabilities[step, place] > floor and marks[names[place]] < 0:
                    if size < MAX_CANDIDATES:
                        marks[names[place]] = size
                        tokens[size] = names[place]
                        for frame in range(num_frames):
                            chances[frame, size] = probabilities[frame, place]
                    size += 1
                    if size > MAX_CANDIDATES:
                        break
            if size > MAX_CANDIDATES:
                break
        for candidate in range(min(size, MAX_CANDIDATES)):
            marks[tokens[candidate]] = -1
        share *= 1.2  # a larger step leaves nothing of a flat frame
    count[0] = size
    for step in range(num_frames):
        blanks[step] = probabilities[step, blank]


@compiled
def begin(frames: Frames, paths: Paths) -> None:
    """The empty prefix, at node 0."""
    ended, spelt, _, lasts = paths
    blanks = frames[2]
    ended[0, 0] = 1.0
    spelt[0, :] = 0.0
    for step in range(blanks.size):
        ended[0, step + 1] = ended[0, step] * np.float64(blanks[step])
    lasts[0] = -1


@compiled
def extend(node: Index, parent: Index, choice: Index, frames: Frames, paths: Paths) -> None:
    """The prefix of `node`: that of `parent` and the candidate `choice`; -1 for a token that no frame knows."""
    chances, blanks = frames[1], frames[2]
    ended, spelt, _, lasts = paths
    lasts[node] = choice
    ended[node, 0] = spelt[node, 0] = 0.0
    is_repeat = choice >= 0 and choice == lasts[parent]
    for step in range(blanks.size):
        entry = ended[parent, step] if is_repeat else ended[parent, step] + spelt[parent, step]
        chance = np.float64(chances[step, choice]) if choice >= 0 else 0.0
        ended[node, step + 1] = np.float64(blanks[step]) * (ended[node, step] + spelt[node, step])
        spelt[node, step + 1] = chance * (spelt[node, step] + entry)


@compiled
def weigh(node: Index, frames: Frames, paths: Paths) -> None:
    """Prefix probabilities psi(y v) of all candidates v after the prefix y of `node`, into the weights."""
    chances, blanks, size = frames[1], frames[2], frames[3][0]
    ended, spelt, weights, lasts = paths
    for index in range(size):
        weights[index] = 0.0
    for step in range(blanks.size):
        before = ended[node, step] + spelt[node, step]
        if before > 0.0:
            for index in range(size):
                weights[index] += before * np.float64(chances[step, index])
    last = lasts[node]
    if last >= 0:  # a repeat comes through a blank only
        weights[last] = 0.0
        for step in range(blanks.size):
            weights[last] += ended[node, step] * np.float64(chances[step, last])


@compiled
def take_frame(depth: Index, frames: Frames, paths: Paths) -> None:
    """What frame `depth` alone says, into the weights: for heads whose frames are independent guesses."""
    for index in range(frames[3][0]):
        paths[2][index] = np.float64(frames[1][depth, index])


@compiled
def lean(previous: Index, frames: Frames, bias: Bias, weights: Float64) -> bool:
    """Multiply the weights by exp(bias) after the token `previous`, and normalise them: q(v | prefix).

    Returns whether anything had weight.
    """
    before, after = bias
    tokens, size, rank = frames[0], frames[3][0], before.shape[1]
    total = 0.0
    for index in range(size):
        if rank:
            score = np.float32(0.0)
            for place in range(rank):
                score += before[previous, place] * after[tokens[index], place]
            weights[index] *= math.exp(np.float64(score))
        total += weights[index]
    if total > 0.0:
        for index in range(size):
            weights[index] /= total
    return total > 0.0


@inlined
def _offer(node: Index, score: float, offers: Offers) -> None:
    """Remember the best candidate of a node that is not in the tree yet."""
    choice = best_candidate(offers[1][node], offers[2][node])
    offers[4][node] = choice
    offers[3][node] = score * offers[1][node, choice] if choice >= 0 else -1.0


@compiled
def fitting_floor(weights: Float64, size: Index, floor: Any, room: Index) -> Any:
    """`floor`, or the least weight, by halving, that no more than `room` of the first `size` weights reach."""
    low, high = floor, 1.0
    for turn in range(40):
        middle = low if turn == 0 else 0.5 * (low + high)
        count = 0
        for index in range(size):
            count += 1 if weights[index] >= middle else 0
        if count <= room:
            if turn == 0:
                return low
            high = middle
        else:
            low = middle
    return high


@compiled
def _keep(node: Index, floor: float, frames: Frames, weights: Float64, offers: Offers) -> Index:
    """Keep the candidates that weigh at least `floor`, which is raised until they fit. Returns how many."""
    floor = fitting_floor(weights, frames[3][0], floor, np.int64(WIDTH))
    kept = np.int64(0)
    for index in range(frames[3][0]):
        if weights[index] >= floor and kept < WIDTH:
            offers[0][node, kept] = index
            offers[1][node, kept] = weights[index]
            kept += 1
    return kept


@compiled
def _open(
    node: Index, place: tuple[Index, Index, float], row: Index, batch: Batch, model: Model, scratch: Scratch
) -> None:
    """Find what may follow a node. `place`: its depth, its token, and the least chance that deserves a look."""
    bias, limits = model
    frames, paths, offers, _, names = scratch
    depth, token, floor = place
    if limits[IS_INDEPENDENT] > 0.0:
        take_frame(depth, frames, paths)
    else:
        weigh(node, frames, paths)
    weights = paths[2]
    lean(token, frames, bias, weights)
    temperature = batch[3][row]
    if temperature > 0.0:
        floor *= _NOISE_REACH
    kept = _keep(node, floor, frames, weights, offers)
    for index in range(kept):
        names[index] = frames[0][offers[0][node, index]]
    offers[2][node] = kept
    if temperature > 0.0:
        heat = temperature / min(temperature, limits[MAX_HEAT])
        draw, factors = (batch[2][row], batch[1][row] + depth), batch[5][row, depth]
        couple(names[:kept], offers[1][node, :kept], draw, heat, factors[0], factors[1])


@compiled
def _grow(row: Index, most: Index, start: Index, batch: Batch, model: Model, out: Packed, scratch: Scratch) -> Index:
    """One tree at packed index `start`, from the frames in the scratch. Returns its size."""
    tokens, parents, depths, ancestors, scores, sources, _ = out
    frames, paths, offers, _, _ = scratch
    limits = model[1]
    tokens[start], parents[start], depths[start], ancestors[start] = batch[0][row], -1, 0, 1
    scores[start], sources[start] = 1.0, 0
    begin(frames, paths)
    floor = max(limits[MIN_SCORE], limits[CUT] / most)
    size: Index = np.int64(1)
    while size < most:
        newest, at = size - 1, start + size - 1
        offers[3][newest] = -1.0
        is_last = newest > 0 and batch[4][row, tokens[at]]  # nothing is won behind the end of an answer
        if depths[at] < limits[MAX_DEPTH] and not is_last:
            place = (np.int64(depths[at]), tokens[at], floor / scores[at])
            _open(newest, place, row, batch, model, scratch)
            _offer(newest, np.float64(scores[at]), offers)
        parent: Index = np.int64(0)
        for node in range(1, size):
            if offers[3][node] > offers[3][parent]:
                parent = np.int64(node)
        score, choice = offers[3][parent], offers[4][parent]
        if score <= 0.0 or score < limits[MIN_SCORE]:
            break
        at, above = start + size, start + parent
        candidate = offers[0][parent, choice]
        tokens[at], parents[at], depths[at] = frames[0][candidate], parent, depths[above] + 1
        ancestors[at] = ancestors[above] | (np.int64(1) << np.int64(size))
        scores[at], sources[at] = score, _SOURCE
        extend(size, parent, candidate, frames, paths)
        offers[1][parent, choice] = 0.0
        _offer(parent, np.float64(scores[above]), offers)
        size += 1
    return size


@compiled
def best_first(
    rows: Int32, max_nodes: Int32, first: Index, guess: Guess, batch: Batch, model: Model, out: Packed,
    scratch: Scratch,
) -> None:  # fmt: skip
    """One tree per row, written as trees first, first + 1, ... of `out`.

    Args: `rows`, `max_nodes` [R]; `guess` of those of these rows that may have more than one node, in order; `model` is
    (bias, limits).
    """
    row_starts = out[6]
    place: Index = np.int64(0)
    for index in range(rows.size):
        start = np.int64(row_starts[first + index])
        most = np.int64(min(max_nodes[index], MAX_TREE_NODES))
        if most > 1:
            choose(place, guess, model[1][SHARE], scratch[3], scratch[0])
            place += 1
        size = _grow(np.int64(rows[index]), most, start, batch, model, out, scratch)
        row_starts[first + index + 1] = start + size
