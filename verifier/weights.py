"""What of the target's own weights a drafter may share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from verifier.model import ModelError


@dataclass(frozen=True, slots=True)
class LogitForm:
    """What a family does with the product of output embedding and hidden state."""

    bias: torch.Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def apply(self, product: torch.Tensor) -> torch.Tensor:
        """The logits [..., V] float32 from the product [..., V]."""
        logits = product.float()
        if self.bias is not None:
            logits = logits + self.bias.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """Views of the target's embeddings, copies only where they are split over ranks; nothing may be written."""

    input_embedding: torch.Tensor  # [V, E] as stored: some families scale what they read here
    output_embedding: torch.Tensor  # [V, H] times a hidden state, the logits before bias, scale and soft-cap
    hidden_size: int  # H
    form: LogitForm = field(default_factory=LogitForm)


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
        found.append(_whole(weight).detach()[:vocab_size])
    return SharedWeights(found[0], found[1], found[1].shape[1], _logit_form(network, vocab_size))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered if it is split over ranks, which must all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _logit_form(network: torch.nn.Module, vocab_size: int) -> LogitForm:
    """Bias of the output embedding; scale and soft-cap by the names that the families give them."""
    bias = getattr(network.get_output_embeddings(), "bias", None)  # type: ignore[operator]
    config: Any = getattr(network, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(text, "logit_scale", None) or 1.0)  # cohere multiplies
    scaling = float(getattr(text, "logits_scaling", None) or 1.0)  # granite divides by it, others multiply
    scale *= 1.0 / scaling if str(getattr(text, "model_type", "")).startswith("granite") else scaling
    softcap = getattr(text, "final_logit_softcapping", None)
    return LogitForm(
        bias=_whole(bias).detach()[:vocab_size] if isinstance(bias, torch.Tensor) else None,
        scale=scale,
        softcap=None if softcap is None else float(softcap),
    )
