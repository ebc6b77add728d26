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
    count = record.num_answer - 1
    answer = record.tokens[record.tokens.size - record.num_answer :].astype(np.int64)
    size = BatchSize(rows=1, anchors=count, labels=1)
    batch = collate([record], size, np.random.default_rng(0), is_hiding=False).to(str(head.slots.device))
    scores = head.logits(slot_states(head, embeddings, batch)[0], head.rows(embeddings.output_embedding))
    guess = (head.draft_tokens.cpu().numpy()[None], torch.softmax(scores.float(), dim=-1).cpu().numpy())
    trees = trees_of_frames(answer[:-1], guess, bias_of(head), max_nodes)
    accepted = np.zeros(count, np.int64)
    for place in range(count):
        future = [*answer[place + 1 :].tolist(), -1]  # no child carries -1: the walk ends with the answer
        accepted[place] = len(walk(trees, place, lambda _, won, future=future: future[len(won)])[1])  # type: ignore[misc]
    return accepted
