"""Models of well-known shapes with random weights, made where they are used: no checkpoint is written or read."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}
SHAPES = ("llama-8b", "qwen-0.5b")


def make_config(shape: str, is_tiny: bool) -> Any:
    """The configuration of Llama-3.1-8B or of Qwen2.5-0.5B, or a small one of the same kind."""
    if shape == "llama-8b":
        sizes: dict[str, Any] = {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _LLAMA3_ROPE,
            "tie_word_embeddings": False,
        }
        tiny = {**_TINY, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaConfig(**{**sizes, **(tiny if is_tiny else {}), **_NO_IDS})
    assert shape == "qwen-0.5b", shape
    sizes = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    }
    tiny = {**_TINY, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2Config(**{**sizes, **(tiny if is_tiny else {}), **_NO_IDS})


def build(config: Any, attention: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The model on the device, its weights drawn there as transformers would for training from nothing."""
    torch.manual_seed(0)
    with torch.device(device):
        network: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=dtype, trust_remote_code=False
        )
    return network.eval().requires_grad_(False)


def step_bytes(network: torch.nn.Module) -> int:
    """Bytes of weights that a step cannot but read: all, but for an input embedding that is not the head as well."""
    total = sum(weight.numel() * weight.element_size() for weight in network.parameters())
    inputs: Any = network.get_input_embeddings()  # type: ignore[operator]
    outputs: Any = network.get_output_embeddings()  # type: ignore[operator]
    if inputs.weight is not outputs.weight:
        total -= inputs.weight.numel() * inputs.weight.element_size()
    return total
