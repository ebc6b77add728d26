"""A small Llama with random weights as a GGUF file, quantised as real ones are. Needs the package gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

from tests.api.model_folder import END, FIRST_SPECIAL, SPECIALS, TEMPLATE, byte_letters

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 96, 2, 4, 2, 128
MERGES = ("t h", "th e", "Ġ the", "e r", "i n")
TURN_END = FIRST_SPECIAL + len(SPECIALS) + len(MERGES)
TOKENS = [*byte_letters(), *SPECIALS, *(merge.replace(" ", "") for merge in MERGES), "<|turn_end|>"]
Q4_1, Q8_0, F16, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "F16", "F32"))


def write_gguf(path: Path, *, architecture: str = "llama", matrices: Any = Q4_1, seed: int = 0, **changes: int) -> Path:
    """Write the file. `changes` are fields of the configuration by their names in GGUFWriter (block_count=3)."""
    writer = gguf.GGUFWriter(path, architecture)
    fields = {
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": FFN,
        "head_count": HEADS,
        "head_count_kv": KV_HEADS,
        "rope_dimension_count": HIDDEN // HEADS,
        **changes,
    }
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_tokenizer(writer)
    rng = np.random.default_rng(seed)
    for name, shape in _shapes().items():
        kind = F32 if len(shape) == 1 else Q8_0 if name == "token_embd" else matrices
        values = np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0, 0.3, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes() -> dict[str, tuple[int, ...]]:
    """Rows before columns, as numpy has them; the output embedding is the input's."""
    kv_width = HIDDEN // HEADS * KV_HEADS
    layer = {
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv_width, HIDDEN),
        "attn_v": (kv_width, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN),
    }  # fmt: skip
    layers = {f"blk.{number}.{name}": shape for number in range(LAYERS) for name, shape in layer.items()}
    return {"token_embd": (len(TOKENS), HIDDEN), **layers, "output_norm": (HIDDEN,)}


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    specials = {*SPECIALS, "<|turn_end|>"}
    kinds = [gguf.TokenType.CONTROL if token in specials else gguf.TokenType.NORMAL for token in TOKENS]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(kinds)
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(FIRST_SPECIAL)
    writer.add_eos_token_id(END)
    writer.add_eot_token_id(TURN_END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
