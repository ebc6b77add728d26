"""What training makes small: the surprise of the next tokens behind many places of an answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from drafters.head.head import Head
from drafters.head.runner import MAX_HEAT, TargetEmbeddings
from training.dataset import Batch
from training.loss import is_spellable, next_log_weights, taught_losses, token_losses
from training.teacher import Lesson, Target, Teacher

_CPU_SCORES, _GPU_SCORES = 2**20, 2**26
"""Scores [places, T, V + 1] that are held at once; more are taken in turns. On a CPU they stay in its caches so, which
makes the loss three times as quick; on a GPU they just have to fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How the surprise of each token counts."""

    is_independent: bool = False
    """Frame k guesses token k by itself, the blank unused: the heads of Medusa (arXiv 2401.10774) on this trunk."""
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
    heat = batch.temperatures.clamp_max(MAX_HEAT)
    return head.frames(features.gather(1, index), positions, heat, context, is_visible)


def surprise(head: Head, target: Target, batch: Batch, objective: Objective, autocast: torch.autocast) -> Surprise:
    """The surprise of a batch. Where gradients are on, they are added to those of the head's parameters.

    The scores over the vocabulary are made for a part of the places at a time: they would not fit otherwise.
    """
    labels = batch.labels[..., : head.shape.num_slots].flatten(0, 1)  # [B * A, U]
    is_label = batch.is_label[..., : head.shape.num_slots].flatten(0, 1)
    if not objective.is_independent:
        is_label = is_label & is_spellable(labels, head.shape.num_slots)
    used = is_label[:, 0].nonzero()[:, 0]
    weights = is_label * objective.gamma ** torch.arange(labels.shape[1], device=labels.device)
    total = weights.sum().clamp_min(1.0)
    with autocast:
        slots = slot_states(head, target, batch).flatten(0, 1)[used]
    leaf = slots.detach().requires_grad_(torch.is_grad_enabled())
    roots = batch.tokens.gather(1, batch.anchors).flatten()
    teacher = Teacher(target, batch, labels.shape[1]) if objective.is_taught and leaf.requires_grad else None
    most = _CPU_SCORES if labels.device.type == "cpu" else _GPU_SCORES
    size = max(1, most // (head.shape.num_slots * (head.shape.vocab_size + 1)))
    sums = torch.zeros(2, dtype=torch.float64, device=labels.device)
    for first in range(0, used.numel(), size):
        part = used[first : first + size]
        with autocast:
            scores = head.logits(leaf[first : first + size], target.output_embedding)
        lesson = None if teacher is None else teacher.lesson(part)
        losses, plain = _losses(head, scores.float(), (roots[part], labels[part]), lesson, objective)
        loss = (losses * weights[part]).sum() / total
        if leaf.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        sums += torch.stack([loss.detach().double(), (plain.detach() * is_label[part]).sum().double()])
    if leaf.requires_grad:
        slots.backward(leaf.grad)  # type: ignore[no-untyped-call]
    objective_sum, plain_sum = sums.tolist()
    return Surprise(objective_sum, plain_sum / max(1, int(is_label.sum())))


def _losses(
    head: Head, scores: Tensor, texts: tuple[Tensor, Tensor], lesson: Lesson | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """What each label [N, U] adds to the objective, and its -log q, from scores [N, T, V + 1].

    `texts`: the token of the place [N] and the labels behind it.
    """
    following, ends = following_scores(head, scores, texts, is_independent=objective.is_independent)
    plain = token_losses(following, texts[1])
    taught = plain if lesson is None else taught_losses(following, plain, lesson.chances, lesson.is_sampled)
    return taught + objective.end_weight * ends, plain


def following_scores(
    head: Head, scores: Tensor, texts: tuple[Tensor, Tensor], *, is_independent: bool
) -> tuple[Tensor, Tensor]:
    """log q [N, U, V] up to a constant, of every token after each prefix of the labels; how far each prefix may be the
    end [N, U]: -log of the chance that the frames go on. From scores [N, T, V + 1].

    `texts`: the token of the place [N] and the labels behind it [N, U].
    """
    roots, labels = texts
    if is_independent:
        following = scores[:, : labels.shape[1], :-1]
        ends = torch.zeros_like(following[..., 0])
    else:
        following, end = next_log_weights(torch.log_softmax(scores, dim=-1), labels)
        going_on = torch.logsumexp(following, dim=-1)
        ends = torch.logaddexp(going_on, end) - going_on
    if head.shape.bias_rank:
        previous = torch.cat([roots[:, None], labels[:, :-1]], dim=1)
        following = following + functional.linear(head.bias_from[previous], head.bias_to)
    return following, ends
