"""From shards to training batches; which batch comes in which step is a pure function of seed and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.errors import StartupError
from training.answer_store import AnswerStore, Record

Int64 = NDArray[np.int64]

HELD_OUT_SHARE = 0.02
_LOOP = 8
"""Where the last 8 tokens stand earlier in the text, the answer is going round in circles, as greedy answers of small
models do. Nothing is learned there: a copy of what followed guesses that better than any head."""
_HIDE_SHARE = 0.5
"""So many rows of a batch see only a part of the prompt: in service its states may be missing too."""
_ORDER, _CHOICE, _HELD = 0, 1, 2  # what a random stream is for


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """B answers with A places each from which the head is to guess on. S counts states, U labels of a place."""

    states: Tensor  # [B, S, H] float32
    tokens: Tensor  # [B, S] int64, the token that followed each state
    positions: Tensor  # [B, S] int64, where that token stands
    anchors: Tensor  # [B, A] int64, index into S: the token to go on from
    labels: Tensor  # [B, A, U] int64, the tokens behind it
    is_label: Tensor  # [B, A, U] bool, false behind the end of the answer
    starts: Tensor  # [B] int64, index into S of the first state that may be seen
    temperatures: Tensor  # [B] float32

    def to(self, device: str) -> TrainingBatch:
        """The same on another device."""
        return TrainingBatch(*(getattr(self, name).to(device) for name in TrainingBatch.__slots__))


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

    `num_training`, `num_held_out`: how many there are of each. Raises StartupError when there are too few answers for
    one batch of each kind.
    """

    def __init__(self, store: AnswerStore, size: BatchSize, seed: int) -> None:
        self._size, self._seed, self._shards = size, seed, store.shards
        self._orders: dict[int, Int64] = {}  # of the answers trained on, by epoch: the last one asked for
        places: list[tuple[int, int]] = []
        documents: list[int] = []
        for number, shard in sorted(store.shards.items()):
            useful = np.flatnonzero(shard.num_answers >= 2).tolist()  # a place needs a token behind it
            places += [(number, index) for index in useful]
            documents += shard.documents[useful].tolist()
        # Texts of which nothing is trained on: a share of the answers, one batch at least.
        names, counts = np.unique(np.array(documents, np.int64), return_counts=True)
        order = np.random.default_rng([seed, _HELD]).permutation(names.size)
        wanted = max(size.rows, math.ceil(HELD_OUT_SHARE * len(documents)))
        held = set(names[order[: int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1]].tolist())
        self._held = [place for place, document in zip(places, documents, strict=True) if document in held]
        self._places = [place for place, document in zip(places, documents, strict=True) if document not in held]
        self.num_training, self.num_held_out = len(self._places), len(self._held)
        if min(self.num_training, self.num_held_out) < size.rows:
            raise StartupError(
                f"{len(places)} usable answers are too few: {size.rows} to train on and {size.rows} to hold out, of "
                "other texts, are needed; give more --data, ask for more --answers, or lower --batch"
            )

    def draft_tokens(self, vocab_size: int, size: int) -> Int64:
        """The `size` most frequent tokens of the answers that are trained on, ascending; of equals the lower ids."""
        counts = np.zeros(vocab_size, np.int64)
        for shard, index in self._places:
            counts += np.bincount(self._shards[shard].answer(index), minlength=vocab_size)
        return np.sort(np.argsort(-counts, kind="stable")[:size])

    def batch(self, step: int) -> TrainingBatch:
        """The batch of a training step."""
        records = []
        for turn in range(step * self._size.rows, (step + 1) * self._size.rows):
            epoch, index = divmod(turn, len(self._places))
            if epoch not in self._orders:
                stream = np.random.default_rng([self._seed, _ORDER, epoch])
                self._orders = {epoch: stream.permutation(len(self._places))}
            records.append(self._record(self._places[int(self._orders[epoch][index])]))
        return collate(records, self._size, np.random.default_rng([self._seed, _CHOICE, step]), is_hiding=True)

    def held_out(self, most: int) -> list[Record]:
        """Some answers that are not trained on, always the same ones, at most `most`."""
        chosen = np.random.default_rng([self._seed, _HELD]).permutation(len(self._held))[:most]
        return [self._record(self._held[index]) for index in chosen.tolist()]

    def _record(self, place: tuple[int, int]) -> Record:
        return self._shards[place[0]].record(place[1])


def collate(
    records: Sequence[Record], size: BatchSize, stream: np.random.Generator, *, is_hiding: bool
) -> TrainingBatch:
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
        first = length - record.num_answer  # state that predicted the answer's first token
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
    return TrainingBatch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def is_looping(tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether each token [n] ends a span of 8 that stood earlier in the text."""
    found = np.zeros(tokens.size, np.bool_)
    if tokens.size > _LOOP:
        spans = np.lib.stride_tricks.sliding_window_view(tokens, _LOOP)
        _, firsts, which = np.unique(spans, axis=0, return_index=True, return_inverse=True)
        found[_LOOP - 1 :] = firsts[which.ravel()] < np.arange(spans.shape[0])
    return found
