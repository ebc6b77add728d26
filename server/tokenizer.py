"""The model's tokenizer, the same one wherever it is needed: text, tables of n-grams, and the name of a vocabulary."""

from __future__ import annotations

from tokenizers import Tokenizer

from server.errors import StartupError
from server.model_files import ModelFiles


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer as transformers loads it, without truncation or padding. Raises StartupError in one clear line."""
    try:
        tokenizer = Tokenizer.from_str(files.tokenizer_json)
    except Exception as error:  # the library raises bare Exception, and nothing narrower
        raise StartupError(f"the tokenizer cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_ids(files: ModelFiles, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token that ends an answer: those the configurations name by id, and the tokenizer's own end of sequence."""
    eos = tokenizer.token_to_id(files.special_tokens.get("eos_token", ""))
    return tuple(dict.fromkeys([*files.eos_ids, *([] if eos is None else [eos])]))
