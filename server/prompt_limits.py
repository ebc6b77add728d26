"""How long a prompt may be, and what a client is told of a longer one. Known to both sides of the process border."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tokenizers import Tokenizer, models, pre_tokenizers

from server.errors import ContextTooLong, InvalidRequest

_MIN_LONGEST = 16

_NORMALIZERS = {"Lowercase": 1, "Prepend": 1, "ByteLevel": 1, "NFD": 1, "NFKD": 1, "NFC": 4, "NFKC": 4}
"""Those that drop nothing, and how many characters they may make one of: no letter is composed of more than four."""
_PRE_TOKENIZERS = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"})
_SPLITTERS = frozenset({"Split", "Punctuation"})
"""These keep all text unless they are told to remove what they split at."""

TokenIds = TypeVar("TokenIds", bound=Sequence[int])


def longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token of the vocabulary."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return max(_MIN_LONGEST, max((len(token) for token in vocabulary), default=0))


def most_chars_per_token(tokenizer: Tokenizer) -> int | None:
    """A text of more characters than so many for each token cannot fit. None if there is no such number.

    A tokenizer that drops blanks, or makes one unknown token of any word, has none; only known kinds are trusted.
    """
    most = longest_token(tokenizer)
    is_byte_level = False
    for part in _parts(tokenizer.normalizer):
        kind = part["type"]
        is_byte_level |= kind == "ByteLevel"
        if kind == "Replace":
            if len(part["content"]) < len(part["pattern"].get("String", "")) or "String" not in part["pattern"]:
                return None
        elif kind in _NORMALIZERS:
            most *= _NORMALIZERS[kind]
        else:
            return None
    for part in _parts(tokenizer.pre_tokenizer):
        kind = part["type"]
        is_byte_level |= kind == "ByteLevel"
        if kind not in _PRE_TOKENIZERS and (kind not in _SPLITTERS or part["behavior"] == "Removed"):
            return None
    takes_blanks = any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())
    return None if takes_blanks or not _keeps_unknown(tokenizer, is_byte_level) else most


def _keeps_unknown(tokenizer: Tokenizer, is_byte_level: bool) -> bool:
    """Whether each character that the vocabulary lacks becomes a token or more of its own."""
    model = tokenizer.model
    if not isinstance(model, models.BPE):
        return False
    vocabulary = tokenizer.get_vocab(with_added_tokens=False).keys()
    if is_byte_level and vocabulary >= set(pre_tokenizers.ByteLevel.alphabet()):
        return True
    if model.byte_fallback and vocabulary >= {f"<0x{byte:02X}>" for byte in range(256)}:
        return True
    return model.unk_token is not None and not model.fuse_unk


def _parts(step: Any) -> Iterator[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, those of a sequence one by one."""
    pending = [] if step is None else [json.loads(step.__getstate__())]
    while pending:
        part = pending.pop()
        if part["type"] == "Sequence":
            pending += part.get("normalizers", []) + part.get("pretokenizers", [])
        else:
            yield part


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
