"""What one step proved: the tokens each row won, and what drafters may learn from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Raw model log-probability of one token, won or of a prompt, with the best alternatives (descending)."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int = 0
    """Of a prompt's token: 1 is the likeliest."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """The target's final hidden states of one step, as its output embedding reads them.

    The first rows of `states` belong to the tree nodes, in packed order. Chunk c of the plan has
    states[chunk_starts[c] : chunk_starts[c + 1]], those of its last positions, in order; chunk_starts[0] may lie behind
    the last node. Valid until the next step runs, which may write over them.
    """

    states: torch.Tensor  # [K, H] on the model's device, in its dtype
    chunk_starts: Int32  # [C + 1]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one step, on the host.

    S counts rows that won tokens: the trees of the plan in order, then the rows of its last chunks in
    order. Row s won tokens[s, : num_accepted[s] + 1]: accepted guesses, then one of the target's own.
    """

    rows: Int32  # [S]
    tokens: Int64  # [S, D + 1]
    num_accepted: Int32  # [S]
    nodes: Int32  # [S, D] accepted nodes, as indices within the row's tree
    failed: tuple[int, ...] = ()
    """Rows whose logits were not finite: they fail alone. Their tokens mean nothing."""
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By index s, one entry per won token, for rows that asked."""
    candidates: Int32 | None = None  # [N, K] the target's best tokens at every tree node, best first
    candidate_logits: Float32 | None = None  # [N, K] their raw logits
    hidden: Hidden | None = None
    """If it was asked for and can be had."""
    forward_s: float = 0.0
    """Seconds spent in the model's forward pass."""
    scores: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By index of the plan's chunk, one entry for each of its targets."""
