"""How long a prompt may be, and what a client is told of a longer one. Known to both sides of the process border."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from tokenizers import Tokenizer

from server.errors import ContextTooLong, InvalidRequest

_MIN_LONGEST = 16

TokenIds = TypeVar("TokenIds", bound=Sequence[int])


def longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token: a text of more than as many for each token cannot fit."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return max(_MIN_LONGEST, max((len(token) for token in vocabulary), default=0))


def check_length(ids: TokenIds, max_model_len: int, param: str) -> TokenIds:
    """`ids`, if they are not empty and leave room for at least one token of answer."""
    if not ids:
        raise InvalidRequest(f"'{param}' is empty: at least one token is needed", param=param)
    if len(ids) >= max_model_len:
        raise prompt_too_long(max_model_len, f"has {len(ids)} tokens, which leaves no room for an answer", param)
    return ids


def prompt_too_long(max_model_len: int, what: str, param: str) -> ContextTooLong:
    """The error in OpenAI's words; `what` says how long the prompt is."""
    return ContextTooLong(
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt {what}. "
        f"Please shorten '{param}'.",
        param=param,
    )


def prediction_too_long(max_model_len: int, size: str, param: str) -> InvalidRequest:
    """No answer can be as long as this prediction."""
    return InvalidRequest(
        f"'{param}' has {size}; a prediction may have at most the {max_model_len} tokens of this model's context.",
        param=param,
    )
