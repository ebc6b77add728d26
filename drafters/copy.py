"""The copy source: where did the row's last tokens stand before, and what followed?

Text that quotes, repeats or edits comes in long spans that stand in the text already (prompt look-up decoding, Saxena,
2023; SuffixDecoding, arXiv 2411.04975). Hash chains as in LZ77 coders (Ziv and Lempel, 1977): each pair of neighbouring
tokens leads to its most recent place, each place to the one before it with the same key. Reading a token costs O(1), a
look-up a bounded walk. A row holds two texts: the request's prediction, if there is one, then prompt and answer. A
match in either says what may follow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from drafters.base import Int32, Int64, RowContext
from drafters.compiled import Index, Records, compiled, inlined
from drafters.rows import PROMPT_WINDOW

FACTS = np.dtype(
    [
        ("begin", np.int64),  # where the text starts; 0: no prediction
        ("length", np.int64),  # where it stops
        ("pointer", np.int64),  # where the prediction is thought to go on, -1 for nowhere
        ("misses", np.int64),  # how many tokens in a row were not what it said
    ]
)


class Texts(NamedTuple):
    """By row. `tokens` holds prediction, SEPARATOR, text; no separator without a prediction.

    A place is indexed under the pair of tokens that ends there, so what followed starts one place later.
    """

    tokens: Int32  # [rows, capacity]
    links: Int32  # [rows, capacity] the place before it whose key is the same, -1 for none
    buckets: Int32  # [rows, BUCKETS] the most recent place by key
    facts: Records  # [rows] of type FACTS


SEPARATOR = -1
"""Equal to no token: no match reaches over it."""
BUCKETS = 8192
WALK = 32
"""Most places of a chain that are looked at."""
LONGEST = 32
"""Matches are measured up to this many tokens."""
MAX_MATCHES = WALK + 1
"""Size of the arrays given to `match`."""
MAX_MISSES = 8
"""A prediction that was wrong this often in a row is waited for no more, until a match leads back into it."""

MAX_TEXT = 32_768
"""A longer text may be cut to the last half of this: whenever the arrays would have to grow for it."""
MAX_PREDICTION = 32_768
"""First tokens of a prediction that are looked at."""
_SMALLEST = 1024
_SURE = 4


class CopySource:
    """Texts of all rows. Owns their arrays, which grow as texts do; a row is cleared when it stops."""

    def __init__(self, max_rows: int) -> None:
        facts, buckets = np.array([(0, 0, -1, 0)] * max_rows, FACTS), np.full((max_rows, BUCKETS), -1, np.int32)
        tokens, links = np.zeros((2, max_rows, _SMALLEST), np.int32)
        self.texts = Texts(tokens, links, buckets, facts)

    def start(self, row: int, context: RowContext) -> None:
        """Take the prediction and what is known of the text."""
        known, num_prompt = context.tokens, context.num_prompt
        prediction = np.asarray(context.prediction[:MAX_PREDICTION], np.int64)
        self._load(row, prediction, np.asarray(known[max(0, num_prompt - PROMPT_WINDOW) : num_prompt], np.int64))
        if prediction.size:
            self.texts.facts["pointer"][row] = 0
        for first in range(num_prompt, len(known), MAX_TEXT // 4):
            piece = np.asarray(known[first : first + MAX_TEXT // 4], np.int64)
            self.make_room(piece.size)
            append(row, piece, self.texts)

    def make_room(self, count: int) -> None:
        """See that every row can take `count` more tokens, at most MAX_TEXT / 2."""
        facts = self.texts.facts
        if facts["length"].max() + count <= self.texts.tokens.shape[1]:
            return
        for row in np.flatnonzero(facts["length"] - facts["begin"] + count > MAX_TEXT).tolist():
            self._forget_half(row)
        self._widen(int(facts["length"].max()) + count)

    def stop(self, row: int) -> None:
        """Forget the row."""
        self.texts.buckets[row] = -1
        self.texts.facts[row] = (0, 0, -1, 0)

    def _load(self, row: int, prediction: Int64, text: Int64) -> None:
        """The row holds these two texts, and nobody knows where in the prediction it is."""
        self.stop(row)
        self._widen(prediction.size + 1 + text.size)
        if prediction.size:
            append(row, prediction, self.texts)
            append(row, np.array([SEPARATOR], np.int64), self.texts)
            self.texts.facts["begin"][row] = self.texts.facts["length"][row]
        append(row, text, self.texts)

    def _forget_half(self, row: int) -> None:
        tokens, (begin, length, pointer, misses) = self.texts.tokens[row], self.texts.facts[row].item()
        kept = tokens[length - MAX_TEXT // 2 : length].astype(np.int64)
        self._load(row, tokens[: max(0, begin - 1)].astype(np.int64), kept)
        self.texts.facts["pointer"][row], self.texts.facts["misses"][row] = pointer, misses

    def _widen(self, capacity: int) -> None:
        old = self.texts
        rows, width = old.tokens.shape
        if capacity <= width:
            return
        width = max(capacity, min(1 << (capacity - 1).bit_length(), MAX_PREDICTION + 1 + MAX_TEXT))
        used = int(old.facts["length"].max())
        tokens, links = np.zeros((2, rows, width), np.int32)  # pages that were never written take no memory
        tokens[:, :used], links[:, :used] = old.tokens[:, :used], old.links[:, :used]
        self.texts = old._replace(tokens=tokens, links=links)


@inlined
def _bucket(before: Index, token: Index) -> Index:
    key = np.uint64(before + 1) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(token + 1) * np.uint64(0xC2B2AE3D27D4EB4F)
    return np.int64((key ^ (key >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(51))


@compiled
def append(row: Index, won: Int64, texts: Texts) -> None:
    """Tokens that became true in `row`, in order. There must be room for them: CopySource.make_room."""
    tokens, links, buckets, facts = texts.tokens, texts.links, texts.buckets, texts.facts[row]
    for index in range(won.size):
        token = won[index]
        place = facts.length
        tokens[row, place] = token
        links[row, place] = -1
        facts.length = place + 1
        if place > 0 and token >= 0 and tokens[row, place - 1] >= 0:
            bucket = _bucket(np.int64(tokens[row, place - 1]), np.int64(token))
            links[row, place] = buckets[row, bucket]
            buckets[row, bucket] = place
        pointer = facts.pointer
        if pointer >= 0:  # a wrong token is taken for one that stands in another's place
            facts.misses = 0 if tokens[row, pointer] == token else facts.misses + 1
            is_lost = pointer + 2 >= facts.begin or facts.misses > MAX_MISSES
            facts.pointer = -1 if is_lost else pointer + 1


@compiled
def _measure(row: Index, start: Index, tokens: Int32, length: Index) -> Index:
    """How many tokens before `start` equal the last ones of the row, up to LONGEST."""
    count: Index = np.int64(0)
    while (
        count < LONGEST and start - 1 - count >= 0 and tokens[row, start - 1 - count] == tokens[row, length - 1 - count]
    ):
        count += 1
    return count


@compiled
def match(row: Index, limit: Index, texts: Texts, starts: Int64, lengths: Int64) -> Index:
    """Find where the row's last tokens stood before. Returns how many guesses there are, at most `limit`.

    starts[i] is the place of a next token that can be guessed (see `guess`), lengths[i] how many tokens before it
    match, 2 to LONGEST; both arrays have MAX_MATCHES entries. Guesses with distinct next tokens come first, then
    others that may part later; among each the longest match first, then the most recent. Where the prediction is
    thought to go on is a guess too, with a match of any length, 0 included.
    """
    tokens, links, facts = texts.tokens, texts.links, texts.facts[row]
    length, pointer = facts.length, facts.pointer
    count: Index = np.int64(0)
    if pointer >= 0:
        starts[0] = pointer
        lengths[0] = _measure(row, pointer, tokens, length)
        count = np.int64(1)
    place: Index = np.int64(links[row, length - 1]) if length > 0 else np.int64(-1)
    for _ in range(WALK):
        if place < 0:
            break
        start = place + 1
        if tokens[row, start] >= 0 and start != pointer:
            found = _measure(row, start, tokens, length)
            if found >= 2:  # else another pair with the same key
                at = count
                while at > 0 and lengths[at - 1] < found:
                    starts[at] = starts[at - 1]
                    lengths[at] = lengths[at - 1]
                    at -= 1
                starts[at] = start
                lengths[at] = found
                count += 1
        place = np.int64(links[row, place])
    count = _distinct_first(row, count, limit, tokens, starts, lengths)
    # A match of two tokens may be chance: it finds the way back only for who has lost it.
    if count > 0 and starts[0] < facts.begin and lengths[0] >= (2 if pointer < 0 else _SURE):
        facts.pointer, facts.misses = starts[0], 0
    return count


@compiled
def _distinct_first(row: Index, count: Index, limit: Index, tokens: Int32, starts: Int64, lengths: Int64) -> Index:
    """Move the first guess of each next token to the front; the order stays otherwise. Returns how many are kept."""
    front: Index = np.int64(0)
    for index in range(count):
        if front == limit:
            break
        start, length = starts[index], lengths[index]
        is_new = True
        for other in range(front):
            if tokens[row, starts[other]] == tokens[row, start]:
                is_new = False
        if is_new:
            for at in range(index, front, -1):
                starts[at] = starts[at - 1]
                lengths[at] = lengths[at - 1]
            starts[front] = start
            lengths[front] = length
            front += 1
    return min(count, limit)


@compiled
def copied_token(row: Index, start: Index, offset: Index, texts: Texts) -> Index:
    """The token `offset` places behind `start`, as a guess; SEPARATOR where the prediction ends.

    What runs over the end of the text goes on in what it has just guessed: a text that repeats itself goes on so.
    """
    facts, place = texts.facts[row], start + offset
    begin, length = facts.begin, facts.length
    if start < begin:
        place = min(place, begin - 1)
    elif place >= length:
        place = start + offset % (length - start)
    return np.int64(texts.tokens[row, place])
