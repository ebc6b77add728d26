"""Attention without K/V memory, to run a network by itself."""

from __future__ import annotations

import torch

from verifier.model import AttentionInputs


class Causal:
    """Attention of positions to those before them, without K/V memory."""

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]."""
        query, key, value = inputs.query.float(), inputs.key.float(), inputs.value.float()
        group, num = query.shape[1] // key.shape[1], query.shape[2]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(-1, -2) * (inputs.scaling or query.shape[-1] ** -0.5)
        hidden = torch.ones(num, num).triu(1).bool()
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2).to(inputs.query.dtype)
