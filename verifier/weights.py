"""What of the target's own weights a drafter may share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verifier.model import ModelError


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """Views of the target's embeddings: nothing is copied, and nothing may be written."""

    input_embedding: torch.Tensor  # [V, E] as stored: some families scale what they read here
    output_embedding: torch.Tensor  # [V, H] times a hidden state, the logits before bias, scale and soft-cap
    hidden_size: int  # H


def shared_weights(network: torch.nn.Module, vocab_size: int) -> SharedWeights:
    """The embeddings of a causal language model, cut to the tokens it can say. Raises: ModelError in one line."""
    found = []
    for kind, module in (
        ("input", network.get_input_embeddings()),  # type: ignore[operator]
        ("output", network.get_output_embeddings()),  # type: ignore[operator]
    ):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.shape[0] < vocab_size:
            raise ModelError(f"{type(network).__name__} has no {kind} embedding that a drafter could share")
        found.append(weight.detach()[:vocab_size])
    return SharedWeights(found[0], found[1], found[1].shape[1])
