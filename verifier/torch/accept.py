"""Tokens are chosen and trees walked in torch, level by level: the portable way, and the oracle of all others."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.accept import Path, Walks, walk_levels
from verifier.rows import SamplingRows
from verifier.torch.sampling import choose

Candidates = tuple[NDArray[np.int32], NDArray[np.float32]]
"""The best tokens at each node [N, C], the best first, and their raw logits."""


class Walker(Protocol):
    """Reads logits: which tokens the target chooses, and which came close."""

    def accept(self, logits: torch.Tensor, walks: Walks, best: NDArray[np.int32] | None) -> Path:
        """Walk all trees over logits [K, V] float32. `best` [n <= K] is the argmax of the first n nodes, if known."""

    def candidates(self, logits: torch.Tensor, count: int) -> Candidates:
        """The `count` best tokens of logits [N, V] float32."""


class TorchWalker:
    """Walks on any device."""

    def __init__(self, state: SamplingRows) -> None:
        self._state = state

    def accept(self, logits: torch.Tensor, walks: Walks, best: NDArray[np.int32] | None) -> Path:
        """See Walker."""
        return accept_device(logits, walks, self._state)

    def candidates(self, logits: torch.Tensor, count: int) -> Candidates:
        """See Walker."""
        best = logits.topk(count, dim=-1)
        return best.indices.int().cpu().numpy(), best.values.cpu().numpy()


def accept_device(logits: torch.Tensor, walks: Walks, state: SamplingRows) -> Path:
    """Walk all trees level by level, over logits [K, V] on any device."""
    path = Path.make(walks)
    walk_levels(logits, walks, state, (choose, path, list(range(walks.rows.shape[0]))))
    return path
