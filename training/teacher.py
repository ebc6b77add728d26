"""What the target itself says where a head is to guess: its whole distribution, from the states that are on record.

One sampled token says little of a distribution; the target's states and output embedding give all of it, at every
place behind an anchor, for one product. Knowledge distillation: Hinton, Vinyals, Dean (arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from drafters.head.runner import TargetEmbeddings
from training.dataset import Batch
from training.shards import Record

_LEAST_AGREEMENT = 0.98
"""Part of the greedy tokens that the recorded states must explain; the rest is what rounding to float16 may flip."""
_MOST_DRIFT = 0.05
"""Nats by which sampled tokens may surprise more or less than their distributions say, beside four standard errors."""


class Form(Protocol):
    """What a target does with the product of output embedding and state."""

    def apply(self, product: Tensor) -> Tensor:
        """Logits [..., V] float32 from the product [..., V]."""


class Target(TargetEmbeddings, Protocol):
    """What of a target its head shares, and what the head is taught by."""

    @property
    def form(self) -> Form:
        """From product to logits."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the target says at N places, each with U labels behind it."""

    chances: Tensor  # [N, U, V] float32, at the temperature of the answer
    is_sampled: Tensor  # [N] bool: at temperature 0 only the favourite counts, and that is the label


class Teacher:
    """The target's distributions at the labels of one batch. Owns the states that it computes them from."""

    def __init__(self, target: Target, batch: Batch, num_labels: int) -> None:
        self._target = target
        behind = torch.arange(1, num_labels + 1, device=batch.anchors.device)
        places = (batch.anchors[..., None] + behind).clamp_max(batch.states.shape[1] - 1).flatten(1)  # [B, A * U]
        states = batch.states.gather(1, places[..., None].expand(-1, -1, batch.states.shape[-1]))
        self._states = states.view(-1, num_labels, states.shape[-1])  # [B * A, U, H]
        self._heats = batch.temperatures[:, None].expand(batch.anchors.shape).flatten()  # [B * A]

    @torch.no_grad()
    def lesson(self, places: Tensor) -> Lesson:
        """The distributions at places [N] int64 of the batch's anchors, counted row by row."""
        heats = self._heats[places]
        is_sampled = heats > 0.0
        heats = torch.where(is_sampled, heats, 1.0)[:, None, None]
        return Lesson(torch.softmax(target_logits(self._target, self._states[places]) / heats, dim=-1), is_sampled)


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
