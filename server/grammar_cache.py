"""Grammars that have been checked: an application sends the same few with every request."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from server.grammar import Grammar

MAX_ENTRIES = 1024
MAX_CHARS = 2**24
"""Of all texts together."""


class GrammarCache:
    """The texts of checked grammars. Owns them; the ones that were not asked for longest go first."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_chars: int = MAX_CHARS) -> None:
        self._texts: OrderedDict[bytes, str] = OrderedDict()
        self._num_chars = 0
        self._max_entries = max_entries
        self._max_chars = max_chars

    def get(self, grammar: Grammar) -> str | None:
        """The checked text of a grammar, None if it is not known."""
        key = _digest(grammar)
        if (text := self._texts.get(key)) is not None:
            self._texts.move_to_end(key)
        return text

    def put(self, grammar: Grammar, text: str) -> None:
        """Keep the checked text of a grammar."""
        key = _digest(grammar)
        self._num_chars += len(text) - len(self._texts.pop(key, ""))
        self._texts[key] = text
        while len(self._texts) > self._max_entries or self._num_chars > self._max_chars:
            _, old = self._texts.popitem(last=False)
            self._num_chars -= len(old)


def _digest(grammar: Grammar) -> bytes:
    """The same text means something else in another notation; the field that it came in does not matter."""
    text = grammar.text.encode()
    return hashlib.blake2b(text, digest_size=32, person=b"foreign" if grammar.is_foreign else b"own").digest()
