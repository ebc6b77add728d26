"""Llama models of realistic shapes with random weights: for step time, where what is said does not matter.

    python -m tests.bench.random_model --folder FOLDER --shape 15m [--dtype bfloat16]

The tokenizer is a byte-level BPE trained on the standard library's sources, so one interpreter version gives one
tokenizer; the weights come from seed 0. Greedy answers of such models fall into loops: they say nothing of acceptance.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 32000
SPECIALS = ("<s>", "</s>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a Llama is not the same in all of them."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate: int
    is_tied: bool
    """Whether the head is the embedding."""


SHAPES = {
    "15m": Shape(hidden=288, num_layers=6, num_heads=6, num_kv_heads=6, intermediate=768, is_tied=True),
    "430m": Shape(hidden=1024, num_layers=24, num_heads=16, num_kv_heads=4, intermediate=4096, is_tied=False),
}
"""By name: 15.2 and 430.5 million parameters."""


def standard_library() -> list[str]:
    """The sources of the running interpreter's standard library in a fixed order, installed packages left out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """VOCAB_SIZE entries; nothing is put before or after a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    begin, end = SPECIALS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=end)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _lines() -> Iterator[str]:
    """ASCII alone: a token that is part of a character would keep a server from showing any text."""
    for text in standard_library():
        yield from (line for line in text.splitlines(keepends=True) if line.isascii())


def make(folder: Path, shape: str, dtype: str = "bfloat16") -> Path:
    """Write config, weights and tokenizer of one of SHAPES into `folder`; returns it. The same call gives the same."""
    which = SHAPES[shape]
    tokenizer = train_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=which.hidden,
        num_hidden_layers=which.num_layers,
        num_attention_heads=which.num_heads,
        num_key_value_heads=which.num_kv_heads,
        intermediate_size=which.intermediate,
        tie_word_embeddings=which.is_tied,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", required=True, choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args()
    folder = make(options.folder, options.shape, options.dtype)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.0f} MB", file=sys.stderr)
    print(json.dumps({"bench": "random_model", "shape": options.shape, "dtype": options.dtype, "bytes": size}))


if __name__ == "__main__":
    main()
