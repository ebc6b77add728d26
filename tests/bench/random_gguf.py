"""A Llama of `random_model` as a GGUF file of bfloat16 weights, for llama.cpp's server. Needs the `gguf` package.

    python -m tests.bench.random_gguf --model FOLDER --out FILE

llama.cpp's own converter refuses tokenizers that it does not know by name; this one needs to know a single kind.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

_BY_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ALONE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def read_bfloat16(path: Path) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Names and values, as bits, of a safetensors file that holds bfloat16 alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        header.pop("__metadata__", None)
        for name, entry in header.items():
            assert entry["dtype"] == "BF16", (name, entry)
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            yield name, np.frombuffer(file.read(end - begin), np.uint16).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem = name.removesuffix(".weight")
    if stem in _ALONE:
        return f"{_ALONE[stem]}.weight"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    assert found, name
    return f"blk.{found[1]}.{_BY_LAYER[found[2]]}.weight"


def interleave_halves(weight: NDArray[np.uint16], num_heads: int) -> NDArray[np.uint16]:
    """Rows [heads, 2, half] of a head's projection as [heads, half, 2]: llama.cpp rotates neighbours, not halves."""
    rows, width = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, width)


def write(model: Path, out: Path) -> None:
    """Write the file `out` for the model in the folder `model`."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    _add_config(writer, config)
    _add_tokenizer(writer, json.loads((model / "tokenizer.json").read_text()), config)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, bits in read_bfloat16(model / "model.safetensors"):
        if bits.ndim == 1:  # llama.cpp wants norms in float32
            writer.add_tensor(gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32))
            continue
        num_heads = next((count for key, count in heads.items() if key in name), 0)
        rows = interleave_halves(bits, num_heads) if num_heads else bits
        writer.add_tensor(gguf_name(name), rows.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    specials = {entry["id"] for entry in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    assert [vocab[token] for token in tokens] == list(range(config["vocab_size"]))
    kinds = [gguf.TokenType.CONTROL if number in specials else gguf.TokenType.NORMAL for number in range(len(tokens))]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write(options.model, options.out)
    print(json.dumps({"bench": "random_gguf", "bytes": options.out.stat().st_size}))


if __name__ == "__main__":
    main()
