"""From a head's frames to next-token probabilities, compiled: exact CTC prefix probabilities at the nodes of a tree.

One symbol per frame is an alignment; adjacent repeats merged, then blanks dropped, it spells a string (Graves et al.,
2006). psi(y), the probability of all alignments whose string begins with y, comes from a forward pass over the frames
per prefix; q(v | y) is psi(y v) over its sum, times a previous-token bias. The oracle is tests/collapse.py. Forward
variables are plain probabilities in float64: a handful of frames is multiplied, far from underflow.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters import HEAD
from drafters.base import Float32, Int64
from drafters.candidates import ROOM, place_of
from drafters.compiled import Index, compiled
from drafters.rows import MAX_FRAMES
from verifier.plan import MAX_TREE_NODES

Guess = tuple[Int64, Float32]
"""What the head says of R rows: the tokens it was asked about [R, C], or [1, C] for all rows alike, a token possibly
more than once, and their probabilities by frame with those of the blank last [R, T, C + 1]."""

NO_GUESS: Guess = (np.zeros((1, 0), np.int64), np.zeros((0, 1, 1), np.float32))
"""What is said of no rows."""

PER_FRAME = 16
"""Best tokens of each frame that are looked at: the target's token is among a good head's first 16 in 99.5 % of cases,
and the pair scores (bias, n-gram) choose between them."""
MAX_CHOSEN = PER_FRAME * MAX_FRAMES
MAX_TEMPERATURE = 1.0
"""Highest temperature that a head is trained for; above it the frames are those of this one."""

FRAMES = np.dtype(
    [
        ("num_frames", np.int64),
        ("num_tokens", np.int64),
        ("tokens", np.int64, (MAX_CHOSEN,)),
        ("shares", np.float32, (MAX_FRAMES, MAX_CHOSEN)),  # probability of each token, by frame
        ("blanks", np.float32, (MAX_FRAMES,)),
        ("weights", np.float64, (MAX_CHOSEN,)),  # of the tokens behind the open node
        # By node: alignments that spell its prefix before each frame and end in a blank, or in its last token.
        ("ended", np.float64, (MAX_TREE_NODES, MAX_FRAMES + 1)),
        ("spelt", np.float64, (MAX_TREE_NODES, MAX_FRAMES + 1)),
        ("lasts", np.int64, (MAX_TREE_NODES,)),  # place of the node's token among `tokens`, -1 for none
        ("best", np.int64, (PER_FRAME,)),  # working memory
    ]
)


@compiled
def _best_of(names: Int64, frame: Float32, best: Int64) -> Index:
    """Places of the PER_FRAME most probable tokens of one frame [C + 1], best first. Returns how many there are."""
    count: Index = np.int64(0)
    for place in range(names.size):
        share = frame[place]
        if share <= np.float32(0.0) or (count == PER_FRAME and share <= frame[best[count - 1]]):
            continue
        is_new = True
        for index in range(count):  # of a large vocabulary a token comes once for every frame that has it
            is_new = is_new and names[best[index]] != names[place]
        if not is_new:
            continue
        at = count if count < PER_FRAME else count - 1
        count = at + 1
        while at > 0 and frame[best[at - 1]] < share:
            best[at] = best[at - 1]
            at -= 1
        best[at] = place
    return count


@compiled
def choose(index: Index, guess_names: Int64, guess_shares: Float32, frames: Any, marks: Int64) -> None:
    """Put the best tokens of each frame of row `index` into `frames`. `marks` [V], all -1 before and after."""
    names, shares = guess_names[min(index, guess_names.shape[0] - 1)], guess_shares[index]
    frames.num_frames = min(shares.shape[0], MAX_FRAMES)
    size: Index = np.int64(0)
    for step in range(frames.num_frames):
        frames.blanks[step] = shares[step, names.size]
        for rank in range(_best_of(names, shares[step], frames.best)):
            place = frames.best[rank]
            token = names[place]
            if token < marks.size and marks[token] < 0:
                marks[token] = size
                frames.tokens[size] = token
                for frame in range(frames.num_frames):
                    frames.shares[frame, size] = shares[frame, place]
                size += 1
    for candidate in range(size):
        marks[frames.tokens[candidate]] = -1
    frames.num_tokens = size
    frames.ended[0, 0], frames.lasts[0] = 1.0, -1  # the empty prefix, at node 0
    for step in range(frames.num_frames):
        frames.ended[0, step + 1] = frames.ended[0, step] * np.float64(frames.blanks[step])
    frames.spelt[0, :] = 0.0


@compiled
def extend(node: Index, parent: Index, choice: Index, frames: Any) -> None:
    """The prefix of `node`: that of `parent` and the token `choice`; -1 for a token that no frame knows."""
    frames.lasts[node] = choice
    frames.ended[node, 0] = frames.spelt[node, 0] = 0.0
    is_repeat = choice >= 0 and choice == frames.lasts[parent]
    for step in range(frames.num_frames):
        entry = frames.ended[parent, step]
        if not is_repeat:
            entry += frames.spelt[parent, step]
        share = np.float64(frames.shares[step, choice]) if choice >= 0 else 0.0
        before = frames.ended[node, step] + frames.spelt[node, step]
        frames.ended[node, step + 1] = np.float64(frames.blanks[step]) * before
        frames.spelt[node, step + 1] = share * (frames.spelt[node, step] + entry)


@compiled
def weigh(node: Index, frames: Any) -> None:
    """Prefix probabilities psi(y v) of all chosen tokens v after the prefix y of `node`, into the weights."""
    weights, size = frames.weights, frames.num_tokens
    weights[:size] = 0.0
    for step in range(frames.num_frames):
        before = frames.ended[node, step] + frames.spelt[node, step]
        if before > 0.0:
            for index in range(size):
                weights[index] += before * np.float64(frames.shares[step, index])
    last = frames.lasts[node]
    if last >= 0:  # a repeat comes through a blank only
        weights[last] = 0.0
        for step in range(frames.num_frames):
            weights[last] += frames.ended[node, step] * np.float64(frames.shares[step, last])


@compiled
def lean(previous: Index, frames: Any, before: Float32, after: Float32) -> bool:
    """Multiply the weights by exp(bias) after the token `previous`, and normalise them: q(v | prefix).

    Args: `before`, `after` [V, rank], whose products are the bias; rank 0 for none. Returns: whether anything had
    weight.
    """
    weights, size, rank = frames.weights, frames.num_tokens, before.shape[1]
    total = 0.0
    for index in range(size):
        score = np.float32(0.0)
        for place in range(rank):
            score += before[previous, place] * after[frames.tokens[index], place]
        weights[index] *= math.exp(np.float64(score))
        total += weights[index]
    if total > 0.0:
        for index in range(size):
            weights[index] /= total
    return total > 0.0


@compiled
def _fitting_floor(weights: NDArray[np.float64], floor: Any, room: Index) -> Any:
    """`floor`, or the least weight, by halving, that no more than `room` of the weights reach."""
    low, high, middle = floor, 1.0, floor
    for turn in range(40):
        count = 0
        for index in range(weights.size):
            count += 1 if weights[index] >= middle else 0
        if count > room:
            low = middle
        elif turn == 0:
            return floor
        else:
            high = middle
        middle = 0.5 * (low + high)
    return high


@compiled
def score_frames(
    node: Index, token: Index, floor: Any, frames: Any, bias: tuple[Float32, Float32], found: Any, marks: Int64
) -> bool:
    """The head names candidates of `node`, which carries `token`, and says what it thinks of the others.

    Returns whether it thinks anything: behind its last frame, and behind a token that no frame knows, it does not.
    """
    weigh(node, frames)
    if not lean(token, frames, bias[0], bias[1]):
        return False
    weights, size = frames.weights, frames.num_tokens
    floor = _fitting_floor(weights[:size], floor, ROOM - found.sizes[node])
    for index in range(size):
        token = frames.tokens[index]
        if weights[index] >= floor or marks[token] >= 0:
            place = place_of(node, token, np.int64(ROOM), found, marks)
            if place >= 0:
                found.head_shares[node, place] = weights[index]
                found.spellings[node, place] = index
                found.cells[node, place] |= HEAD
    return True
