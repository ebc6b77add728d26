"""Log-probabilities of known tokens: how likely the target finds each token of a prompt."""

from __future__ import annotations

import torch

from verifier.plan import StepPlan
from verifier.verdict import TokenLogprobs

_SLICE = 32
"""Places whose log-probabilities are made at once: in float64 they take eight bytes for each word of the vocabulary."""


def score_chunks(logits: torch.Tensor, plan: StepPlan) -> dict[int, list[TokenLogprobs]]:
    """Raw log-probabilities of the tokens that the plan's chunks ask for, by index of the chunk.

    Args: `logits` [S, V] of the places of all targets, chunk by chunk.
    """
    found: dict[int, list[TokenLogprobs]] = {}
    start = 0
    for index, chunk in enumerate(plan.chunks):
        stop = start + len(chunk.targets)
        if stop > start:
            found[index] = []
            for first in range(start, stop, _SLICE):
                last = min(first + _SLICE, stop)
                wanted = chunk.targets[first - start : last - start]
                found[index] += _score(logits[first:last], wanted, chunk.num_alternatives)
        start = stop
    return found


def _score(logits: torch.Tensor, targets: tuple[int, ...], num_alternatives: int) -> list[TokenLogprobs]:
    """Of places [n, V] and their n targets."""
    raw = torch.log_softmax(logits.double(), dim=-1)
    ids = torch.tensor(targets, device=raw.device)[:, None]
    own = raw.gather(1, ids)
    ranks = ((raw > own).sum(dim=-1) + 1).tolist()
    values, tokens = raw.topk(min(num_alternatives, raw.shape[1]), dim=-1)
    best = [tuple(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]
    return [TokenLogprobs(*one) for one in zip(own[:, 0].tolist(), best, ranks, strict=True)]
