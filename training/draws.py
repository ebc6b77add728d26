"""What a head thinks before the target draws, and the coupling that explains such draws best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from drafters.coupling import LEAST_FACTOR, MOST_FACTOR, UNFITTED, Coupling
from drafters.head.head import Head
from training.answer_store import Record
from training.dataset import BatchSize, collate
from training.objective import Teacher, continuations_of, following_scores, slot_states
from verifier.weights import SharedWeights

_CANDIDATES = 128
"""Best standings of a place that take part in the fit."""
_LEAST_PLACES = 50
_LEAST_CHANCE = 1e-12


@dataclass(frozen=True, slots=True)
class Draws:
    """What a head thought before draws of the target: N places with U labels at one temperature."""

    temperature: float
    log_q: Tensor  # [N, U, D] over the draft vocabulary
    log_p: Tensor  # [N, U, D] the target's distribution over it, at its temperature
    is_label: Tensor  # [N, U] bool


@torch.no_grad()
def draws_of(
    head: Head, target: SharedWeights, records: Iterable[Record], size: BatchSize, autocast: torch.autocast
) -> Iterator[Draws]:
    """What a head thinks at some places of sampled answers, and the target's distributions there."""
    stream = np.random.default_rng(0)
    rows = head.rows(target.output_embedding)
    for record in records:
        batch = collate([record], size, stream, is_hiding=False).to(str(head.slots.device))
        continued = continuations_of(head, batch)
        used = continued.is_label[:, 0].nonzero()[:, 0]
        with autocast:
            scores = head.logits(slot_states(head, target, batch)[0][used], rows).float()
        following, _ = following_scores(head, scores, continued[used])
        log_p = Teacher(head, target, batch).chances(used).clamp_min(_LEAST_CHANCE).log()
        yield Draws(record.temperature, torch.log_softmax(following, dim=-1), log_p, continued.is_label[used])


def fit(num_slots: int, draws: Iterable[Draws]) -> Coupling:
    """The factors that explain fresh draws of the target best; those of slots with too few places stay unfitted.

    The noise is drawn here: what counts is how q and p stand to each other, not which noise an answer had.
    """
    stream = torch.Generator().manual_seed(0)
    kept: dict[float, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for part in draws:
        noise = -torch.log(torch.empty(part.log_p.shape).exponential_(generator=stream)).to(part.log_p.device)
        winner = (part.log_p + noise).argmax(-1, keepdim=True)  # [N, U, 1]
        count = min(_CANDIDATES, part.log_q.shape[-1])
        best = (part.log_q + noise).topk(count, dim=-1).indices
        index = torch.cat([winner, best], dim=-1)
        is_twice = functional.pad(best == winner, (1, 0))
        features = torch.stack([part.log_q.gather(-1, index), noise.gather(-1, index)], dim=-1)
        kept.setdefault(round(part.temperature, 4), []).append((features.cpu(), is_twice.cpu(), part.is_label.cpu()))
    if not kept:
        return Coupling.unfitted(num_slots)
    factors = np.full((len(kept), num_slots, 2), UNFITTED)
    for place, (_, parts) in enumerate(sorted(kept.items())):
        features, is_twice, is_label = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        for slot in range(num_slots):
            if int(is_label[:, slot].sum()) >= _LEAST_PLACES:
                used = is_label[:, slot]
                factors[place, slot] = _fit_slot(features[used, slot], is_twice[used, slot])
    return Coupling(tuple(sorted(kept)), factors)


def _fit_slot(features: Tensor, is_twice: Tensor) -> tuple[float, float]:
    """Power and reach of one slot from [N, C, 2] log q and noise of candidates, the winner first."""
    features = features.clamp_min(-50.0)
    factors = torch.full((2,), UNFITTED, requires_grad=True)
    optimizer = torch.optim.LBFGS([factors], max_iter=40, line_search_fn="strong_wolfe")
    truth = torch.zeros(features.shape[0], dtype=torch.int64)

    def loss() -> float:
        optimizer.zero_grad()
        standings = (features @ factors).masked_fill(is_twice, float("-inf"))
        value = functional.cross_entropy(standings, truth)
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    power, reach = factors.detach().nan_to_num(UNFITTED).clamp(LEAST_FACTOR, MOST_FACTOR).tolist()
    return round(power, 4), round(reach, 4)
