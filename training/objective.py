"""What training makes small: the surprise of the next tokens behind many places of an answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from drafters.head.frames import MAX_TEMPERATURE
from drafters.head.head import Head
from drafters.head.source import TargetEmbeddings
from training.dataset import TrainingBatch
from training.loss import is_spellable, next_log_weights, taught_losses, token_losses
from verifier.weights import SharedWeights

_CPU_SCORES, _GPU_SCORES = 2**20, 2**26
"""Scores [places, T, N + 1] that are held at once; more are taken in turns. On a CPU they stay in its caches so, which
makes the loss three times as quick; on a GPU they just have to fit."""
_GAMMA = 0.8
"""The k-th token behind a place weighs gamma^(k-1): it only matters when those before it were right."""
_END_WEIGHT = 0.05
"""Weight of the chance that the frames end before the next token. The tree never asks for it, but a head with a
previous-token bias that may let its frames run empty unlearns them."""


@dataclass(frozen=True, slots=True)
class Continuations:
    """What follows the M = B * A anchors of a batch, by place in the head's draft vocabulary."""

    roots: Tensor  # [M] int64, the token of the anchor itself, N for one that is not drafted
    labels: Tensor  # [M, U] int64, the tokens behind it
    is_label: Tensor  # [M, U] bool

    def __getitem__(self, index: Tensor) -> Continuations:
        return Continuations(self.roots[index], self.labels[index], self.is_label[index])


def continuations_of(head: Head, batch: TrainingBatch) -> Continuations:
    """The labels that the head can spell.

    A token that it cannot draft ends the label before it: no tree of its own comes past such a token, so what it
    would say behind it does not matter.
    """
    labels = head.places(batch.labels.flatten(0, 1))
    is_drafted = torch.cumprod((labels < head.shape.num_drafted).long(), 1).bool()
    labels = labels.clamp_max(head.shape.num_drafted - 1)  # something to look up where there is no label
    is_label = batch.is_label.flatten(0, 1) & is_drafted & is_spellable(labels, head.shape.num_slots)
    return Continuations(head.places(batch.tokens.gather(1, batch.anchors).flatten()), labels, is_label)


