"""How many tokens a step wins with a head, replayed on held-out answers: no target needed, its states are on record."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from drafters.drafter import trees_of_frames
from drafters.head.head import Head
from drafters.head.source import TargetEmbeddings, bias_of
from training.answer_store import Record
from training.dataset import BatchSize, collate
from training.objective import slot_states
from verifier.tree import walk

_MAX_SCORES = 2**25
_MAX_PLACES = 256
"""Places of an answer that are guessed from at a time."""


@torch.inference_mode()
def acceptance_length(head: Head, embeddings: TargetEmbeddings, records: Sequence[Record], max_nodes: int) -> float:
    """Mean tokens won per step on `records`, the target's own one included, with trees of `max_nodes` nodes.

    Trees are made without the target's noise: exact for greedy answers only. 0.0 when there is nothing to replay.
    """
    num_tokens = num_steps = 0
    for record in records:
        lengths = _accepted(head, embeddings, record, max_nodes)
        place = 0
        while place < lengths.size:
            won = min(int(lengths[place]) + 1, lengths.size - place)
            place += won
            num_tokens += won
            num_steps += 1
    return num_tokens / max(1, num_steps)


def _accepted(head: Head, embeddings: TargetEmbeddings, record: Record, max_nodes: int) -> NDArray[np.int64]:
    """How many guesses would be accepted behind each answer token but the last."""
    num_answer = min(record.num_answer, record.states.shape[0])
    answer = record.tokens[record.tokens.size - num_answer :].astype(np.int64)
    probabilities = _frames(head, embeddings, record, num_answer - 1)
    count = num_answer - 1
    guess = (head.draft_tokens.cpu().numpy()[None], probabilities)
    trees = trees_of_frames(answer[:-1], guess, bias_of(head), max_nodes)
    accepted = np.zeros(count, np.int64)
    for place in range(count):
        future = [*answer[place + 1 :].tolist(), -1]  # no child carries -1: the walk ends with the answer
        accepted[place] = len(walk(trees, place, lambda _, won, future=future: future[len(won)])[1])  # type: ignore[misc]
    return accepted


def _frames(head: Head, embeddings: TargetEmbeddings, record: Record, count: int) -> NDArray[np.float32]:
    """Probabilities [count, T, N + 1] behind the first `count` answer tokens."""
    device = str(head.slots.device)
    batch = collate([record], BatchSize(rows=1, anchors=count, labels=1), np.random.default_rng(0), is_hiding=False)
    slots = slot_states(head, embeddings, batch.to(device))[0]
    rows = head.rows(embeddings.output_embedding)
    size = max(1, min(_MAX_PLACES, _MAX_SCORES // (head.shape.num_slots * (head.shape.num_drafted + 1))))
    parts = [torch.softmax(head.logits(part, rows).float(), dim=-1).cpu() for part in torch.split(slots, size)]
    return torch.cat(parts).numpy()
