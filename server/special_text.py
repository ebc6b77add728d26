"""Text that spells special tokens: where it is, and how it is hidden from a template and the tokenizer."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

from server.errors import InvalidRequest

_MARK = "\ue000"
_FIRST_LETTER = 0xF0000
"""Hidden text is written as the mark and one letter of this private plane, which says what was hidden."""
_MAX_HIDDEN = sys.maxunicode + 1 - _FIRST_LETTER
"""There are no more letters behind the first."""

_NO_BLANKS = frozenset("\x1c\x1d\x1e\x1f")
"""Separators that are blanks to Python and not to the tokenizer, which is written in Rust."""

Span = tuple[int, int, int | None]
"""First character, the one behind the last, and the token, if it is one."""


class SpecialText:
    """The special tokens of one tokenizer, as they are written. Owns nothing but patterns."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._ids = {token.content: id_ for id_, token in added.items() if token.special and token.content}
        # A normalizer may turn other text into a special token's, so there the tokenizer itself has to be asked.
        self._is_lax = any(token.special and token.normalized for token in added.values())
        # The tokenizer looks for all of these at once, the longest first; one may begin inside another.
        self._added = {token.content: token for token in added.values() if token.content and not token.normalized}
        self._added_pattern = _any_of(self._added)
        self._hidden_pattern = _any_of([*self._ids, _MARK])

    def is_in(self, text: str) -> bool:
        """Whether `text` spells a special token, or looks like something hidden."""
        return next(self.spans(text), None) is not None

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """What has to be hidden, from left to right."""
        if not self._is_lax:
            yield from (match.span() for match in self._hidden_pattern.finditer(text))
            return
        start = 0
        for part in text.split(_MARK):
            yield from ((start + left, start + right) for left, right, _ in self._ask(part))
            start += len(part) + 1
            if start <= len(text):
                yield start - 1, start

    def cut(self, text: str) -> Iterator[Span]:
        """The special tokens that the tokenizer finds in `text`, then the end of it."""
        yield from self._ask(text) if self._is_lax else self._find(text)
        yield len(text), len(text), None

    def _ask(self, text: str) -> Iterator[Span]:
        special = set(self._ids.values())
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        for token, (left, right) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in special and right > left:
                yield left, right, token

    def _find(self, text: str) -> Iterator[Span]:
        """What the tokenizer would find, without the memory that a whole encoding takes."""
        end = 0
        for match in self._added_pattern.finditer(text):
            token = self._added[match.group()]
            left, right = match.span()
            if token.single_word and (_is_word(text, left - 1) or _is_word(text, right)):
                continue
            if token.lstrip:
                while left > end and _is_blank(text[left - 1]):
                    left -= 1
            if token.rstrip:
                while right < len(text) and _is_blank(text[right]):
                    right += 1
            end = right
            if token.special:
                yield left, right, self._ids[token.content]


class Guard:
    """Hides special-token text of one conversation, and brings it back. Owns what was hidden, each text once."""

    def __init__(self, special: SpecialText):
        self._special = special
        self._letters: dict[str, str] = {}
        self._texts: dict[str, str] = {}

    def hide(self, text: str) -> str:
        """`text` with marks in the place of what must stay text. Raises InvalidRequest when there are no more marks."""
        out: list[str] = []
        end = 0
        for left, right in self._special.spans(text):
            out += [text[end:left], _MARK, self._letter(text[left:right])]
            end = right
        return "".join(out) + text[end:] if out else text

    def restore(self, text: str) -> str:
        """Put the hidden text back."""
        if _MARK not in text:
            return text
        return re.sub(f"{_MARK}(.)", lambda match: self._texts.get(match.group(1), match.group()), text)

    def _letter(self, text: str) -> str:
        letter = self._letters.get(text)
        if letter is None:
            if len(self._letters) == _MAX_HIDDEN:
                raise InvalidRequest(
                    f"'messages' spell special tokens in more than {_MAX_HIDDEN} different ways, which is the limit.",
                    param="messages",
                )
            letter = self._letters[text] = chr(_FIRST_LETTER + len(self._letters))
            self._texts[letter] = text
        return letter


def _is_blank(letter: str) -> bool:
    return letter.isspace() and letter not in _NO_BLANKS


def _is_word(text: str, index: int) -> bool:
    """Whether there is a letter of a word at this place."""
    return 0 <= index < len(text) and re.match(r"\w", text[index]) is not None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of `texts` at each place; nothing if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")
