"""What the target itself says where a head is to guess: its whole distribution, from the states that are on record.

One sampled token says little of a distribution; the target's states and output embedding give all of it, at every
place behind an anchor, for one product. Knowledge distillation: Hinton, Vinyals, Dean (arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from drafters.head.head import Head
from drafters.head.source import TargetEmbeddings
from training.answer_store import Record
from training.dataset import Batch

_LEAST_AGREEMENT = 0.98
"""Part of the greedy tokens that the recorded states must explain; the rest is what rounding to float16 may flip."""
_MOST_DRIFT = 0.05
"""Nats by which sampled tokens may surprise more or less than their distributions say, beside four standard errors."""


class Form(Protocol):
    """What a target does with the product of output embedding and state."""

    def apply(self, product: Tensor) -> Tensor:
        """Logits [..., V] float32 from the product [..., V]."""

    def narrowed(self, tokens: Tensor) -> Form:
        """The same for the logits of `tokens` [N] int64 alone."""


class Target(TargetEmbeddings, Protocol):
    """What of a target its head shares, and what the head is taught by."""

    @property
    def form(self) -> Form:
        """From product to logits."""


class Teacher:
    """The target's distributions at the labels of one batch. Owns the states that it computes them from.

    They are over the head's draft vocabulary alone, renormalised: what the target gives to other tokens no head can
    guess. Places where it did draw another token have no label, so in the mean over draws every place counts by the
    chance that the target stays within the draft vocabulary, and nothing is learned from the rest.
    """

    def __init__(self, head: Head, target: Target, batch: Batch) -> None:
        self._rows = head.rows(target.output_embedding)
        self._form = target.form.narrowed(head.draft_tokens) if head.shape.draft_vocab_size else target.form
        self._num_labels = min(head.shape.num_slots, batch.labels.shape[2])
        self._places = batch.anchors.flatten()  # [B * A]
        self._states = batch.states
        self._heats = batch.temperatures.repeat_interleave(batch.anchors.shape[1])  # [B * A]
        self.is_sampled = self._heats > 0.0
        """[B * A] bool, whether each anchor's answer was: at temperature 0 only the favourite counts, the label."""

    @torch.no_grad()
    def chances(self, anchors: Tensor) -> Tensor:
        """Distributions [M, U, N] float32 at the labels of anchors [M] int64 of sampled answers, counted row by row."""
        behind = torch.arange(1, self._num_labels + 1, device=anchors.device)
        places = (self._places[anchors, None] + behind).clamp_max(self._states.shape[1] - 1)
        num_anchors = self._places.numel() // self._states.shape[0]
        states = self._states[(anchors // num_anchors)[:, None], places]
        logits = self._form.apply(functional.linear(states.to(self._rows.dtype), self._rows))
        return torch.softmax(logits / self._heats[anchors, None, None], dim=-1)


def target_logits(target: Target, states: Tensor) -> Tensor:
    """The target's own logits [..., V] float32 from its final hidden states [..., H]."""
    weight = target.output_embedding
    return target.form.apply(functional.linear(states.to(weight.device, weight.dtype), weight))


@torch.no_grad()
def explains(target: Target, records: Sequence[Record]) -> bool:
    """Whether the recorded states give the answers, so that they can be trusted as a teacher.

    A family may do something with its logits that nobody told us of. Another order of tokens shows in greedy answers,
    which are not the favourites then; another scale in sampled ones, which surprise more or less than their own
    distributions say (mean of -log p against mean entropy). True also where there is no answer to hold against it.
    """
    num_same = num_greedy = 0
    surplus: list[NDArray[np.float64]] = []
    for record in records:
        count = min(record.num_answer, record.states.shape[0])
        states = torch.from_numpy(record.states[record.states.shape[0] - count :].astype(np.float32))
        tokens = torch.from_numpy(record.tokens[record.tokens.size - count :].astype(np.int64))
        logits = target_logits(target, states).cpu()
        if record.temperature == 0.0:
            num_same += int((logits.argmax(-1) == tokens).sum())
            num_greedy += count
            continue
        log_p = torch.log_softmax(logits.double() / record.temperature, dim=-1)
        entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)
        surplus.append((-log_p.gather(1, tokens[:, None])[:, 0] - entropy).numpy())
    drift = np.concatenate(surplus) if surplus else np.zeros(1)
    allowed = _MOST_DRIFT + 4.0 * float(drift.std()) / drift.size**0.5
    return num_same >= _LEAST_AGREEMENT * num_greedy and abs(float(drift.mean())) <= allowed
