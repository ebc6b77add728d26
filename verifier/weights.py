"""What of the target's own weights a drafter may share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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

    def narrowed(self, tokens: torch.Tensor) -> LogitForm:
        """The same for the logits of `tokens` [N] int64 alone."""
        return self if self.bias is None else replace(self, bias=self.bias[tokens.to(self.bias.device)])


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """The target's embeddings: views, or copies of what is quantised or split over ranks; nothing may be written."""

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
        weight = _readable(module, getattr(network, "dtype", torch.float32))
        if weight is None or weight.dim() != 2 or weight.shape[0] < vocab_size:
            raise ModelError(f"{type(network).__name__} has no {kind} embedding that a drafter could share")
        found.append(weight.detach()[:vocab_size])
    return SharedWeights(found[0], found[1], found[1].shape[1], _logit_form(network, vocab_size))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered if it is split over ranks, which must all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.inference_mode()
def _readable(module: torch.nn.Module | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight of an embedding as plain numbers; None if there is no way to it."""
    if module is None:
        return None
    weight = getattr(module, "weight", None)
    if isinstance(weight, DTensor):
        return _whole(weight)
    if isinstance(weight, torch.Tensor):
        if type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point():
            return weight
        if isinstance(module, torch.nn.Embedding):
            return weight.dequantize().to(dtype) if hasattr(weight, "dequantize") else None
    width = getattr(module, "in_features", None)
    if width is None:
        return None
    # A packed weight is known to its module alone, which multiplies it by whatever it is given: by the unit vectors.
    device = next(tensor.device for tensor in (*module.parameters(), *module.buffers()))
    columns: torch.Tensor = module(torch.eye(width + 1, width, dtype=dtype, device=device))
    return (columns[:-1] - columns[-1]).t().contiguous()  # less the bias, which is all that zeros give


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
