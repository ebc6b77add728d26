"""From shards to training batches; which batch comes in which step is a pure function of seed and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.answer_store import AnswerStore, Record, ShardError, StoredShard

Int64 = NDArray[np.int64]

HELD_OUT_SHARE = 0.02
_LOOP = 8
"""Where the last 8 tokens stand earlier in the text, the answer is going round in circles, as greedy answers of small
models do. Nothing is learned there: a copy of what followed guesses that better than any head."""
_HIDE_SHARE = 0.5
"""So many rows of a batch see only a part of the prompt: in service its states may be missing too."""
_ORDER, _CHOICE, _HELD = 0, 1, 2  # what a random stream is for


@dataclass(frozen=True, slots=True)
class Batch:
    """B answers with A places each from which the head is to guess on. S counts states, U labels of a place."""

    states: Tensor  # [B, S, H] float32
    tokens: Tensor  # [B, S] int64, the token that followed each state
    positions: Tensor  # [B, S] int64, where that token stands
    anchors: Tensor  # [B, A] int64, index into S: the token to go on from
    labels: Tensor  # [B, A, U] int64, the tokens behind it
    is_label: Tensor  # [B, A, U] bool, false behind the end of the answer
    starts: Tensor  # [B] int64, index into S of the first state that may be seen
    temperatures: Tensor  # [B] float32

    def to(self, device: str) -> Batch:
        """The same on another device."""
        return Batch(*(getattr(self, name).to(device) for name in Batch.__slots__))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSize:
    """How much one batch holds."""

    rows: int = 16
    """Answers."""
    anchors: int = 24
    """Most places of an answer."""
    labels: int = 8
    """Tokens behind a place."""


class Dataset:
    """All answers of a store, split into training and held-out ones by the text that their prompts came from.

    Owns the open shards. Raises ShardError when there are too few answers for one batch of each kind.
    """

    def __init__(self, store: AnswerStore, size: BatchSize, seed: int) -> None:
        self._size, self._seed = size, seed
        self._shards: list[StoredShard] = []
        places: list[tuple[int, int]] = []
        documents: list[int] = []
        for number in store.done:
            shard = store.read(number)
            useful = np.flatnonzero(_usable(shard) >= 2).tolist()  # a place needs a token behind it
            places += [(len(self._shards), index) for index in useful]
            documents += shard.documents[useful].tolist()
            self._shards.append(shard)
        held = self._held_out(documents, size.rows)
        self._held = [place for place, document in zip(places, documents, strict=True) if document in held]
        self._places = [place for place, document in zip(places, documents, strict=True) if document not in held]
        if len(self._held) < size.rows or len(self._places) < size.rows:
            raise ShardError(
                f"{len(places)} usable answers are too few: a batch of {size.rows} to train on and one to hold out, of "
                "other texts, are needed; give more --data, ask for more --answers, or lower --batch"
            )
        self._order: tuple[int, Int64] = (-1, np.zeros(0, np.int64))

    @property
    def num_training(self) -> int:
        """Answers that are trained on."""
        return len(self._places)

    @property
    def num_held_out(self) -> int:
        """Answers that are not."""
        return len(self._held)

    def token_counts(self, vocab_size: int) -> Int64:
        """How often each token stands in the answers that are trained on, [V]."""
        counts = np.zeros(vocab_size, np.int64)
        for place in self._places:
            shard = self._shards[place[0]]
            counts += np.bincount(shard.answer(place[1]), minlength=vocab_size)
        return counts

    def batch(self, step: int) -> Batch:
        """The batch of a training step."""
        first = step * self._size.rows
        records = [self._training(first + index) for index in range(self._size.rows)]
        return collate(records, self._size, np.random.default_rng([self._seed, _CHOICE, step]), is_hiding=True)

    def held_out(self, most: int) -> list[Record]:
        """Some answers that are not trained on, always the same ones, at most `most`."""
        chosen = np.random.default_rng([self._seed, _HELD]).permutation(len(self._held))[:most]
        return [self._record(self._held[index]) for index in chosen.tolist()]

    def _training(self, turn: int) -> Record:
        """The answer whose turn it is: every epoch has an order of its own."""
        epoch, index = divmod(turn, len(self._places))
        if self._order[0] != epoch:
            stream = np.random.default_rng([self._seed, _ORDER, epoch])
            self._order = (epoch, stream.permutation(len(self._places)))
        return self._record(self._places[int(self._order[1][index])])

    def _record(self, place: tuple[int, int]) -> Record:
        return self._shards[place[0]].record(place[1])

    def _held_out(self, documents: Sequence[int], least: int) -> set[int]:
        """Texts of which nothing is trained on: a share of the answers, at least `least` of them."""
        names, counts = np.unique(np.array(documents, np.int64), return_counts=True)
        order = np.random.default_rng([self._seed, _HELD]).permutation(names.size)
        wanted = max(least, math.ceil(HELD_OUT_SHARE * len(documents)))
        num_held = int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1
        return set(names[order[:num_held]].tolist())


def collate(records: Sequence[Record], size: BatchSize, stream: np.random.Generator, *, is_hiding: bool) -> Batch:
    """A batch from answers; `is_hiding` leaves some rows only a part of their prompt."""
    rows, num_states = len(records), max(record.states.shape[0] for record in records)
    states = np.zeros((rows, num_states, records[0].states.shape[1]), np.float32)
    tokens = np.zeros((rows, num_states + size.labels), np.int64)
    anchors = np.zeros((rows, size.anchors), np.int64)
    is_place = np.zeros((rows, size.anchors), np.bool_)
    starts = np.zeros(rows, np.int64)
    lengths = np.array([record.states.shape[0] for record in records])
    for row, record in enumerate(records):
        length = lengths[row]
        states[row, :length] = record.states
        tokens[row, :length] = record.tokens[1:]
        num_answer = min(record.num_answer, int(length))
        first = length - num_answer  # state that predicted the answer's first token
        places = first + np.flatnonzero(~is_looping(record.tokens)[first + 1 : -1])
        chosen = np.sort(stream.permutation(places)[: size.anchors])
        anchors[row, : chosen.size] = chosen
        is_place[row, : chosen.size] = True
        if is_hiding and stream.random() < _HIDE_SHARE:
            starts[row] = stream.integers(0, max(1, first))
    behind = anchors[..., None] + 1 + np.arange(size.labels)
    is_label = is_place[..., None] & (behind < lengths[:, None, None])
    labels = np.take_along_axis(tokens[:, None], behind, axis=2)
    firsts = np.array([record.first for record in records], np.int64)
    positions = firsts[:, None] + 1 + np.arange(num_states)
    temperatures = np.array([record.temperature for record in records], np.float32)
    arrays = (states, tokens[:, :num_states], positions, anchors, labels, is_label, starts, temperatures)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def is_looping(tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether each token [n] ends a span of 8 that stood earlier in the text."""
    found = np.zeros(tokens.size, np.bool_)
    if tokens.size > _LOOP:
        spans = np.lib.stride_tricks.sliding_window_view(tokens, _LOOP)
        _, firsts, which = np.unique(spans, axis=0, return_index=True, return_inverse=True)
        found[_LOOP - 1 :] = firsts[which.ravel()] < np.arange(spans.shape[0])
    return found


def draft_tokens(counts: Int64, size: int) -> Int64:
    """The `size` most frequent tokens by `counts` [V], in the order of their ids; of equals the lower ids."""
    return np.sort(np.argsort(-counts, kind="stable")[:size])


def _usable(shard: StoredShard) -> Int64:
    """Answer tokens of each record that have the state before them."""
    usable: Int64 = np.minimum(shard.num_answers, np.diff(shard.starts))
    return usable
