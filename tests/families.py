"""Tiny random models of every family the verifier serves, and of those it refuses."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.gptj.modeling_gptj import GPTJPreTrainedModel

VOCAB = 97
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Stretched to the 256 tokens that all the others have.
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 150000.0}
_DEEPSEEK = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "head_dim": None,
}

SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "gpt2": _GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "starcoder2": {"sliding_window": 16},
    "olmo2": {},
    "granite": {"max_position_embeddings": 128, "rope_parameters": _LINEAR},
    "cohere": {},
    "cohere2": {"sliding_window": 16},
    "smollm3": {},
    "mixtral": _EXPERTS,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {**_EXPERTS, "sliding_window": 16, "max_position_embeddings": 64, "rope_parameters": _YARN},
    "deepseek_v3": _DEEPSEEK,
    "glm4": {},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "does not dispatch"),
    "mpt": ({"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4}, "does not dispatch"),
    "falcon": (
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "does not dispatch",
    ),
    "stablelm": ({**_BASE, "head_dim": None}, "stablelm|StableLm"),
    "qwen3_5_text": (_BASE, "linear_attention"),
    "llama4_text": (_BASE, "chunked"),
}
if GPTJPreTrainedModel._supports_attention_backend:  # since transformers 5.24
    SERVED["gptj"] = {**_GPT2, "rotary_dim": 8}
else:
    REFUSED["gptj"] = ({**_GPT2, "rotary_dim": 8}, "does not dispatch")


def make_config(family: str, **changes: Any) -> Any:
    """A tiny configuration of a served family; token ids 0..2 are pad, bos and eos."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    given = SERVED[family]
    base = {} if "n_embd" in given else _BASE
    settings = {**base, **given, **special, **changes}
    return CONFIG_MAPPING[family](**{key: value for key, value in settings.items() if value is not None})


def make_refused_config(family: str) -> Any:
    settings = {**REFUSED[family][0], "pad_token_id": 0}
    return CONFIG_MAPPING[family](**{key: value for key, value in settings.items() if value is not None})


def _spread(family: str, name: str) -> float:
    """Standard deviation of a random weight: small embeddings where the head is tied, else a token repeats itself."""
    if "embed" in name or "wte" in name or "wpe" in name:
        return 0.08 if family.startswith(("gemma", "cohere", "opt", "gpt2")) else 0.6
    return 0.25


def save_model(family: str, folder: Any, seed: int = 0, **changes: Any) -> str:
    """Random weights, spread wide enough that greedy answers do not loop at once. Returns the folder's path."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, _spread(family, name))
    model.save_pretrained(folder)
    return str(folder)
