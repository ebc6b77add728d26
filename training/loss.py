"""What a head is trained for: the probability of the target's next tokens under its frames.

The CTC objective here is autoregressive over exact prefix probabilities (tests.collapse has the formulas): each
of the next U tokens is scored by q(token | tokens before it), which is what the tree is built from. The published
objective scores the whole collapsed string at once and so spends frames on saying where the string ends.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_NEVER = -1e4
"""Logarithm of zero: far below any real one, and finite, so that gradients are too."""


def forward_variables(log_frames: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The CTC forward pass (Graves et al., 2006) over all prefixes, of length 0 .. U, of the labels.

    Args: `log_frames` [B, T, V + 1] log-probabilities, the blank last; `labels` [B, U] int64, any valid id as padding.
    Returns: logarithms, before each frame [B, T, U + 1], of the paths that spell a prefix and end in a blank (or have
    not begun), and of those that end in its last token; [B, U + 1] of all frames that spell exactly the prefix.
    """
    blank = log_frames[..., -1]  # [B, T]
    own = log_frames.gather(2, labels[:, None].expand(-1, log_frames.shape[1], -1))  # [B, T, U]
    is_repeat = functional.pad(labels[:, 1:] == labels[:, :-1], (1, 0))  # [B, U]
    never = torch.full_like(own[:, 0], _NEVER)
    ended, spelt = functional.pad(never, (1, 0)), functional.pad(never, (1, 0), value=_NEVER)
    blanks, tokens = [], []
    for step in range(log_frames.shape[1]):
        blanks.append(ended)
        tokens.append(spelt)
        any_end = torch.logaddexp(ended, spelt)
        entry = torch.where(is_repeat, ended[:, :-1], any_end[:, :-1])
        grown = own[:, step] + torch.logaddexp(spelt[:, 1:], entry)
        ended = blank[:, step, None] + any_end
        spelt = torch.cat([spelt[:, :1], grown], dim=1)
    return torch.stack(blanks, 1), torch.stack(tokens, 1), torch.logaddexp(ended, spelt)


def is_spellable(labels: Tensor, num_frames: int) -> Tensor:
    """Whether `num_frames` frames can spell the labels up to and with each one [B, U]: a repeat takes a frame more."""
    is_repeat = functional.pad(labels[:, 1:] == labels[:, :-1], (1, 0))
    return torch.cumsum(1 + is_repeat.long(), 1) <= num_frames


def next_log_weights(log_frames: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log psi(y v) [B, U, V] for the prefixes y of length 0 .. U - 1 and every v, and log e(y) [B, U] of their end.

    Both are up to a constant per row and prefix.
    """
    ended, spelt, whole = (variables[..., :-1] for variables in forward_variables(log_frames, labels))
    either = torch.logaddexp(ended, spelt)
    top = either.amax(1, keepdim=True).detach()
    weights = (either - top).exp().transpose(1, 2)  # [B, U, T]
    frames = log_frames[..., :-1]
    sums = weights @ frames.exp()  # [B, U, V]
    # The last token of a prefix goes on only through a blank.
    last = labels[:, :-1]  # [B, U - 1] last tokens of prefixes 1 .. U - 1
    own = frames.gather(2, last[:, None].expand(-1, frames.shape[1], -1))  # [B, T, U - 1]
    repeated = (own + ended[..., 1:] - top[..., 1:]).exp().sum(1)  # [B, U - 1]
    repeated = functional.pad(repeated, (1, 0))[..., None]
    places = functional.pad(last, (1, 0))[..., None]
    is_inner = torch.arange(labels.shape[1], device=labels.device)[:, None] > 0
    fixed = torch.where(is_inner, repeated, sums.gather(2, places))
    return sums.scatter(2, places, fixed).clamp_min(1e-30).log(), whole - top[:, 0]


def token_losses(log_weights: Tensor, labels: Tensor) -> Tensor:
    """-log q [B, U] of the labels under next-token scores [B, U, V]."""
    return functional.cross_entropy(log_weights.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def taught_losses(log_weights: Tensor, chances: Tensor) -> Tensor:
    """Cross-entropy [B, U] to the target's distributions `chances` [B, U, V] under next-token scores [B, U, V]."""
    return torch.logsumexp(log_weights, dim=-1) - (chances * log_weights).sum(-1)
