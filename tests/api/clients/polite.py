"""A model made by hand that always answers "Okay.", and under a grammar the nearest thing to it: short and known.

Its next token depends on the last one alone: a table, put into the weights of a Llama whose one layer adds nothing.
So a real server, with its grammars and its drafters, gives answers that a test can name.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.api.model_folder import END, SPECIALS, VOCAB_SIZE, make_folder
from tests.families import make_config

TEXT = "Okay."
"""What it says where nothing binds it, and in every JSON string that is free."""

CONTEXT = 32768
HIDDEN = 320
ASSISTANT = 256 + SPECIALS.index("<|assistant|>")
ENDINGS = (END, *b'"}],3')
"""What it says wherever that is allowed, the first of them first: answers close as soon as they can, numbers are 3."""


def scores() -> torch.Tensor:
    """[next, last]: how much it wants a token after another one. No two are the same, so nothing is left to chance."""
    table = torch.zeros(VOCAB_SIZE, VOCAB_SIZE)
    table += -0.1 * torch.arange(VOCAB_SIZE)[:, None]
    for rank, token in enumerate(ENDINGS):
        table[token] = 10.0 * (len(ENDINGS) - rank)
    word = TEXT.encode()
    for last, token in [(ASSISTANT, word[0]), (ord('"'), word[0]), (ord("{"), ord("}")), *pairwise(word)]:
        table[token, last] = 100.0
    return table


def save_polite(folder: Path, template: str) -> Path:
    """Write the model with its tokenizer and this chat template."""
    config = make_config(
        "llama", vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, num_hidden_layers=1, max_position_embeddings=CONTEXT,
        bos_token_id=256, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE, HIDDEN))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight.copy_(torch.nn.functional.pad(scores(), (0, HIDDEN - VOCAB_SIZE)))
    model.save_pretrained(folder)
    kept = (folder / "config.json").read_text()
    make_folder(folder, template=template)
    (folder / "config.json").write_text(kept)
    assert json.loads(kept)["vocab_size"] == VOCAB_SIZE
    return folder
