"""The model's tokenizer, the same one wherever it is needed: text, tables of n-grams, and the name of a vocabulary."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer

from server.errors import StartupError
from server.model_files import ModelFiles


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer as transformers would load it. Raises StartupError in one clear line.

    Which tokens are added to a text is up to its post-processor: beside a tokenizer.json, transformers does not look at
    add_bos_token either. What tokenizer_config.json calls special is special, if the vocabulary has it.
    """
    try:
        tokenizer = Tokenizer.from_str(files.tokenizer_json)
    except Exception as error:  # the library raises bare Exception, and nothing narrower
        raise StartupError(f"tokenizer.json cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for text in (*files.special_tokens.values(), *files.extra_tokens):
        if text and text not in known and tokenizer.token_to_id(text) is not None:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    return tokenizer


def end_ids(files: ModelFiles, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token that ends an answer: those the configurations name by id, and the tokenizer's own end of sequence."""
    eos = tokenizer.token_to_id(files.special_tokens.get("eos_token", ""))
    return tuple(dict.fromkeys([*files.eos_ids, *([] if eos is None else [eos])]))
