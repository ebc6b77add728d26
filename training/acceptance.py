"""How many tokens a step wins with a head, replayed on held-out answers: no target needed, its states are on record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from drafters.drafter import trees_of_frames
from drafters.head.head import Head
from drafters.head.source import TargetEmbeddings, bias_of
from training.answer_store import Record
from training.dataset import BatchSize, collate
from training.objective import slot_states
from verifier.tree import DraftTrees, walk


@torch.inference_mode()
def acceptance_length(head: Head, embeddings: TargetEmbeddings, records: Sequence[Record], max_nodes: int) -> float:
    """Mean tokens won per step on `records`, the target's own one included, with trees of `max_nodes` nodes.

    Trees are made without the target's noise: exact for greedy answers only. 0.0 when there is nothing to replay.
    """
    num_tokens = num_steps = 0
    for record in records:
        trees, place = _trees(head, embeddings, record, max_nodes), 0
        future = [*record.tokens[record.tokens.size - trees.num_rows :].tolist(), -1]  # no child carries -1: walks end
        while place < trees.num_rows:
            won, _ = walk(trees, place, lambda _, won, left=future[place:]: left[len(won)])  # type: ignore[misc]
            place += len(won)
            num_steps += 1
        num_tokens += trees.num_rows
    return num_tokens / max(1, num_steps)


def _trees(head: Head, embeddings: TargetEmbeddings, record: Record, max_nodes: int) -> DraftTrees:
    """A tree behind each answer token but the last. Circles count: they are not learned, but served."""
    batch = collate([record], BatchSize(anchors=1, labels=1), np.random.default_rng(0), is_hiding=False)
    end = record.states.shape[0] - 1
    begin = end + 1 - record.num_answer
    batch = replace(batch, anchors=torch.arange(begin, end)[None]).to(str(head.slots.device))
    scores = head.logits(slot_states(head, embeddings, batch)[0], head.rows(embeddings.output_embedding))
    guess = (head.draft_tokens.cpu().numpy()[None], torch.softmax(scores.float(), dim=-1).cpu().numpy())
    return trees_of_frames(batch.tokens[0, begin:end].cpu().numpy(), guess, bias_of(head), max_nodes)