class Teacher:
    """The target's distributions at the labels of one batch. Owns the states that it computes them from.

    One sampled token says little of a distribution; the target's states and output embedding give all of it, for one
    product. Knowledge distillation: Hinton, Vinyals, Dean (arXiv 1503.02531).

    They are over the head's draft vocabulary alone, renormalised: what the target gives to other tokens no head can
    guess. Places where it did draw another token have no label, so in the mean over draws every place counts by the
    chance that the target stays within the draft vocabulary, and nothing is learned from the rest.
    """

    def __init__(self, head: Head, target: SharedWeights, batch: TrainingBatch) -> None:
        self._rows = head.rows(target.output_embedding)
        self._form = target.form.narrowed(head.draft_tokens) if head.shape.draft_vocab_size else target.form
        self._batch = batch
        self._heats = batch.temperatures.repeat_interleave(batch.anchors.shape[1])  # [B * A]
        self.is_sampled = self._heats > 0.0
        """[B * A] bool, whether each anchor's answer was: at temperature 0 only the favourite counts, the label."""

    @torch.no_grad()
    def chances(self, anchors: Tensor) -> Tensor:
        """Distributions [M, U, N] float32 at the labels of anchors [M] int64 of sampled answers, counted row by row."""
        states, places = self._batch.states, self._batch.anchors
        behind = torch.arange(1, self._batch.labels.shape[2] + 1, device=anchors.device)
        index = (places.flatten()[anchors, None] + behind).clamp_max(states.shape[1] - 1)
        taught = states[(anchors // places.shape[1])[:, None], index]
        logits = self._form.apply(functional.linear(taught.to(self._rows.dtype), self._rows))
        return torch.softmax(logits / self._heats[anchors, None, None], dim=-1)


def slot_states(head: Head, embeddings: TargetEmbeddings, batch: TrainingBatch) -> Tensor:
    """States [B, A, T, d] of the slots behind the anchors of a batch, as HeadSource would have them."""
    embedded = functional.embedding(batch.tokens, embeddings.input_embedding).to(batch.states.dtype)
    features = head.read(batch.states, embedded)
    context = head.context(features, batch.positions)
    index = batch.anchors[..., None].expand(-1, -1, features.shape[-1])
    places = torch.arange(batch.states.shape[1], device=batch.anchors.device)
    behind = batch.anchors[..., None] - places
    is_visible = (behind >= 0) & (behind < head.shape.window) & (places >= batch.starts[:, None, None])
    is_visible |= behind == 0
    positions = batch.positions.gather(1, batch.anchors)
    heat = batch.temperatures.clamp_max(MAX_TEMPERATURE)
    return head.slot_states(features.gather(1, index), positions, heat, context, is_visible)


def surprise(head: Head, target: SharedWeights, batch: TrainingBatch, autocast: torch.autocast) -> float:
    """Mean of -log q over the labels of a batch, in nats. Where gradients are on, those of the objective are added to
    the head's parameters: it weighs labels by their place, and a sampled answer's label is the target's whole
    distribution, not the one token that was drawn from it.

    The scores over the draft vocabulary are made for a part of the places at a time: they would not fit otherwise.
    """
    continued = continuations_of(head, batch)
    used = continued.is_label[:, 0].nonzero()[:, 0]
    weights = continued.is_label * _GAMMA ** torch.arange(continued.labels.shape[1], device=used.device)
    total = weights.sum().clamp_min(1.0)
    with autocast:
        slots = slot_states(head, target, batch).flatten(0, 1)
    leaf = slots.detach().requires_grad_(torch.is_grad_enabled())
    teacher, rows = Teacher(head, target, batch), head.rows(target.output_embedding)
    nats = torch.zeros((), dtype=torch.float64, device=used.device)
    for part in _parts(head, used, teacher.is_sampled):
        with autocast:
            scores = head.logits(leaf[part], rows)
        following, ends = following_scores(head, scores.float(), continued[part])
        plain = taught = token_losses(following, continued.labels[part])
        if leaf.requires_grad and bool(teacher.is_sampled[part[0]]):
            taught = taught_losses(following, teacher.chances(part))
        nats += (plain.detach() * continued.is_label[part]).sum()
        if leaf.requires_grad:
            objective = ((taught + _END_WEIGHT * ends) * weights[part]).sum() / total
            objective.backward()  # type: ignore[no-untyped-call]
    if leaf.requires_grad:
        slots.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return float(nats) / max(1, int(continued.is_label.sum()))


def _parts(head: Head, used: Tensor, is_sampled: Tensor) -> list[Tensor]:
    """Anchors `used` [M] in parts that fit, each of sampled answers alone or of greedy ones, as `is_sampled` says."""
    most = _CPU_SCORES if used.device.type == "cpu" else _GPU_SCORES
    size = max(1, most // (head.shape.num_slots * (head.shape.num_drafted + 1)))
    groups = (used[~is_sampled[used]], used[is_sampled[used]])
    return [part for group in groups if group.numel() for part in torch.split(group, size)]


def following_scores(head: Head, scores: Tensor, continued: Continuations) -> tuple[Tensor, Tensor]:
    """log q [M, U, N] up to a constant, of every token after each prefix of the labels; how far each prefix may be the
    end [M, U]: -log of the chance that the frames go on. From scores [M, T, N + 1].
    """
    following, end = next_log_weights(torch.log_softmax(scores, dim=-1), continued.labels)
    going_on = torch.logsumexp(following, dim=-1)
    ends = torch.logaddexp(going_on, end) - going_on
    if head.shape.bias_rank:
        previous = torch.cat([continued.roots[:, None], continued.labels[:, :-1]], dim=1)
        following = following + functional.linear(head.bias_from[previous], head.bias_to)
    return following, ends
