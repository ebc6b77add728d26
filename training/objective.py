"""What training makes small: the surprise of the next tokens behind many places of an answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from drafters.head.frames import MAX_TEMPERATURE
from drafters.head.head import Head
from drafters.head.source import TargetEmbeddings
from training.dataset import Batch
from training.loss import is_spellable, next_log_weights, taught_losses, token_losses
from training.teacher import Target, Teacher

_CPU_SCORES, _GPU_SCORES = 2**20, 2**26
"""Scores [places, T, N + 1] that are held at once; more are taken in turns. On a CPU they stay in its caches so, which
makes the loss three times as quick; on a GPU they just have to fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How the surprise of each token counts."""

    gamma: float = 0.8
    """The k-th token behind a place weighs gamma^(k-1): it only matters when those before it were right."""
    end_weight: float = 0.05
    """Weight of the chance that the frames end before the next token. The tree never asks for it, but a head with a
    previous-token bias that may let its frames run empty unlearns them."""
    is_taught: bool = True
    """Whether a sampled answer's label is the target's whole distribution, not the one token that was drawn from it."""


@dataclass(frozen=True, slots=True)
class Surprise:
    """Of one batch: the objective, and the plain mean of -log q over all its labels, in nats."""

    objective: float
    per_token: float


@dataclass(frozen=True, slots=True)
class Texts:
    """What follows the M = B * A anchors of a batch, by place in the head's draft vocabulary."""

    roots: Tensor  # [M] int64, the token of the anchor itself, N for one that is not drafted
    labels: Tensor  # [M, U] int64, the tokens behind it
    is_label: Tensor  # [M, U] bool

    def __getitem__(self, index: Tensor) -> Texts:
        return Texts(self.roots[index], self.labels[index], self.is_label[index])


def texts_of(head: Head, batch: Batch) -> Texts:
    """The labels that the head can spell.

    A token that it cannot draft ends the label before it: no tree of its own comes past such a token, so what it
    would say behind it does not matter.
    """
    num_slots = head.shape.num_slots
    labels = head.places(batch.labels[..., :num_slots].flatten(0, 1))
    is_drafted = torch.cumprod((labels < head.shape.num_drafted).long(), 1).bool()
    labels = labels.clamp_max(head.shape.num_drafted - 1)  # something to look up where there is no label
    is_label = batch.is_label[..., :num_slots].flatten(0, 1) & is_drafted & is_spellable(labels, num_slots)
    return Texts(head.places(batch.tokens.gather(1, batch.anchors).flatten()), labels, is_label)


def slot_states(head: Head, embeddings: TargetEmbeddings, batch: Batch) -> Tensor:
    """States [B, A, T, d] of the slots behind the anchors of a batch, as the head's runner would have them."""
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
    return head.frames(features.gather(1, index), positions, heat, context, is_visible)


def surprise(head: Head, target: Target, batch: Batch, objective: Objective, autocast: torch.autocast) -> Surprise:
    """The surprise of a batch. Where gradients are on, they are added to those of the head's parameters.

    The scores over the draft vocabulary are made for a part of the places at a time: they would not fit otherwise.
    """
    texts = texts_of(head, batch)
    used = texts.is_label[:, 0].nonzero()[:, 0]
    weights = texts.is_label * objective.gamma ** torch.arange(texts.labels.shape[1], device=used.device)
    total = weights.sum().clamp_min(1.0)
    with autocast:
        slots = slot_states(head, target, batch).flatten(0, 1)
    leaf = slots.detach().requires_grad_(torch.is_grad_enabled())
    teacher = Teacher(head, target, batch) if objective.is_taught and leaf.requires_grad else None
    rows = head.rows(target.output_embedding)
    sums = torch.zeros(2, dtype=torch.float64, device=used.device)
    for part, is_taught in _parts(head, used, None if teacher is None else teacher.is_sampled):
        with autocast:
            scores = head.logits(leaf[part], rows)
        following, ends = following_scores(head, scores.float(), texts[part])
        plain = token_losses(following, texts.labels[part])
        taught = taught_losses(following, teacher.chances(part)) if teacher is not None and is_taught else plain
        loss = ((taught + objective.end_weight * ends) * weights[part]).sum() / total
        if leaf.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        sums += torch.stack([loss.detach().double(), (plain.detach() * texts.is_label[part]).sum().double()])
    if leaf.requires_grad:
        slots.backward(leaf.grad)  # type: ignore[no-untyped-call]
    objective_sum, plain_sum = sums.tolist()
    return Surprise(objective_sum, plain_sum / max(1, int(texts.is_label.sum())))


def _parts(head: Head, used: Tensor, is_sampled: Tensor | None) -> list[tuple[Tensor, bool]]:
    """Anchors `used` [M] in parts that fit, and whether each is to be taught: those of sampled answers [B * A] are."""
    most = _CPU_SCORES if used.device.type == "cpu" else _GPU_SCORES
    size = max(1, most // (head.shape.num_slots * (head.shape.num_drafted + 1)))
    if is_sampled is None:
        return [(part, False) for part in torch.split(used, size)]
    groups = (used[~is_sampled[used]], False), (used[is_sampled[used]], True)
    return [(part, is_taught) for group, is_taught in groups if group.numel() for part in torch.split(group, size)]


def following_scores(head: Head, scores: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
    """log q [M, U, N] up to a constant, of every token after each prefix of the labels; how far each prefix may be the
    end [M, U]: -log of the chance that the frames go on. From scores [M, T, N + 1].
    """
    following, end = next_log_weights(torch.log_softmax(scores, dim=-1), texts.labels)
    going_on = torch.logsumexp(following, dim=-1)
    ends = torch.logaddexp(going_on, end) - going_on
    if head.shape.bias_rank:
        previous = torch.cat([texts.roots[:, None], texts.labels[:, :-1]], dim=1)
        following = following + functional.linear(head.bias_from[previous], head.bias_to)
    return following, ends
